"""FIELD=VALUE pairs of the commands, read by the types of the fields that they name."""

import contextlib
import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

NOTHING = ("none", "null")
TRUTH = {"true": True, "false": False}


def read_pairs(pairs: Iterable[str], flag: str, hints: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The values of FIELD=VALUE pairs in the types of their fields; of two for one field the last counts.

    Args:
        pairs: such as `"hidden_size=64"`.
        flag: the flag that they were given with, for messages.
        hints: the type of each field that may be named.
        owner: whose fields these are, in words.

    Raises:
        ValueError: a pair without `=`, an unknown field, or a value of another type; the message names it.
    """
    found = {}
    for pair in pairs:
        name, mark, text = pair.partition("=")
        if not mark:
            raise ValueError(f"{flag} {pair!r} must be FIELD=VALUE with a field of {owner}")
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            raise ValueError(
                f"{flag} {pair!r} must be FIELD=VALUE with a field of {owner}; {name!r} is none"
                + (f": did you mean {close[0]!r}?" if close else "")
            )
        try:
            found[name] = read_value(text, hints[name])
        except ValueError:
            raise ValueError(f"{flag} {pair!r}: {name} must be {words_of(hints[name])}") from None
    return found


def read_value(text: str, hint: Any) -> Any:
    """A text as a value of a type: numbers in Python's spelling, lists and mappings in YAML's or JSON's, `none`.

    Raises:
        ValueError: it is none of the type.
    """
    for kind in sorted(kinds_of(hint), key=rank):
        with contextlib.suppress(ValueError):
            return read_kind(text, kind)
    raise ValueError(f"{text!r} is not {words_of(hint)}")


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a union joins; a type that is none, alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def rank(kind: Any) -> int:
    """Text comes last, since it takes everything, and whole numbers come before others."""
    order = (type(None), bool, int, float)
    return 9 if kind in (str, Any) else order.index(kind) if kind in order else len(order)


def read_kind(text: str, kind: Any) -> Any:
    if kind in (str, Any):
        return text
    if kind is type(None):
        return one_of(text.lower(), dict.fromkeys(NOTHING))
    if kind is bool:
        return one_of(text.lower(), TRUTH)
    if get_origin(kind) is Literal:
        return one_of(text, {str(value): value for value in get_args(kind)})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(text)
    if kind in (int, float):
        return finite(kind(text))
    return read_structure(text, kind)


def one_of(text: str, values: Mapping[str, Any]) -> Any:
    if text not in values:
        raise ValueError(text)
    return values[text]


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(value)
    return value


def read_structure(text: str, kind: Any) -> Any:
    """A list or a mapping; of a list the items are read by their type."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error
    outer = get_origin(kind) or kind
    if not isinstance(outer, type) or not isinstance(found, outer):
        raise ValueError(text)
    inner = get_args(kind)
    if outer is list and inner:
        return [read_value(as_text(item), inner[0]) for item in found]
    return found


def as_text(value: Any) -> str:
    """A value from a file as the text of a flag."""
    return value if isinstance(value, str) else json.dumps(value)


def words_of(hint: Any) -> str:
    """A type in words, for a message."""
    return " or ".join(words_of_kind(kind) for kind in kinds_of(hint))


def words_of_kind(kind: Any) -> str:
    if kind is type(None):
        return "none"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(str(member.value) for member in kind)
    return str(kind) if get_args(kind) else getattr(kind, "__name__", str(kind))
