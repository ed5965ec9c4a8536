"""Writes docs/command_line.md, the page of all commands with their options and defaults, from the commands themselves.

python -m minillm.cli.command_page docs/command_line.md
"""

import sys
from pathlib import Path
from typing import Any

import typer

from minillm.cli.main import app

HEAD = """# The command line

`minillm` and `python -m minillm` are the same. This page is written by `python -m minillm.cli.command_page`: what
stands here is what `--help` says.
"""


def page() -> str:
    """The page in Markdown."""
    command: Any = typer.main.get_command(app)
    parts = [HEAD]
    for name, own in command.commands.items():
        parts += [section(f"minillm {name}", own)]
        parts += [section(f"minillm {name} {inner}", below) for inner, below in getattr(own, "commands", {}).items()]
    return "\n".join(parts)


def section(name: str, command: Any) -> str:
    """A command: what it does, and a table of its arguments and options."""
    lines = [f"## {name}", "", (command.help or "").strip(), ""]
    if getattr(command, "commands", None):
        return "\n".join(lines)
    context = typer.Context(command, info_name=name)
    rows = [
        (f"`{', '.join(names)}`", said)
        for names, said in (described(parameter, context) for parameter in command.params)
        if names
    ]
    return "\n".join([*lines, "| | |", "|---|---|", *(f"| {flag} | {said} |" for flag, said in rows), ""])


def described(parameter: Any, context: typer.Context) -> tuple[list[str], str]:
    """The names of a parameter, and what the help says of it."""
    flags = [flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("--")]
    if parameter.param_type_name == "argument":
        flags = [parameter.name.upper()]
    record = parameter.get_help_record(context)
    words = [part.strip() for part in (record[1] if record else "").split("  ") if part.strip()]
    return flags, " ".join(words).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
