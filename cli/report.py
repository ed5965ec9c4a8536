"""The demo's report: a picture of the losses, a page of Markdown, and the same figures as JSON."""

from pathlib import Path
from typing import Any

from rich.table import Table

from minillm.cli.console import console, say
from minillm.experiments.reporting import markdown_table, new_figure, save_picture, write_figures
from minillm.publishing.folders import write_atomically

COLUMNS = ("model", "held-out perplexity", "tokens scored")


def write_report(
    out: Path, report: dict[str, Any], texts: dict[str, list[str]], settings: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Writes `loss.png`, `report.md` and `report.json` into `out`, prints the table and returns the JSON's figures."""
    curves = {name: result["curve"] for name, result in {**report["variants"], "lora": report["lora"]}.items()}
    draw_curves(out / "loss.png", curves)
    figures = {
        "baselines": report["baselines"],
        "variants": {name: without_curve(result) for name, result in report["variants"].items()},
        "lora": without_curve(report["lora"]),
        "settings": settings,
    }
    write_figures(out / "report.json", figures)
    rows = table_rows(figures)
    write_atomically(out / "report.md", markdown(rows, figures["lora"], texts, settings, seconds))
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    say(f"report: {out / 'report.md'}")
    return figures


def without_curve(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "curve"}


def table_rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    baselines, variants = figures["baselines"], figures["variants"]
    rows = [
        (f"{kind} baseline", f"{baselines[kind]:.2f}", f"{baselines['tokens']:,}") for kind in ("unigram", "bigram")
    ]
    rows += [
        (name, f"{variants[name]['perplexity']:.2f}", f"{variants[name]['tokens']:,}")
        for name in variants
        if name != "prefix"
    ]
    after = baselines["prefix"]
    rows += [
        (f"{kind} baseline, after the prefix", f"{after[kind]:.2f}", f"{after['tokens']:,}")
        for kind in ("unigram", "bigram")
    ]
    prefix = variants["prefix"]
    return [*rows, ("prefix, after the prefix", f"{prefix['perplexity']:.2f}", f"{prefix['tokens']:,}")]


def markdown(
    rows: list[tuple[str, str, str]],
    lora: dict[str, Any],
    texts: dict[str, list[str]],
    settings: dict[str, Any],
    seconds: float,
) -> str:
    named = {**settings, "corpus": settings["corpus"] or "Python's standard library"}
    lines = [
        "# MiniLLM demo",
        "",
        f"Settings: {', '.join(f'{key} {value}' for key, value in named.items())}. It took {seconds:.0f} s.",
        "",
        markdown_table(COLUMNS, rows),
        "",
        "A prefix model sees its prefix in both directions, so only tokens after the prefix are scored; the baselines",
        "beside it score the same tokens.",
        "",
        f"LoRA on {lora['text']} takes the causal model's perplexity on held-out text of that kind from "
        f"{lora['perplexity_before']:.2f} to {lora['perplexity_after']:.2f} ({lora['tokens']:,} tokens).",
        "",
        "![training loss](loss.png)",
        "",
        "## Text",
        "",
        "Greedy with a repetition penalty, by a process in which MiniLLM is not installed.",
        "",
    ]
    for name, generated in texts.items():
        for text in generated:
            lines += [f"`{name}`", "", "```text", text.replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def draw_curves(path: Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Loss against step, one line a model."""
    figure, ((axes,),) = new_figure(size=(7, 4))
    for name, points in curves.items():
        axes.plot([step for step, _ in points], [loss for _, loss in points], label=name)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="MiniLLM demo")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(path, figure)
