"""Whether a generated answer is right: the whole of it, a part of it, the option or the number that it names."""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from minillm.evaluation.items import Item

NUMBER = re.compile(r"(?<![\d.])[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+]?\d+(?:\.\d+)?")


class Verdict(NamedTuple):
    """How a generated answer to an item is judged.

    Attributes:
        text: the answer as it was written.
        exact: whether all of it is an accepted answer.
        contains: whether an accepted answer stands in it.
        chosen: index of the option that it names; None if it names none, or the item has none.
        number: whether the last number in it is the accepted one; None if the item asks for no number.
        has_number: whether there is a number in it.
    """

    text: str
    exact: bool
    contains: bool
    chosen: int | None
    number: bool | None
    has_number: bool


def normalize_answer(text: str) -> str:
    """NFKC, without case, and without blanks around it."""
    return unicodedata.normalize("NFKC", text).casefold().strip()


def judge_answer(item: Item, text: str) -> Verdict:
    """Compares a generated answer with an item's options and accepted answers, all normalized."""
    answer = normalize_answer(text)
    accepted = [normalize_answer(each) for each in item.answers]
    numbers = [read_number(each) for each in accepted]
    written = last_number(answer)
    return Verdict(
        text=text,
        exact=answer in accepted,
        contains=any(place_of(each, answer) is not None for each in accepted),
        chosen=named_option(item.options, answer),
        number=None if None in numbers else written in numbers,
        has_number=written is not None,
    )


def place_of(part: str, answer: str) -> int | None:
    """Where a text stands in another, as words of their own where it begins or ends with an ASCII letter or digit."""
    before = r"(?<![^\W_])" if re.match(r"[a-z0-9]", part) else ""
    after = r"(?![^\W_])" if re.search(r"[a-z0-9]$", part) else ""
    found = re.search(before + re.escape(part) + after, answer)
    return None if found is None else found.start()


def named_option(options: Sequence[str], answer: str) -> int | None:
    """The option that an answer names: the one that it is, else the first in it, the longest of several that begin at
    one place."""
    texts = [normalize_answer(option) for option in options]
    if answer in texts:
        return texts.index(answer)
    places = [(place_of(text, answer), -len(text), index) for index, text in enumerate(texts)]
    found = [each for each in places if each[0] is not None]
    return min(found)[2] if found else None


def read_number(text: str) -> Decimal | None:
    """The number that a normalized text is; None if it is none."""
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def last_number(text: str) -> Decimal | None:
    """The last number in a normalized text. A sign behind a digit or letter is one of subtraction, or a hyphen."""
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    number = last[0].replace(",", "")
    if number[0] in "+-" and last.start() and text[last.start() - 1].isalnum():
        number = number[1:]
    return Decimal(number)
