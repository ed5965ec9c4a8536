"""What `minillm train` finds out of its model: held-out losses, by all processes together, and samples of its text."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from minillm.cli.console import say
from minillm.cli.processes import exchange, rank, world_size
from minillm.cli.progress import Line
from minillm.cli.training_signals import StopCallback
from minillm.evaluation.held_out import HeldOutScore, score_held_out
from minillm.training.put_back import evaluating

SAMPLES = 2
PROMPT_TOKENS = 32
NEW_TOKENS = 32


class GivenUp(Exception):
    """A signal came while rows were scored."""


class HeldOut:
    """Held-out rows, scored by all processes, each its share.

    Args:
        rows: packed rows, with fixed prefixes.
        collator: as for training.
        batch_size: rows at once.
        line: where progress is shown.
        stop: what knows of signals.
    """

    def __init__(
        self, rows: Sequence[Any], collator: Any, batch_size: int, line: Line, stop: StopCallback | None = None
    ) -> None:
        self.rows, self.collator, self.batch_size = rows, collator, batch_size
        self.line, self.stop = line, stop

    def score(self, model: Any) -> HeldOutScore | None:
        """The losses of all rows; None if a signal came before the last."""
        own = [self.rows[index] for index in range(rank(), len(self.rows), world_size())]
        found: HeldOutScore | None = None
        with self.line.counting("held-out rows", len(own)) as advance:

            def told(count: int) -> None:
                advance(count)
                if self.stop is not None and self.stop.asked:
                    raise GivenUp

            with contextlib.suppress(GivenUp):
                found = score_held_out(model, own, self.collator, self.batch_size, told)
        whole = HeldOutScore()
        for part in exchange(found):
            if part is None:
                return None
            whole.add(part)
        return whole


def count_tokens(samples: Sequence[dict[str, Any]], vocab_size: int) -> np.ndarray:
    """How often each id occurs in samples to train on, int64 [vocabulary]."""
    counts = np.zeros(vocab_size, np.int64)
    for sample in samples:
        for name in ("input_ids", "prompt_ids", "completion_ids"):
            if name in sample:
                counts += np.bincount(np.asarray(sample[name], np.int64), minlength=vocab_size)
    return counts


def prompt_of(sample: dict[str, Any]) -> list[int]:
    """The prompt of a sample of answers, or the first tokens of a text."""
    if "prompt_ids" in sample:
        return list(sample["prompt_ids"])
    ids = list(sample["input_ids"])
    masks = sample.get("assistant_masks")
    if masks is not None and 1 in masks:
        return ids[: list(masks).index(1)]
    return ids[: max(1, min(PROMPT_TOKENS, len(ids) // 2))]


def write_samples(
    model: Any, tokenizer: Any, held_out: Sequence[dict[str, Any]], objective: str
) -> list[tuple[str, str]]:
    """What the model writes after held-out prompts, greedily: pairs of a prompt and a text.

    A model that fills blanks is given the blank behind the prompt.
    """
    config, found = model.config, []
    length = config.position_table_size or config.max_position_embeddings
    for sample in held_out[:SAMPLES]:
        prompt = prompt_of(sample)
        blank = [config.gmask_token_id, config.sop_token_id] if objective == "glm" else []
        new = min(NEW_TOKENS, length - len(prompt) - len(blank))
        if not prompt or new < 1 or None in blank:
            continue
        ids = prompt + blank
        try:
            with evaluating(model):
                text = generate(model, ids, new)
        except (ValueError, RuntimeError) as error:
            say(f"no samples: {error}")
            return found
        found.append((tokenizer.decode(prompt), tokenizer.decode(text[len(ids) :], skip_special_tokens=True)))
    return found


def generate(model: Any, ids: list[int], new: int) -> list[int]:
    inputs = torch.tensor([ids], device=model.device)
    end = model.config.eos_token_id
    pad = model.config.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    written = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=pad,
    )
    return written[0].tolist()
