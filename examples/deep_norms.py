"""Trains one deep, thin model with several norm placements, all else equal, and draws the losses.

python examples/deep_norms.py --out deep-norms
"""

import itertools
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer, __version__
from minillm.data import cut_document, load_corpus, split_corpus, tokenize_documents
from minillm.evaluation import BigramModel, UnigramModel, ngram_perplexity, perplexity
from minillm.training import DataCollatorForCausalLM, pack_dataset

# Weights of about hidden_size ** -0.5 keep a stream's size, as they do in large models: GLM-130B is so wide that there
# transformers' usual 0.02 is more than that. In a thin model 0.02 all but closes the branches.
VARIANTS: dict[str, dict[str, Any]] = {
    "post": {"norm_placement": "post"},
    "post-small": {"norm_placement": "post", "initializer_range": 0.02},
    "post-mlp": {"norm_placement": "post", "mlp_type": "mlp", "intermediate_size": None},  # not gated, as large
    "deepnorm": {"norm_placement": "deepnorm"},
    "pre": {"norm_placement": "pre"},
    "pre-small": {"norm_placement": "pre", "initializer_range": 0.02},
    "sandwich": {"norm_placement": "sandwich"},
}
BATCH_SIZE = 4
HELD_OUT_ROWS = 200


def prepare(corpus: Path | None, length: int, count: int) -> tuple[Any, Any, list, list]:
    """A tokenizer, its collator, up to `count` packed rows to train on, and rows that are held out."""
    split = split_corpus(load_corpus(corpus))
    texts = [document.text for document in split[0]]
    tokenizer = MiniLLMTokenizer.train_from_iterator(texts, vocab_size=512, show_progress=False)
    collator = DataCollatorForCausalLM(tokenizer, max_length=length)
    packed = []
    for documents, limit in zip(split, (count, HELD_OUT_ROWS), strict=True):
        # Parts in random order: a few long tables of numbers could fill the rows otherwise.
        parts = [part for document in documents for part in cut_document(document, 2000)]
        random.Random(0).shuffle(parts)
        packed.append(pack_dataset(tokenize_documents(parts[:limit], tokenizer), collator)[:limit])
    return tokenizer, collator, *packed


def train(config: MiniLLMConfig, rows: list, collator: Any, seed: int, **schedule: Any) -> tuple[Any, list]:
    """A fresh model after training, and its log: loss (the mean since the last entry) and gradient norm by step."""
    set_seed(seed)
    model = MiniLLMForCausalLM(config)
    arguments = TrainingArguments(
        per_device_train_batch_size=BATCH_SIZE,
        lr_scheduler_type="cosine",
        seed=seed,  # of the rows' order too
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is no number is to be seen
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **schedule,
    )
    trainer = Trainer(model, arguments, collator, rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, [{name: entry[name] for name in ("step", "loss", "grad_norm")} for entry in entries]


def draw(path: Path, runs: list[dict[str, Any]], levels: dict[str, float], title: str) -> None:
    """The mean training loss of each variant over the seeds, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for variant in dict.fromkeys(run["variant"] for run in runs):
        logs = [run["log"] for run in runs if run["variant"] == variant]
        steps = [entry["step"] for entry in logs[0]]
        losses = [[entry["loss"] for entry in of_step] for of_step in zip(*logs, strict=True)]
        (line,) = axes.plot(steps, [statistics.fmean(of_step) for of_step in losses], label=variant)
        bounds = [min(of_step) for of_step in losses], [max(of_step) for of_step in losses]
        axes.fill_between(steps, *bounds, color=line.get_color(), alpha=0.25, linewidth=0)
    for name, level in levels.items():
        axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each variant the held-out loss, mean and range over the seeds, and the mean norm of the first gradient."""
    summary = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        chosen = [run for run in runs if run["variant"] == variant]
        losses = [run["held_out_loss"] for run in chosen]
        summary[variant] = {
            "held_out_loss": statistics.fmean(losses),
            "lowest": min(losses),
            "highest": max(losses),
            "first_grad_norm": statistics.fmean(run["log"][0]["grad_norm"] for run in chosen),
        }
    return summary


def print_table(report: dict[str, Any]) -> None:
    """The figures as a table of Markdown."""
    print("| | held-out loss | lowest to highest | norm of the first gradient |\n|---|---|---|---|")
    for name, level in report["levels"].items():
        print(f"| {name} | {level:.2f} | | |")
    for name, row in report["summary"].items():
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f}"
        print(f"| {name} | {row['held_out_loss']:.2f} | {spread} | {row['first_grad_norm']:.2g} |")


def levels_of(rows: list, held_out: list, collator: Any, vocab_size: int) -> dict[str, float]:
    """The held-out loss of models that count: a network that learns no more than the tokens' frequencies stays at
    the first level."""
    counted = [row["input_ids"] for row in rows]
    kinds = {"unigram": UnigramModel, "bigram": BigramModel}
    return {name: ngram_perplexity(kind(counted, vocab_size), held_out, collator).nll for name, kind in kinds.items()}


def environment() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "minillm": __version__}
    system = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    return {"python": platform.python_version(), **versions, **system}


def main(
    out: Annotated[Path, typer.Option(help="folder for losses.json and losses.png")] = Path("deep-norms"),
    variants: Annotated[str, typer.Option(help=f"some of {', '.join(VARIANTS)}")] = "post,post-small,deepnorm,pre",
    seeds: Annotated[int, typer.Option(min=1, help="runs of each variant, with the seeds 0, 1, ...")] = 3,
    corpus: Annotated[Path | None, typer.Option(help="text file or folder; left out: Python's own sources")] = None,
    steps: int = 300,
    layers: int = 48,
    hidden_size: int = 48,
    length: int = 128,
    learning_rate: float = 2e-3,
    warmup: Annotated[int | None, typer.Option(help="steps; left out: a twentieth of them")] = None,
) -> None:
    names = variants.split(",")
    if not set(names) <= set(VARIANTS):
        raise typer.BadParameter(f"{variants}: choose from {', '.join(VARIANTS)}", param_hint="--variants")
    tokenizer, collator, rows, held_out = prepare(corpus, length, steps * BATCH_SIZE)
    shape = {
        "norm_type": "layernorm",
        "hidden_act": "gelu",  # GeGLU, since feed-forwards are gated unless told otherwise
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": hidden_size**-0.5,
    }
    schedule = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": steps // 20 if warmup is None else warmup,
        "logging_steps": max(1, steps // 30),
    }
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed, name in itertools.product(range(seeds), names):
        config = MiniLLMConfig(**{**shape, **VARIANTS[name]})
        started = time.monotonic()
        model, log = train(config, rows, collator, seed, output_dir=str(out), **schedule)
        seconds = round(time.monotonic() - started, 1)
        loss = perplexity(model, held_out, collator).nll
        runs.append({"variant": name, "seed": seed, "held_out_loss": loss, "seconds": seconds, "log": log})
        print(f"{name}, seed {seed}: held-out loss {loss:.3f}, trained in {seconds:.0f} s", flush=True)

    levels = levels_of(rows, held_out, collator, len(tokenizer))
    report = {"environment": environment(), "settings": {**shape, **schedule}, "levels": levels}
    report |= {"summary": summarise(runs), "runs": runs}
    (out / "losses.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    title = f"{layers} layers of width {hidden_size}, learning rate {learning_rate:g}, seeds: {seeds}"
    draw(out / "losses.png", runs, levels, title)
    print_table(report)


if __name__ == "__main__":
    typer.run(main)
