"""What a measurement leaves behind: tables in Markdown, the same figures as JSON beside facts of the environment.

    python -m benchmarks.report

writes the tables of the committed results into docs/performance.md.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.pictures import draw
from benchmarks.timing import Options
from minillm.experiments.reporting import amount, environment, markdown_table, number

Result = dict[str, Any]

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- results: (\w+) -->\n(.*?)<!-- end -->", re.S)


def load_average() -> list[float] | None:
    """Processes that want to run, over 1, 5 and 15 minutes: above the number of cores, times are disturbed."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def facts(options: Options) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    found = environment() | {
        "device": "cpu",
        "clock": options.clock,
        "steps": options.steps,
        "tiny": options.tiny,
        "load_before": load_average(),
    }
    if options.device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "clock": "CUDA events"}
    return found


def comparison_table(comparisons: list[Result]) -> str:
    """Ratios with their intervals, and whether a target is met."""
    rows = []
    for row in comparisons:
        bounds = (("≥", row["at_least"]), ("≤", row["at_most"]))
        target = ", ".join(f"{sign} {bound:.2f}" for sign, bound in bounds if bound is not None)
        low, high = row["interval"]
        ratio = f"{number(row['median'])} ({number(low)} to {number(high)})"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        rows.append((row["what"], row["contender"], row["baseline"], row["quantity"], ratio, target, met))
    return markdown_table(
        ("what", "contender", "against", "ratio of", "median (95 % interval)", "target", "met"), rows
    )


def row_table(rows: list[Result]) -> str:
    """Medians, their intervals and the spread of each contender."""
    lines = []
    for row in rows:
        unit, (low, high), (least, greatest) = row["unit"], row["interval"], row["spread"]
        interval, spread = (f"{amount(a, unit)} to {amount(b, unit)}" for a, b in ((low, high), (least, greatest)))
        speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        lines.append((row["what"], row["contender"], amount(row["median"], unit), interval, spread, speed))
    return markdown_table(("what", "contender", "median", "95 % interval", "spread", "tokens/s"), lines)


def speed_table(rows: list[Result]) -> str:
    """Tokens per second: a row a contender, a column for each thing that was timed."""
    points = {(row["contender"], row["what"]): f"{row['tokens_per_second']:,.0f}" for row in rows}
    names, whats = (tuple(dict.fromkeys(key[index] for key in points)) for index in (0, 1))
    lines = [(name, *(points.get((name, what), "") for what in whats)) for name in names]
    return markdown_table(("tokens per second", *whats), lines)


def growth_tables(rows: list[Result]) -> str:
    """One table an axis: time and peak memory, a row a value, a column a contender."""
    parts = []
    for axis in dict.fromkeys(row["what"] for row in rows):
        points = {(row["value"], row["contender"]): row for row in rows if row["what"] == axis}
        values, names = (list(dict.fromkeys(key[index] for key in points)) for index in (0, 1))
        lines = []
        for value in values:
            cells = (points.get((value, name)) for name in names)
            texts = ("" if p is None else f"{amount(p['median'], 's')}, {amount(p['peak_bytes'], 'B')}" for p in cells)
            lines.append((f"{value:,}", *texts))
        parts.append(markdown_table((axis, *names), lines))
    return "\n\n".join(parts)


def markdown(kind: str, result: Result, brief: bool = False) -> str:
    """The tables of a kind; in brief, speeds without spreads."""
    rows = result["rows"]
    parts = [comparison_table(result["comparisons"])] if result["comparisons"] else []
    if rows:
        in_columns = brief and all("tokens_per_second" in row for row in rows)
        parts.append((growth_tables if kind == "growth" else speed_table if in_columns else row_table)(rows))
    if result["not_measured"]:
        lines = [", ".join(f"{value}" for value in lacking.values()) for lacking in result["not_measured"]]
        parts.append("\n".join(["Not measured:", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def write(out: Path, kind: str, result: Result) -> None:
    """`KIND.json`, `KIND.md` and pictures into a folder, which is made if need be."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{kind}.json").write_text(json.dumps({"kind": kind, **result}, indent=1) + "\n", "utf-8")
    (out / f"{kind}.md").write_text(markdown(kind, result), "utf-8")
    draw(out, kind, result)


def fill_page(page: Path, results: Path) -> None:
    """Puts the tables of `results` between the marks `<!-- results: KIND -->` and `<!-- end -->` of a page."""

    def filled(mark: re.Match) -> str:
        result = json.loads((results / f"{mark[1]}.json").read_text("utf-8"))
        return f"<!-- results: {mark[1]} -->\n{markdown(mark[1], result, brief=True)}<!-- end -->"

    page.write_text(re.sub(MARKED, filled, page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    fill_page(ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results")
