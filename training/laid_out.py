"""What an objective gives, checked as it enters rows: a mistake would become wrong training data without a word."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minillm.data.documents import IGNORE_INDEX, MADE_BY_COLLATORS, Piece
from minillm.training.objective import Objective

NEEDED: tuple[str, ...] = ("input_ids", "labels")
NEVER_COLUMNS = (*NEEDED, "attention_mask")
NEVER_NEGATIVE = ("input_ids", *MADE_BY_COLLATORS)
COUNTED = {"document_ids", "position_ids"}
"""Columns that the collator counts; positions may be given too."""

KINDS: dict[str, str] = dict.fromkeys(NEEDED, "iu")
WHOLE = (int, np.integer)


def require_objective(objective: Any, collator: Any) -> Objective:
    """What `make_objective` gave.

    Raises:
        TypeError: it is no `Objective`, or its `columns` are no names.
        ValueError: `columns` name what every batch has.
    """
    if not isinstance(objective, Objective):
        what = f"the class {objective.__name__}" if isinstance(objective, type) else f"{objective!r:.60}"
        raise TypeError(
            f"`{type(collator).__name__}.make_objective` gave {what}; needed: an instance of an `Objective`"
        )
    columns, own = objective.columns, type(objective).__name__
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"`{own}.columns` is {columns!r}; needed: a tuple of names")
    if always := [name for name in NEVER_COLUMNS if name in columns]:
        raise ValueError(f"`{own}.columns` names `{always[0]}`, which every batch has: name further inputs alone")
    return objective


def require_slots(objective: Objective, tokens: int) -> int:
    """The slots that a document of so many tokens takes at most. ValueError if they are no number from 1 on."""
    slots = objective.slots(tokens)
    if not isinstance(slots, WHOLE) or slots < min(tokens, 1):
        raise ValueError(f"`{type(objective).__name__}.slots({tokens})` is {slots!r}; needed: an int from 1 on")
    return slots


def require_laid_out(
    rows: Sequence[Sequence[dict[str, np.ndarray]]],
    pieces: Sequence[Sequence[Piece]],
    objective: Objective,
    capacity: int | None,
) -> None:
    """Checks the documents of each row as `lay_out` gave them, all but their numbers: see `require_numbers`.

    Args:
        pieces: what they were made of.
        capacity: the slots of a row that its documents may take; None for any number.

    Raises:
        ValueError: a document that is not as `Objective.lay_out` says, or more slots than `slots` told.
    """
    columns = set(objective.columns)
    needed = {*NEEDED, *(columns - COUNTED)}
    known = needed | columns & {"position_ids"}
    behind = int(bool(objective.behind))
    called = f"`{type(objective).__name__}.lay_out`"
    for row, of_row in zip(rows, pieces, strict=True):
        total = 0
        for document, piece in zip(row, of_row, strict=True):
            tokens = len(piece.input_ids)
            if fault := _names_fault(document, needed, known) or _arrays_fault(document, behind):
                raise ValueError(f"{called} gave {fault} (a document of {tokens} tokens)")
            count, most = len(document["input_ids"]), require_slots(objective, tokens)
            if count > most:
                raise ValueError(f"{called} gave {count} slots for {tokens} tokens; `slots({tokens})` says {most}")
            total += count
        if capacity is not None and total > capacity:
            raise ValueError(f"{called} gave {total} slots for a row of {capacity}: `slots` must never decrease")


def require_numbers(batch: dict[str, np.ndarray], objective: Objective) -> None:
    """Checks the numbers that `lay_out` gave, in a batch of int64 [rows, width]: of all documents at once, which takes
    a small part of the time. ValueError if there are negative ones, other than -100 in `labels`.
    """
    called = f"`{type(objective).__name__}.lay_out`"
    for name in NEVER_NEGATIVE:
        # What stands at padding is not the objective's.
        if name in batch and batch[name].min() < 0 and (least := batch[name][batch["attention_mask"] > 0].min()) < 0:
            raise ValueError(f"{called} gave {least} in `{name}`; needed: numbers from 0 on")
    labels = batch["labels"]
    wrong = (labels < 0) & (labels != IGNORE_INDEX)
    if wrong.any():
        raise ValueError(f"{called} gave the label {labels[wrong][0]}; needed: an id, or -100 where nothing is scored")


def _names_fault(document: Any, needed: set[str], known: set[str]) -> str:
    if not isinstance(document, dict):
        return f"{document!r:.60}; needed: a dict of arrays"
    given = document.keys()
    if given == known or needed <= given <= known:
        return ""
    if missing := needed - given:
        return f"no {_listed(missing)}; needed: `input_ids`, `labels` and what `columns` names"
    if made := given & {"document_ids", "attention_mask"}:
        return f"{_listed(made)}, which the collator makes itself: leave it out"
    return f"{_listed(given - known)}, which `columns` does not name: name it there, or leave it out"


def _arrays_fault(document: dict[str, np.ndarray], behind: int) -> str:
    count = -1
    for name, values in document.items():
        if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in KINDS.get(name, "iub"):
            kind = f"{values.dtype}{list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
            return f"`{name}` as {kind}; needed: an array of one axis, int64{'' if name in KINDS else ' or boolean'}"
        own = len(values) - behind if name == "labels" else len(values)
        if own != count:
            if count >= 0:
                return _lengths(document, behind)
            count = own
    if count == 0:
        return "no slot; a document takes one at least"
    if document["labels"][0] != IGNORE_INDEX:
        return f"the label {document['labels'][0]} at a document's first slot, which nothing predicts; needed: -100"
    return ""


def _lengths(document: dict[str, np.ndarray], behind: int) -> str:
    told = ", ".join(f"{len(values)} `{name}`" for name, values in document.items())
    more = ", and a label more for the slot behind the document" if behind else ""
    return f"{told}; needed: as many of each{more}"


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names, key=str))
