"""What a report is made of: Markdown tables, pictures, figures as JSON, and facts of the machine.

The demo, the tokenizer report and the benchmarks write their reports with it. Every file appears when it is whole.
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.publishing.folders import new_file, write_atomically
from minillm.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown without a line break at its end; a `|` inside a cell is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    head, *lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


def number(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def amount(value: float, unit: str) -> str:
    """Seconds (`"s"`) or bytes (`"B"`) in a readable unit."""
    factor, name = next((scale for scale in SCALES[unit] if abs(value) >= scale[0]), SCALES[unit][-1])
    return f"{number(value / factor)} {name}"


def new_figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple["Figure", Any]:
    """A figure that needs no screen, and its axes [rows, columns].

    Args:
        size: width and height in inches.
        options: of matplotlib's `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_picture(path: Path, figure: "Figure") -> None:
    """Writes a figure as a picture of the kind that the name says."""
    with new_file(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."))


def write_figures(path: Path, figures: Any) -> None:
    """Writes numbers as JSON."""
    write_atomically(path, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: versions, system, cores and threads."""
    import numpy
    import tokenizers
    import torch
    import transformers

    return {
        "date": date.today().isoformat(),
        "minillm": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
