"""`minillm tokenizer report` and `minillm tokenizer extend`."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minillm.cli.console import console, say
from minillm.cli.loading import load_model, load_pretrained
from minillm.cli.training_model import FIRST_NEW
from minillm.data import TextDocument, load_corpus
from minillm.experiments.reporting import markdown_table, new_figure, save_picture, write_figures
from minillm.publishing.folders import new_folder, reserved, write_atomically
from minillm.tokenization import FertilityReport, extend_vocabulary, measure_fertility

FERTILITY_COLUMNS = (
    "text",
    "tokenizer",
    "tokens",
    "characters",
    "words",
    "tokens per character",
    "tokens per word",
    "bytes per token",
    "unknown",
    "bytes alone",
)
TITLE = "# Tokenizer report"
VOCABULARY_COLUMNS = ("tokenizer", "vocabulary", "pieces", "used", "share used", "never used", "rare")


def run_report(
    tokenizer_name: str, corpus: list[Path], out: Path | None, compare: str | None, rare_below: int
) -> list[FertilityReport]:
    """Prints how well one or two tokenizers fit a corpus; with `out` writes report.md, report.json and report.png.

    Raises:
        ValueError, OSError: no tokenizer, no text, or an `out` that cannot be written.
    """
    if out is not None:
        require_free_of_reports(out)
    names = [tokenizer_name] if compare is None else [tokenizer_name, compare]
    tokenizers = [load_fast_tokenizer(name) for name in names]
    documents = read_corpus(corpus)
    reports = [
        measure_fertility(tokenizer, documents, name=name, rare_below=rare_below)
        for tokenizer, name in zip(tokenizers, names, strict=True)
    ]
    for columns, rows in (
        (FERTILITY_COLUMNS, fertility_rows(reports)),
        (VOCABULARY_COLUMNS, vocabulary_rows(reports)),
    ):
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    if out is not None:
        with reserved(out):
            write_files(out, reports, corpus)
        say(f"report: {out / 'report.md'}")
    return reports


def require_free_of_reports(out: Path) -> None:
    """Checks that a report replaces nothing but an older one. ValueError if it would."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: choose a folder")
    page = out / "report.md"
    if page.exists() and not page.read_text("utf-8", errors="replace").startswith(TITLE):
        raise ValueError(f"{page} is no report on a tokenizer and is never replaced: choose another --out")
    if not page.exists() and (found := [name for name in ("report.json", "report.png") if (out / name).exists()]):
        raise ValueError(f"{out / found[0]} stands there without a report.md: choose another --out")


def run_extension(tokenizer_name: str, corpus: list[Path], number: int, out: Path, model_name: str | None) -> None:
    """Learns new tokens from a corpus and writes the larger tokenizer, with the resized model if one is given.

    Raises:
        ValueError, OSError: no tokenizer, model or text, a model that does not belong to
            the tokenizer, or a tokenizer that cannot be extended.
    """
    tokenizer = load_fast_tokenizer(tokenizer_name)
    model = None if model_name is None else load_model_of(tokenizer, tokenizer_name, model_name)
    texts = [document.text for document in read_corpus(corpus)]
    extended = extend_vocabulary(tokenizer, texts, num_new_tokens=number)
    if model is not None:
        from minillm.training import resize_for_vocabulary

        resize_for_vocabulary(model, tokenizer, extended)
    # For `minillm train --train-new-tokens`.
    extended.init_kwargs[FIRST_NEW] = 1 + max(tokenizer.get_vocab().values())
    with new_folder(out) as folder:
        if model is not None:
            model.save_pretrained(folder)
        extended.save_pretrained(folder)
    what = "tokens" if model is None else "tokens and a model with rows for them"
    say(f"{len(extended)} {what} in {out} ({len(extended) - len(tokenizer)} new)")


def load_fast_tokenizer(name: str) -> PreTrainedTokenizerFast:
    tokenizer = load_pretrained(AutoTokenizer, name, "tokenizer")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{name} holds a {type(tokenizer).__name__}; a tokenizer with a tokenizer.json is needed")
    return tokenizer


def load_model_of(tokenizer: PreTrainedTokenizerFast, tokenizer_name: str, name: str) -> Any:
    model = load_model(name, dtype="auto")
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(f"{tokenizer_name} has ids up to {highest}, the embedding of {name} only {rows} rows")
    return model


