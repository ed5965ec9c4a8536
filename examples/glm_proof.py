"""Trains GLM's objective and next-token prediction on the same text, and compares what the models can do afterwards.

    python examples/glm_proof.py --out glm-proof
    python examples/glm_proof.py --out glm-proof --steps 20000 --hidden-size 768 --layers 12 --length 512 \\
        --vocab-size 8000 --mask-fraction 0.15 --rope-theta 10000 --learning-rate 6e-4 --bf16

The first takes some two hours on a core, 5 to 20 minutes for each of nine models, and a third of that with
`--seeds 1`; the second wants a GPU.

The text is cut into rows of `--length` tokens. From each seed start, with the same weights and rows in the same order:

- `causal`: next-token prediction; every token but a row's first is scored.
- `glm_blanks`: GLM's objective with short spans, `[MASK]`.
- `glm_document`: GLM's objective with the ends of rows, `[gMASK]`.

What is left: `results.json`, with each seed's figures, and `glm-proof.png` (needs `pip install minillm-hf[train]`).
"""

import json
import platform
import re
import statistics
import time
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import transformers
import typer
from glm_proof_picture import draw
from transformers import Trainer, TrainingArguments, set_seed

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer, __version__
from minillm.data import corrupt, load_corpus, split_corpus
from minillm.data.span_masking import most_spans, poisson_cdf, token_spans
from minillm.training import DataCollatorForCausalLM, DataCollatorForGLM, DocumentCollator, SetEpochCallback
from minillm.training.put_back import evaluating

IGNORED = -100
PADDING = {"labels": IGNORED}
WORD = re.compile(r"(?<![A-Za-z]) ?[A-Za-z]{4,}")
MIXTURES = {"glm_blanks": {"token": 1.0}, "glm_document": {"document": 1.0}}
MODELS = ("causal", *MIXTURES)


class Scores(NamedTuple):
    """Of each row, by label: negative log likelihoods in nats, and whether the label was the likeliest token."""

    nll: list[np.ndarray]
    hit: list[np.ndarray]

    def part(self, labels: slice) -> "Scores":
        return Scores([row[labels] for row in self.nll], [row[labels] for row in self.hit])

    def of_rows(self, chosen: Sequence[bool]) -> "Scores":
        return Scores(list(compress(self.nll, chosen)), list(compress(self.hit, chosen)))

    @property
    def perplexity(self) -> float:
        """Over all labels of all rows, each counting the same."""
        return float(np.exp(np.concatenate(self.nll).mean()))

    @property
    def exact(self) -> float:
        """The part of the rows all of whose labels were the likeliest, which is what greedy decoding writes."""
        return float(np.mean([row.all() for row in self.hit]))


