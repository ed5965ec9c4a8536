"""What the commands share: the console, one-line errors, extras and atomic writing."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)

EXTRAS = {"train": ("datasets", "matplotlib"), "eval": ("lm_eval",)}
"""Packages of an optional extra, by import name."""


def require_extra(extra: str) -> None:
    """Ends the command, before any work, if a package of an extra is missing; prints the one line that installs it."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{' and '.join(missing)} missing. Install: pip install 'minillm-hf[{extra}]'")


def fail(message: object, code: int = 1) -> None:
    """Prints one line of error and ends the command with `code`."""
    errors.print(f"[bold red]error:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the errors that a user can mend into one line without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        errors.print("interrupted: what was saved stays; the same command goes on from there")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `target` only when all of it is written."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half-written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
