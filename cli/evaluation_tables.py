"""What `minillm evaluate` shows on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from minillm.cli.console import console, say


def show(figures: dict[str, Any], names: Sequence[str]) -> None:
    """The tables on the terminal."""
    models, compared = figures["models"], figures.get("compared", {})
    if models[0]["data"] is not None:
        console.print(data_table([model["data"] for model in models], compared.get("data"), names))
    if models[0]["items"] is not None:
        for name, model in zip(names, models, strict=True):
            console.print(items_table(model["items"], name))
            say_of_items(name, model["items"])
        if compared:
            console.print(difference_table(compared["items"], names))
    if models[0]["tasks"] is not None:
        console.print(tasks_table([model["tasks"] for model in models], names))


def data_table(models: Sequence[Mapping[str, Any]], compared: Mapping[str, Any] | None, names: Sequence[str]) -> Table:
    table = Table("", *names, *(["difference"] if compared else []), title="text")
    change = [interval(compared["bits_per_byte"], "+.4f")] if compared else []
    table.add_row("bits per byte", *(interval(model["bits_per_byte"], ".4f") for model in models), *change)
    table.add_row("perplexity", *(interval(model["perplexity"], ".2f") for model in models))
    for row in ("documents", "bytes", "tokens"):
        table.add_row(row, *(f"{model[f'num_{row}']:,}" for model in models))
    return table


def items_table(figures: Mapping[str, Any], name: str) -> Table:
    columns = ("chance", "macro", "items", "ties", "unparsed")
    table = Table("way", "accuracy", *columns, title=f"{name}: items")
    for way, own in figures["ways"].items():
        shares = [optional(own[column]) for column in columns[:2]]
        table.add_row(way, interval(own["accuracy"], ".3f"), *shares, *(str(own[column]) for column in columns[2:]))
    return table


def difference_table(compared: Mapping[str, Any], names: Sequence[str]) -> Table:
    table = Table("way", "difference", "gained", "lost", title=f"{names[0]} less {names[1]}: accuracy")
    for way, own in compared["ways"].items():
        table.add_row(way, interval(own["difference"], "+.3f"), str(own["gained"]), str(own["lost"]))
    return table


def say_of_items(name: str, figures: Mapping[str, Any]) -> None:
    """Beside accuracies: gold bits per byte, position bias, and how far the ways agree."""
    if "gold_bits_per_byte" in figures:
        say(f"{name}: bits per byte of the right options {interval(figures['gold_bits_per_byte'], '.3f')}")
    if "letters" in figures:
        shares = ", ".join(f"{letter} {share:.2f}" for letter, share in figures["letters"]["position_share"].items())
        say(f"{name}: letters chosen, of {figures['letters']['orders']} orders: {shares}")
    pairs = figures["agreement"]
    ways = [way for way in figures["ways"] if any(way in pair.split(" / ") for pair in pairs)]
    if not pairs:
        return
    title = f"{name}: same choice, as a share of items (above) and as Cohen's kappa (below)"
    table = Table("", *map(str, range(1, len(ways) + 1)), title=title)
    for row, one in enumerate(ways):
        cells = []
        for column, other in enumerate(ways):
            found = pairs.get(f"{one} / {other}") or pairs.get(f"{other} / {one}") or {}
            cells.append(optional(found.get("share" if column > row else "kappa"), ".2f"))
        table.add_row(f"{row + 1} {one}", *cells)
    console.print(table)


def tasks_table(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    table = Table("task", "metric", *names, title="lm-evaluation-harness")
    for task, metrics in models[0].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "_stderr," not in metric:
                table.add_row(
                    task, metric.removesuffix(",none"), *(with_error(model[task], metric) for model in models)
                )
    return table


def with_error(metrics: Mapping[str, Any], metric: str) -> str:
    name, _, kind = metric.partition(",")
    error = metrics.get(f"{name}_stderr,{kind}")
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def interval(figures: Mapping[str, float], form: str) -> str:
    return f"{figures['value']:{form}} [{figures['low']:{form}}, {figures['high']:{form}}]"


def optional(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else f"{value:{form}}"