def read_corpus(paths: list[Path]) -> list[TextDocument]:
    return [document for path in paths for document in load_corpus(path)]


def share(value: float | None, form: str) -> str:
    """A rate, or a dash where there is nothing to count."""
    return "–" if value is None else format(value, form)


def fertility_rows(reports: list[FertilityReport]) -> list[list[str]]:
    """Rows under `FERTILITY_COLUMNS`: each language, and all of them, by each tokenizer."""
    rows = []
    for bucket in [*reports[0].buckets, "all"]:
        for report in reports:
            counts = report.total if bucket == "all" else report.buckets[bucket]
            rates = counts.rates()
            quotients = [rates[name] for name in ("tokens_per_character", "tokens_per_word", "bytes_per_token")]
            shares = [rates[name] for name in ("unknown_rate", "byte_rate")]
            rows.append(
                [bucket, report.name]
                + [f"{value:,}" for value in (counts.tokens, counts.characters, counts.words)]
                + [share(value, ".3f") for value in quotients]
                + [share(value, ".2%") for value in shares]
            )
    return rows


def vocabulary_rows(reports: list[FertilityReport]) -> list[list[str]]:
    """Rows under `VOCABULARY_COLUMNS`."""
    uses = [(report.name, report.vocabulary) for report in reports]
    return [
        [name, f"{use.size:,}", f"{use.pieces:,}", f"{use.used:,}", share(use.share_used, ".1%"), f"{use.never:,}"]
        + [f"{use.rare:,} (below {use.threshold})"]
        for name, use in uses
    ]


def write_files(out: Path, reports: list[FertilityReport], corpus: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # First, since it says whose the other files are.
    write_atomically(out / "report.md", markdown(reports, corpus))
    draw(out / "report.png", reports)
    figures = {"corpus": [str(path) for path in corpus], "tokenizers": [report.to_dict() for report in reports]}
    write_figures(out / "report.json", figures)


def markdown(reports: list[FertilityReport], corpus: list[Path]) -> str:
    lines = [TITLE, "", f"Corpus: {', '.join(f'`{path}`' for path in corpus)}.", ""]
    lines += [markdown_table(FERTILITY_COLUMNS, fertility_rows(reports)), ""]
    lines += [
        "Languages are told apart line by line, by letters; code by the names of files. A word is what stands",
        "between blanks and holds a letter or digit, and each Chinese character. *Bytes alone*: tokens that hold a",
        "byte of byte fallback or a part of a character.",
        "",
        "![tokens per character, and how often each piece is used](report.png)",
        "",
        "## Vocabulary",
        "",
        markdown_table(VOCABULARY_COLUMNS, vocabulary_rows(reports)),
        "",
        "Special and added tokens and single bytes are not among the pieces.",
        "",
    ]
    for report in reports:
        rarest = [f"{times:>8}  {json.dumps(text, ensure_ascii=False)}" for _, text, times in report.vocabulary.rarest]
        lines += [f"The rarest pieces of `{report.name}`, with how often they occur:", ""]
        lines += ["~~~text", *(line.replace("~~~", "~ ~ ~") for line in rarest), "~~~", ""]
    return "\n".join(lines)


def draw(path: Path, reports: list[FertilityReport]) -> None:
    """Tokens per character of each language, and how often the pieces are used, the most frequent first."""
    figure, axes = new_figure(columns=2, size=(10, 4))
    bars, curve = axes[0]
    width = 0.8 / len(reports)
    buckets = [*reports[0].buckets, "all"]
    for index, report in enumerate(reports):
        counts = [*report.buckets.values(), report.total]
        heights = [one.rates()["tokens_per_character"] for one in counts]
        drawn = bars.bar([place + index * width for place in range(len(buckets))], heights, width, label=report.name)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
        used = [times for times in report.vocabulary.frequencies if times]
        curve.loglog(range(1, len(used) + 1), used, label=report.name)
    bars.set_xticks([place + 0.4 - width / 2 for place in range(len(buckets))], buckets)
    bars.set(ylabel="tokens per character", title="Fertility")
    curve.set(xlabel="piece, by frequency", ylabel="occurrences", title="Use of the vocabulary")
    curve.grid(alpha=0.3)
    bars.legend(fontsize=8)
    save_picture(path, figure)