class Counted:
    """A collator that counts the labels of each batch it makes."""

    def __init__(self, collator: DocumentCollator) -> None:
        self.collator = collator
        self.scored: list[int] = []

    def __call__(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = self.collator(samples)
        self.scored.append(int((batch["labels"] != IGNORED).sum()))
        return batch


def cut_rows(texts: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Rows of `length` token ids; what is left at a text's end is dropped, so that all rows are equally long."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[at : at + length] for ids in encoded for at in range(0, len(ids) - length + 1, length)]


class Blank(NamedTuple):
    """Spans [k, 2] cut out of a row, their order in Part B, and the last of them there: the one that is scored."""

    spans: np.ndarray
    order: np.ndarray
    start: int
    stop: int


def draw_blanks(rows: Sequence[Sequence[int]], fraction: float, seed: int) -> list[Blank]:
    """A blank in the middle half of each row, so that both sides have context.

    Others stand beside it, as in training: in a row with fewer, a model that was trained on `fraction` expects longer
    spans. They come before it in Part B, so all of the row but the blank is seen.
    """
    rng, lengths = np.random.default_rng(seed), poisson_cdf(3.0)
    blanks = []
    for ids in rows:
        count, inside = len(ids), np.empty(0)
        while not len(inside):
            limit = most_spans(count, fraction, 3.0)
            spans = token_spans(np.ones(count, bool), fraction, limit, lengths, rng.random)
            inside = np.flatnonzero((spans[:, 0] >= count // 4) & (spans[:, 1] <= count - count // 4))
        chosen = rng.choice(inside)
        order = np.append(rng.permutation(np.delete(np.arange(len(spans)), chosen)), chosen)
        blanks.append(Blank(spans, order, *spans[chosen].tolist()))
    return blanks


def last_words(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Passages that end in a word: of each row the tokens up to the end of the last word of four letters or more that
    begins in its second quarter, and where the word begins. Rows without such a word are left out.

    A word is a run of letters, and the space before it, that begins and ends where tokens do.
    """
    names = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    passages = []
    for ids in rows:
        edges = {0: 0}
        for number, token in enumerate(ids, start=1):
            edges[max(edges) + len(names[token])] = number
        found = WORD.finditer("".join(names[token] for token in ids))
        words = [(edges.get(word.start(), -1), edges.get(word.end(), -1)) for word in found]
        quarter = len(ids) // 4
        words = [(start, stop) for start, stop in words if quarter <= start < 2 * quarter and stop > start]
        if words:
            passages.append((list(ids[: words[-1][1]]), words[-1][0]))
    return passages


def causal_row(ids: Sequence[int], start: int, stop: int) -> dict[str, list[int]]:
    """Inputs that score tokens `start` to `stop` from what stands to the left of them."""
    labels = [IGNORED] * start + list(ids[start:stop])
    return {"input_ids": list(ids[:stop]), "attention_mask": [1] * stop, "labels": labels}


def glm_row(
    ids: Sequence[int], blank: Blank, mask_token_id: int, tokenizer: Any, bidirectional: bool = True
) -> dict[str, list[int]]:
    """Inputs that score what fills a blank, and then the end token, from all the rest of a row.

    Args:
        mask_token_id: `[MASK]`, or `[gMASK]`, after which the first axis counts on.
        bidirectional: False reads the text with its blanks from left to right.
    """
    sample = corrupt(
        ids,
        blank.spans,
        blank.order,
        mask_token_id=mask_token_id,
        sop_token_id=tokenizer.sop_token_id,
        eop_token_id=tokenizer.eop_token_id,
        counting=mask_token_id == tokenizer.gmask_token_id,
    )
    slots = len(sample.input_ids)
    prefix = sample.context_length if bidirectional else 0
    unscored = len(sample.labels) - (blank.stop - blank.start + 1)
    # The end token is the label of one slot more.
    return {
        "input_ids": [*sample.input_ids.tolist(), tokenizer.pad_token_id],
        "attention_mask": [1] * slots + [0],
        "labels": [IGNORED] * unscored + sample.labels[unscored:].tolist(),
        "position_ids": [*sample.position_ids.tolist(), 0],
        "block_position_ids": [*sample.block_position_ids.tolist(), 0],
        "prefix_mask": [1] * prefix + [0] * (slots + 1 - prefix),
    }


def rest_row(ids: Sequence[int], start: int, tokenizer: Any) -> dict[str, list[int]]:
    """Inputs that score all of a text from a token on, and the end token, behind `[gMASK]`."""
    blank = Blank(np.array([[start, len(ids)]]), np.array([0]), start, len(ids))
    return glm_row(ids, blank, tokenizer.gmask_token_id, tokenizer)


def padded(values: list[int], width: int, padding: int) -> list[int]:
    return values + [padding] * (width - len(values))


def score_rows(
    model: Any, rows: Sequence[dict[str, list[int]]], batch_size: int = 32, never: int | None = None
) -> Scores:
    """Scores of the labels of rows, padded at the right.

    Args:
        never: an id to which a model gives no probability where it is not the label: with that of the end token, the
            model is told how long a span is.
    """
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    nll, hit = [np.empty(0)] * len(rows), [np.empty(0)] * len(rows)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        width = len(rows[chosen[-1]]["input_ids"])
        batch = {
            name: torch.tensor([padded(rows[at][name], width, PADDING.get(name, 0)) for at in chosen])
            for name in rows[0]
        }
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with evaluating(model):
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        if never is not None:
            logits[..., never] = logits[..., never].masked_fill(labels != never, -torch.inf)
        losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        hits = logits.argmax(-1) == labels
        for row, at in enumerate(chosen):
            scored = labels[row] != IGNORED
            nll[at], hit[at] = losses[row][scored].cpu().numpy(), hits[row][scored].cpu().numpy()
    return Scores(nll, hit)


class Recipe(NamedTuple):
    """What all models have in common; `options` go to `TrainingArguments`."""

    steps: int
    hidden_size: int
    layers: int
    length: int
    mask_fraction: float
    rope_theta: float
    options: dict[str, Any]


def build_model(name: str, tokenizer: Any, recipe: Recipe) -> MiniLLMForCausalLM:
    """A model with random weights. All have the same parameters: RoPE has none, on one axis or two."""
    variant: dict[str, Any] = {} if name == "causal" else {"attention_type": "prefix"}
    if name == "glm_blanks":
        variant["rope_2d"] = True
    hidden_size = recipe.hidden_size
    config = MiniLLMConfig.for_tokenizer(
        tokenizer,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=max(4, hidden_size // 64),
        # RoPE on two axes has half a head for each: heads narrower than this tell neighbours apart badly.
        head_dim=max(32, min(64, hidden_size // 4)),
        max_position_embeddings=recipe.length,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        qk_norm=True,
        attention_qkv_bias=True,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,
        **variant,
    )
    return MiniLLMForCausalLM(config)


def build_collator(name: str, tokenizer: Any, seed: int, mask_fraction: float) -> DocumentCollator:
    """One row a document, none packed with another."""
    if name == "causal":
        return DataCollatorForCausalLM(tokenizer, packing=False)
    options = {"mixture": MIXTURES[name], "mask_fraction": mask_fraction, "gmask_counts": True, "seed": seed}
    return DataCollatorForGLM(tokenizer, packing=False, **options)


def train(
    model: Any, collator: DocumentCollator, rows: Sequence[list[int]], seed: int, recipe: Recipe
) -> dict[str, float]:
    """Trains in the stock Trainer; what it cost."""
    counted, start, steps = Counted(collator), time.monotonic(), recipe.steps
    arguments = TrainingArguments(
        max_steps=steps,
        seed=seed,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        adam_beta2=0.98,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **recipe.options,
    )
    samples = [{"input_ids": ids} for ids in rows]
    Trainer(model, arguments, counted, samples, callbacks=[SetEpochCallback(collator)]).train()
    # The loader makes a batch more than are trained on.
    scored = sum(counted.scored[:steps])
    return {"steps": steps, "scored_tokens": scored, "seconds": round(time.monotonic() - start, 1)}


def measure(name: str, model: Any, tokenizer: Any, rows: Sequence[list[int]], fraction: float) -> dict[str, float]:
    """The figures of one model on held-out rows: those that its objective can give."""
    # All seeds are measured on the same blanks.
    blanks, words = draw_blanks(rows, fraction, seed=0), last_words(rows, tokenizer)
    if name == "glm_blanks":
        return measure_blanks(model, tokenizer, rows, blanks)
    if name == "glm_document":
        return measure_document(model, tokenizer, rows, words)
    pairs = zip(rows, blanks, strict=True)
    filled = score_rows(model, [causal_row(ids, blank.start, blank.stop) for ids, blank in pairs])
    word = score_rows(model, [causal_row(ids, start, len(ids)) for ids, start in words])
    text = score_rows(model, [causal_row(ids, 1, len(ids)) for ids in rows])
    single = filled.of_rows([blank.stop - blank.start == 1 for blank in blanks])
    return {
        "blank_perplexity": filled.perplexity,
        "blank_exact_length_known": filled.exact,
        "single_token_perplexity": single.perplexity,
        "single_token_exact_length_known": single.exact,
        "second_half_perplexity": text.part(slice(len(rows[0]) // 2 - 1, None)).perplexity,
        "row_perplexity": text.perplexity,
        "word_perplexity": word.perplexity,
        "word_exact_length_known": word.exact,
    }


def measure_blanks(model: Any, tokenizer: Any, rows: Sequence[list[int]], blanks: Sequence[Blank]) -> dict[str, float]:
    """Of the model that fills short blanks: with the text around them read in both directions, and in one."""
    figures = {}
    for bidirectional in (True, False):
        reading = "" if bidirectional else "_unidirectional"
        pairs = zip(rows, blanks, strict=True)
        inputs = [glm_row(ids, blank, tokenizer.mask_token_id, tokenizer, bidirectional) for ids, blank in pairs]
        scores = score_rows(model, inputs)
        known = score_rows(model, inputs, never=tokenizer.eop_token_id).part(slice(-1))
        figures |= {
            f"blank_perplexity{reading}": scores.part(slice(-1)).perplexity,
            f"blank_perplexity_length_known{reading}": known.perplexity,
            f"blank_exact{reading}": scores.exact,
            f"blank_exact_length_known{reading}": known.exact,
        }
        known = known.of_rows([blank.stop - blank.start == 1 for blank in blanks])
        figures |= {
            f"single_token_perplexity_length_known{reading}": known.perplexity,
            f"single_token_exact_length_known{reading}": known.exact,
        }
    return figures


def measure_document(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], words: Sequence[tuple[list[int], int]]
) -> dict[str, float]:
    """Of the model that goes on with texts: what comes before is read in both directions, or is part of what stands
    behind a lone `[gMASK]`, and so read from left to right (the two readings of the paper)."""
    half, never = len(rows[0]) // 2, tokenizer.eop_token_id
    second = score_rows(model, [rest_row(ids, half, tokenizer) for ids in rows]).part(slice(-1))
    # The causal model does not score a row's first token, having nothing to the left of it.
    text = score_rows(model, [rest_row(ids, 0, tokenizer) for ids in rows]).part(slice(1, -1))
    read = score_rows(model, [rest_row(ids, start, tokenizer) for ids, start in words], never=never).part(slice(-1))
    whole = score_rows(model, [rest_row(ids, 0, tokenizer) for ids, _ in words], never=never)
    one_way = Scores(*([row[start:-1] for row, (_, start) in zip(part, words, strict=True)] for part in whole))
    return {
        "second_half_perplexity": second.perplexity,
        "second_half_perplexity_unidirectional": text.part(slice(half - 1, None)).perplexity,
        "row_perplexity_unidirectional": text.perplexity,
        "word_perplexity": read.perplexity,
        "word_perplexity_unidirectional": one_way.perplexity,
        "word_exact_length_known": read.exact,
        "word_exact_length_known_unidirectional": one_way.exact,
    }


def run_seed(
    seed: int, tokenizer: Any, rows: Sequence[list[int]], held_out: Sequence[list[int]], recipe: Recipe
) -> dict[str, dict[str, float]]:
    """What each model cost and what it can do, from the same weights and rows."""
    run: dict[str, dict[str, float]] = {}
    for name in MODELS:
        set_seed(seed)
        model = build_model(name, tokenizer, recipe)
        cost = train(model, build_collator(name, tokenizer, seed, recipe.mask_fraction), rows, seed, recipe)
        figures = measure(name, model, tokenizer, held_out, recipe.mask_fraction)
        run[name] = {"parameters": model.num_parameters()} | cost | figures
        print(f"seed {seed}, {name}: {json.dumps(run[name])}", flush=True)
    return run


def environment() -> dict[str, Any]:
    versions = {"minillm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return versions | {"python": platform.python_version(), "device": device, "threads": torch.get_num_threads()}


def summarise(seeds: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample; None of one seed) of each figure of each model."""
    summary: dict[str, Any] = {}
    for name, figures in next(iter(seeds.values())).items():
        values = {figure: [run[name][figure] for run in seeds.values()] for figure in figures}
        summary[name] = {
            figure: {"mean": statistics.mean(own), "std": statistics.stdev(own) if len(own) > 1 else None}
            for figure, own in values.items()
        }
    return summary


def main(
    out: Annotated[Path, typer.Option(help="folder for results.json and glm-proof.png")] = Path("glm-proof"),
    corpus: Annotated[Path | None, typer.Option(help="text file or folder; left out: Python's own sources")] = None,
    steps: int = 6000,
    seeds: Annotated[int, typer.Option(help="how many; they are 0, 1, ...", min=1)] = 3,
    hidden_size: int = 64,
    layers: int = 2,
    length: Annotated[int, typer.Option(help="tokens in a row", min=16)] = 64,
    vocab_size: int = 272,
    batch_size: int = 64,
    learning_rate: float = 8e-3,
    mask_fraction: Annotated[float, typer.Option(help="part of a row's tokens that short blanks cover")] = 0.3,
    held_out: Annotated[int, typer.Option(help="rows to measure on, at most", min=1)] = 1800,
    rope_theta: Annotated[float, typer.Option(help="base of RoPE: short rows want short wave lengths")] = 10.0,
    bf16: Annotated[bool, typer.Option(help="train in bfloat16")] = False,
) -> None:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    train_texts, held_out_texts = ([item.text for item in part] for part in split_corpus(load_corpus(corpus)))
    tokenizer = MiniLLMTokenizer.train_from_iterator(train_texts, vocab_size=vocab_size, show_progress=False)
    rows, others = (cut_rows(part, tokenizer, length) for part in (train_texts, held_out_texts))
    others = [others[at] for at in np.random.default_rng(0).permutation(len(others))[:held_out]]
    words = len(last_words(others, tokenizer))
    singles = sum(blank.stop - blank.start == 1 for blank in draw_blanks(others, mask_fraction, seed=0))
    if not (rows and words and singles):
        found = f"{len(rows)} rows to train on; held out are {words} last words and {singles} blanks of one token"
        raise typer.BadParameter(f"{found}: a larger --corpus or --held-out is needed, or a smaller --length")
    out.mkdir(parents=True, exist_ok=True)
    options = {"output_dir": str(out), "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    recipe = Recipe(steps, hidden_size, layers, length, mask_fraction, rope_theta, options | {"bf16": bf16})
    results: dict[str, Any] = {
        "environment": environment(),
        "settings": settings,
        "rows": {"train": len(rows), "held_out": len(others), "with_last_word": words},
        "seeds": {},
    }
    for seed in range(seeds):
        results["seeds"][str(seed)] = run_seed(seed, tokenizer, rows, others, recipe)
        results["summary"] = summarise(results["seeds"])
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
        draw(out / "glm-proof.png", results["seeds"])


if __name__ == "__main__":
    typer.run(main)
