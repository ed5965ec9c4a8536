"""`--config`: a YAML or JSON file whose keys are the flags of a command; flags win over it, and it over defaults."""

from pathlib import Path
from typing import Any

import typer
import yaml

from minillm.cli.console import fail, one_line
from minillm.cli.field_values import as_text

PAIRS = "minillm.pairs"
"""Where a context keeps what the file says of options that take FIELD=VALUE pairs."""


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. ValueError where it holds none; OSError where it cannot be read."""
    try:
        values = yaml.safe_load(Path(file).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is neither YAML nor JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a mapping of options")
    return values


def flags_of(context: typer.Context) -> dict[str, Any]:
    """The parameters of a command by the names of their flags: `max_steps` is that of `--max-steps`."""
    found = {}
    for parameter in context.command.params:
        if not parameter.is_eager:
            name = next(flag for flag in parameter.opts if flag.startswith("--"))
            found[name.removeprefix("--").replace("-", "_")] = parameter
    return found


def take_file(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the options in a file the defaults of the command; the callback of an eager option.

    Keys are the names of flags, with `_` or `-`. An option that may be given several times takes a list; one of
    FIELD=VALUE pairs takes a mapping. Whatever is wrong ends the command with one line.
    """
    if file is None or context.resilient_parsing:
        return file
    try:
        values = {str(name).replace("-", "_"): value for name, value in read_mapping(file).items()}
        flags = flags_of(context)
        if unknown := sorted(set(values) - set(flags)):
            raise ValueError(f"unknown options {unknown} in {file}; allowed: {sorted(flags)}")
        given = {name: value for name, value in values.items() if value is not None}
        texts = {name: texts_of(context, flags[name], name, given[name]) for name in given}
        pairs = {name for name in texts if takes_pairs(flags[name])}
        context.meta[PAIRS] = {flags[name].name: texts[name] for name in pairs}
        context.default_map = {flags[name].name: texts[name] for name in texts if name not in pairs}
    except (ValueError, OSError) as error:
        fail(error)
    return file


def add_pairs(context: typer.Context, parameter: typer.CallbackParam, given: list[str] | None) -> list[str] | None:
    """FIELD=VALUE pairs of the file, and then those of the flags, which win field by field; a callback."""
    return [*context.meta.get(PAIRS, {}).get(parameter.name, []), *(given or [])] or None


def takes_pairs(parameter: Any) -> bool:
    return parameter.multiple and "=" in (parameter.metavar or "")


def texts_of(context: typer.Context, parameter: Any, name: str, value: Any) -> Any:
    """A value of the file as the text, or the texts, that the flag would have been given.

    Raises:
        ValueError: it is not of the option's type. YAML's own types count: `true` is no number, `"no"` no boolean.
    """
    if parameter.multiple:
        if isinstance(value, dict) and takes_pairs(parameter):
            return [f"{field}={as_text(item)}" for field, item in value.items()]
        items = value if isinstance(value, list) else [value]
        return [checked(context, parameter, name, item) for item in items]
    return checked(context, parameter, name, value)


def checked(context: typer.Context, parameter: Any, name: str, value: Any) -> Any:
    if isinstance(value, (dict, list)) or isinstance(value, bool) != parameter.is_flag:
        wanted = "true or false" if parameter.is_flag else "one value"
        raise ValueError(f"the option {name} is {value!r}; it must be {wanted}")
    if parameter.is_flag:
        return value
    text = str(value)
    try:
        parameter.process_value(context, [text] if parameter.multiple else text)
    except typer.BadParameter as error:
        raise ValueError(f"the option {name} is {value!r}: {one_line(error.message)}") from error
    return text
