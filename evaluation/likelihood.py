"""Log likelihoods of tokens after a context, in rows of any length, without all logits at once."""

import math
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.tokenization.glm_layout import GLMTokens, find_glm_tokens
from minillm.training.put_back import evaluating
from minillm.tuning import tuning

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""

# Where a config names a length, as lm-evaluation-harness looks for it, and what it takes where none does.
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
DEFAULT_LENGTH = 2048
# Tokens by which it is told what stands between hidden states and logits.
PROBED = 8
# What transformers writes for a tokenizer without a length.
NO_LENGTH = int(1e30)


class Row(NamedTuple):
    """One forward: its inputs, lists of one length by name, and the tokens that its last positions predict."""

    inputs: dict[str, list[int]]
    targets: list[int]


class RowScore(NamedTuple):
    """What a model says of a row's targets.

    Attributes:
        log_likelihood: the sum of their log probabilities, in nats.
        num_tokens: how many they are.
        is_greedy: whether each was the likeliest.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


def reads_prefixes(model: PreTrainedModel) -> bool:
    """Whether what comes before an answer is a bidirectional prefix to this model, in scoring as in `generate()`."""
    return getattr(model.config, "attention_type", None) == "prefix" and model.config.prompt_is_prefix


def fills_blanks(model: PreTrainedModel) -> bool:
    """Whether a model is made for GLM's blanks, as far as its config tells: it has a second axis of positions."""
    config = model.config
    two_axes = getattr(config, "position_embedding_type", None) == "glm_2d" or getattr(config, "rope_2d", False)
    return bool(two_axes) and getattr(config, "attention_type", None) == "prefix"


def find_blanks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GLMTokens:
    """GLM's tokens. ValueError if the model cannot fill blanks, or neither it nor the tokenizer names any."""
    if getattr(model.config, "attention_type", None) != "prefix" or not hasattr(model, "score_fills"):
        raise ValueError(
            "only a MiniLLM with `attention_type='prefix'` fills blanks: evaluate this model without GLM's"
        )
    return find_glm_tokens(tokenizer, model.config)


def model_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens that a model takes, where lm-evaluation-harness reads them: in the config, else in the tokenizer."""
    config = getattr(model.config, "text_config", None) or model.config
    named = [getattr(config, name, None) for name in LENGTHS]
    of_tokenizer = getattr(tokenizer, "model_max_length", None)
    named.append(of_tokenizer if of_tokenizer != NO_LENGTH else None)
    return int(next((length for length in named if length is not None), DEFAULT_LENGTH))


def require_language_model(model: PreTrainedModel) -> None:
    """Refuses a model in which a token sees itself: its likelihoods say nothing."""
    if getattr(model.config, "attention_type", None) == "bidirectional":
        raise ValueError(
            'the model has attention_type="bidirectional": each token sees itself and what follows, so it has no '
            "likelihood; evaluate a causal or a prefix model"
        )


def pair_row(context: Sequence[int], continuation: Sequence[int], prefix: int = 0) -> Row:
    """The row that scores a continuation after a context, both token ids; its first `prefix` tokens are a prefix."""
    input_ids = [*context, *continuation][:-1]
    inputs = {"input_ids": input_ids}
    if prefix:
        inputs["prefix_mask"] = [1] * prefix + [0] * (len(input_ids) - prefix)
    return Row(inputs, list(continuation))


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    batch_size: int = 8,
    progress: Progress | None = None,
    what: str = "tokens",
    name_of: Callable[[int], str] = "row {}".format,
) -> list[RowScore]:
    """The log likelihood of each row's targets.

    Rows of like lengths go together, padded on the right; rows of the same inputs, such as the letters of an item, are
    one forward. Logits are made for scored positions only, and of few of
    these at a time, if the head of the model is all that stands between its hidden states and its logits (which is
    tried first); of another model, a row's logits are made at once.

    Args:
        model: any causal language model of transformers; it is put back into the mode that it was in.
        rows: as `pair_row` makes them.
        batch_size: rows of other inputs in one forward.
        progress: called after each batch.
        what: what rows are, for `progress`.
        name_of: what to call the row of this number in an error.

    Returns:
        A `RowScore` for each row; probabilities are taken in float32 at least, and summed in float64.

    Raises:
        ValueError: `batch_size` below 1, a token beyond the vocabulary, or a log likelihood that is no number.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1")
    require_vocabulary(model, rows, name_of)
    order = sorted(range(len(rows)), key=lambda n: (-len(rows[n].inputs["input_ids"]), *rows[n].inputs.values()))
    groups = [list(same) for _, same in groupby(order, key=lambda number: rows[number].inputs)]
    scores: dict[int, RowScore] = {}
    with evaluating(model):
        head = find_head(model, rows[order[-1]]) if rows else None
        for start in range(0, len(groups), batch_size):
            chosen = groups[start : start + batch_size]
            found = score_batch(model, [[rows[number] for number in same] for same in chosen], head)
            for number, score in zip(chain(*chosen), found, strict=True):
                if not math.isfinite(score.log_likelihood):
                    raise ValueError(f"the model's loss is {-score.log_likelihood} in {name_of(number)}")
                scores[number] = score
            if progress is not None:
                progress(what, len(scores), len(rows))
    return [scores[number] for number in range(len(rows))]


