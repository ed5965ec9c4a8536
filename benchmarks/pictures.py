"""The figures of a measurement as pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.experiments.reporting import new_figure, save_picture

Result = dict[str, Any]

COLOURS = {
    "Llama": "tab:gray",
    "Bloom": "tab:brown",
    "causal": "tab:blue",
    "prefix": "tab:orange",
    "alibi": "tab:green",
}


def colour_of(name: str) -> str | None:
    return next((colour for word, colour in COLOURS.items() if word in name), None)


def draw_comparisons(path: Path, comparisons: list[Result]) -> None:
    """A panel for each thing that was timed: ratios with 95 % intervals, and targets as red marks."""
    whats = list(dict.fromkeys(row["what"] for row in comparisons))
    columns = min(2, len(whats))
    lines = -(-len(whats) // columns)
    longest = max(sum(row["what"] == what for row in comparisons) for what in whats)
    figure, axes = new_figure(lines, columns, size=(5.5 * columns, lines * (1.0 + 0.26 * longest)))
    for panel in axes.flat[len(whats) :]:
        panel.set_visible(False)
    for panel, what in zip(axes.flat, whats, strict=False):
        rows = [row for row in comparisons if row["what"] == what][::-1]
        for height, row in enumerate(rows):
            low, high = row["interval"]
            panel.plot([low, high], [height, height], color="tab:blue", linewidth=2, alpha=0.5)
            panel.plot([row["median"]], [height], "o", color="tab:blue", markersize=5)
            target = row["at_most"] if row["at_least"] is None else row["at_least"]
            if target is not None:
                panel.plot([target], [height], "|", color="tab:red", markersize=14, markeredgewidth=1.6, zorder=3)
        panel.axvline(1, color="gray", linewidth=0.8, zorder=0)
        panel.set_yticks(range(len(rows)), [f"{row['contender']} : {row['baseline']}" for row in rows], fontsize=8)
        panel.set_ylim(-0.6, len(rows) - 0.4)
        panel.set_title(what, fontsize=9)
        panel.set_xlabel(f"ratio of {rows[0]['quantity']}", fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", alpha=0.3)
    save_picture(path, figure)


def draw_memory(path: Path, rows: list[Result]) -> None:
    """A panel for each batch: bars of what a training step takes."""
    rows = [row for row in rows if row["unit"] == "B"]
    whats = list(dict.fromkeys(row["what"] for row in rows))
    figure, axes = new_figure(len(whats), 1, size=(6, 2.4 * len(whats)))
    for panel, what in zip(axes[:, 0], whats, strict=True):
        shown = [row for row in rows if row["what"] == what][::-1]
        bars = panel.barh(
            [row["contender"] for row in shown],
            [row["median"] / 1e9 for row in shown],
            color=[colour_of(row["contender"]) for row in shown],
        )
        panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        panel.margins(x=0.12)
        panel.set_xlabel("memory of a training step (GB)", fontsize=8)
        panel.set_title(what.rpartition(":")[0], fontsize=9)
    save_picture(path, figure)


def draw_axis(path: Path, axis: str, rows: list[Result]) -> None:
    """Time and peak memory along one axis, both scales logarithmic."""
    figure, axes = new_figure(1, 2, size=(9, 3.4))
    readings: tuple[tuple[str, Callable[[Result], float]], ...] = (
        ("seconds of a training step", lambda row: row["median"]),
        ("peak memory (GB)", lambda row: row["peak_bytes"] / 1e9),
    )
    for panel, (label, read) in zip(axes[0], readings, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [(row["value"], read(row)) for row in rows if row["contender"] == name]
            panel.plot(*zip(*points, strict=True), "o-", markersize=3.5, label=name, color=colour_of(name), alpha=0.85)
        values = sorted({row["value"] for row in rows})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.set_xlabel(axis)
        panel.set_title(label, fontsize=10)
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    save_picture(path, figure)


def activity_of(row: Result) -> str:
    """What was timed, without the sizes."""
    return row["what"].partition(",")[0]


def draw(out: Path, kind: str, result: Result) -> None:
    """The pictures of a kind into a folder; none where there is nothing to compare."""
    if kind == "growth":
        for axis in dict.fromkeys(row["what"] for row in result["rows"]):
            draw_axis(out / f"growth-{axis}.png", axis, [row for row in result["rows"] if row["what"] == axis])
    elif kind == "memory" and result["rows"]:
        draw_memory(out / "memory.png", result["rows"])
    elif kind == "speed":
        for activity in dict.fromkeys(activity_of(row) for row in result["comparisons"]):
            rows = [row for row in result["comparisons"] if activity_of(row) == activity]
            draw_comparisons(out / f"speed-{activity.replace(' ', '-')}.png", rows)
    elif result["comparisons"]:
        shown = result["comparisons"]
        if kind == "blocks" and any(row["baseline"].endswith("sdpa") for row in shown):
            # What changes, in one picture of a size to look at; the tables have the rest.
            shown = [row for row in shown if row["baseline"].endswith("sdpa") and row["what"].startswith("packed")]
        draw_comparisons(out / f"{kind}.png", shown)
