"""`minillm convert` and `minillm export --as`."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minillm.cli.config_settings import read_settings
from minillm.cli.console import console, say
from minillm.cli.publishing import export_model, torch_dtype
from minillm.conversion import convert, export


def run_convert(
    source: str, to: Path, family: str | None, dtype: str | None, settings: list[str], ignore_keys: list[str]
) -> None:
    """Writes the MiniLLM of another family's checkpoint.

    Raises:
        ValueError: a setting that is none, or what `minillm.conversion.convert` refuses.
    """
    overrides, kind = read_settings(settings), torch_dtype(dtype)
    with remarks_said(), progress_of("tensors") as told:
        convert(source, to, family, kind, ignore_keys=ignore_keys, progress=told, **overrides)
    say(f"written: {to}")


def run_export_as(
    model: str, out: Path, family: str, adapter: str | None, dtype: str | None, settings: list[str]
) -> None:
    """Writes a MiniLLM as a checkpoint of another family; an adapter is merged first.

    Raises:
        ValueError: as `run_convert`.
    """
    overrides, kind = read_settings(settings), torch_dtype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        if adapter is not None:
            export_model(model, Path(folder) / "merged", adapter, dtype)
            model = str(Path(folder) / "merged")
        with remarks_said(), progress_of("tensors") as told:
            export(model, out, family, kind, progress=told, **overrides)


class Said(logging.Handler):
    """Prints what a log is told as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def remarks_said() -> Iterator[None]:
    """Has the command print what conversion tells its log: whether logits were compared, what was left out."""
    logger, said = logging.getLogger("minillm.conversion"), Said()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(said)
        logger.setLevel(level)
        logger.propagate = propagates


@contextmanager
def progress_of(what: str) -> Iterator[Any]:
    """A bar on a terminal; a line for each tenth elsewhere."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                say(f"{what}: {done} of {total}")

        yield told