def require_vocabulary(model: PreTrainedModel, rows: Sequence[Row], name_of: Callable[[int], str]) -> None:
    """Refuses a token that the model does not have."""
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    for number, row in enumerate(rows):
        if max(row.inputs["input_ids"]) >= size or max(row.targets) >= size:
            raise ValueError(f"{name_of(number)} holds a token beyond the model's {size}: the tokenizer is another's")


def find_head(model: PreTrainedModel, row: Row) -> tuple[Any, Any] | None:
    """The base model and the head, if one after the other gives the model's very logits; None where something scales
    or caps them, or where the model is another's wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    unwrapped = model if unwrap is None else unwrap()
    base, head = unwrapped.base_model, unwrapped.get_output_embeddings()
    if head is None or base is unwrapped:
        return None
    # A few tokens tell.
    inputs = to_tensors([Row({name: values[:PROBED] for name, values in row.inputs.items()}, [])], model.device)
    hidden = getattr(base(**inputs, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return None
    logits = head(hidden)
    return (base, head) if torch.equal(logits, model(**inputs, use_cache=False).logits) else None


def score_batch(
    model: PreTrainedModel, groups: Sequence[Sequence[Row]], head: tuple[Any, Any] | None
) -> list[RowScore]:
    """The scores of rows in one forward, in which those of a group, of the same inputs, are one; `head` as `find_head`
    found it."""
    inputs = to_tensors([group[0] for group in groups], model.device)
    if head is None:
        # Virtual tokens of an adapter stand before a row's own.
        states = model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]
    else:
        states = head[0](**inputs, use_cache=False).last_hidden_state
    rows = list(chain(*groups))
    lines = [line for line, group in enumerate(groups) for row in group for _ in row.targets]
    lengths = [len(row.inputs["input_ids"]) for row in rows]
    columns = [
        column
        for row, length in zip(rows, lengths, strict=True)
        for column in range(length - len(row.targets), length)
    ]
    owners = torch.tensor([number for number, row in enumerate(rows) for _ in row.targets])
    targets = torch.tensor([target for row in rows for target in row.targets], device=model.device)
    states = states[torch.tensor(lines, device=model.device), torch.tensor(columns, device=model.device)]
    found, greedy = gather(states, targets, None if head is None else head[1])
    totals = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owners, found)
    missed = torch.zeros(len(rows), dtype=torch.long).index_add_(0, owners, (~greedy).long())
    return [
        RowScore(total, len(row.targets), miss == 0)
        for row, total, miss in zip(rows, totals.tolist(), missed.tolist(), strict=True)
    ]


def gather(states: torch.Tensor, targets: torch.Tensor, head: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities (float64) of targets [n], and whether each is the likeliest; states are logits, or what the
    head makes them of."""
    alive = tuning.chunk_logits
    size = states.shape[-1] if head is None else head.weight.shape[0]
    chunk = max(1, alive.get(states.device.type, alive["cuda"]) // size)
    found, greedy = [], []
    for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        logits = part if head is None else head(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        # Not `logsumexp`, which rounds less: with a large vocabulary the harness's figures would differ beyond 1e-6.
        found.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(found).double().cpu(), torch.cat(greedy).cpu()


def to_tensors(rows: Sequence[Row], device: torch.device) -> dict[str, torch.Tensor]:
    """The inputs of rows, padded on the right, with an attention mask where they are not of one length."""
    longest = max(len(row.inputs["input_ids"]) for row in rows)
    padded = [longest - len(row.inputs["input_ids"]) for row in rows]
    batch = {
        name: [row.inputs[name] + [0] * pad for row, pad in zip(rows, padded, strict=True)] for name in rows[0].inputs
    }
    if any(padded):
        batch["attention_mask"] = [[1] * (longest - pad) + [0] * pad for pad in padded]
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}
