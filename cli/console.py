"""What the commands share: the console, one-line errors and extras."""

import contextlib
import importlib.util
import logging as standard_logging
import warnings
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)

EXTRAS = {"train": ("datasets", "matplotlib", "zstandard"), "eval": ("lm_eval",)}
"""Packages of an optional extra, by import name."""

# The Trainer's: checkpoints are ordered by number, a tied head stands under the embedding's name, and a run that was
# made longer saves at other steps. The last is the title of a table of weights that do not fit, which the commands
# refuse in one line.
REMARKS = (
    "mtime may not be reliable",
    "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
    "The following arguments do not match the ones in the `trainer_state.json`",
    " LOAD REPORT",
)

QUIETED = ("trainer", "trainer_utils", "modeling_utils", "integrations.peft")
"""Modules of transformers that make such remarks."""


def say(text: object) -> None:
    """Prints a line as it is: no markup, no emoji codes, no breaks inside paths and addresses."""
    console.print(str(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def require_extra(extra: str) -> None:
    """Ends the command, before any work, if a package of an extra is missing; prints the one line that installs it."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{' and '.join(missing)} missing. Install: pip install 'minillm-hf[{extra}]'")


def one_line(error: object) -> str:
    """A message without line breaks; the kind of an error that has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: object, code: int = 1) -> None:
    """Prints one line of error and ends the command with `code`."""
    errors.print(f"[bold red]error:[/] {escape(one_line(message))}", emoji=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def warn(message: object) -> None:
    """Prints one line of warning beside the command's own output."""
    errors.print(f"[bold yellow]warning:[/] {escape(one_line(message))}", emoji=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def one_line_errors(resumes: bool = False) -> Iterator[None]:
    """Turns the errors that a user can mend into one line without a traceback, and keeps libraries quiet.

    Args:
        resumes: the same command, given again after an interruption, goes on with what was saved.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_libraries():
            yield
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        fail(error)
    except KeyboardInterrupt:
        hint = ": what was saved stays; the same command goes on from there" if resumes else ""
        errors.print(f"interrupted{hint}", soft_wrap=True)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars of transformers between the command's own lines, and no remarks that are meant for programmers."""
    from minillm.training.put_back import without_bars

    loggers = [standard_logging.getLogger(f"transformers.{name}") for name in QUIETED]
    # Downloads and uploads take long enough to be watched.
    with warnings.catch_warnings(), without_bars(hub=True):
        warnings.simplefilter("ignore", FutureWarning)
        for logger in loggers:
            logger.addFilter(is_news)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(is_news)


def is_news(record: standard_logging.LogRecord) -> bool:
    """Whether a line of the log tells the user of a command anything."""
    message = record.getMessage()
    return not any(remark in message for remark in REMARKS)
