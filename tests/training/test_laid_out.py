"""What an objective of one's own gives is checked before it enters rows; what is right passes as it is."""

from dataclasses import dataclass

import numpy as np
import pytest
from transformers import DataCollatorWithFlattening

from minillm.training import DataCollatorForCausalLM, DocumentCollator, Objective, pack_dataset

DOCUMENTS = [[11, 12, 13, 14, 15, 16], [21, 22, 23, 24]]


def collator_of(lay_out, options=None, **attributes):
    """A collator whose objective has these attributes and lays out a document's ids by `lay_out`."""
    methods = {"lay_out": lambda self, piece, seed, epoch: lay_out(piece.input_ids)}
    objective = type("Mine", (Objective,), {**methods, **attributes})

    @dataclass
    class Collator(DocumentCollator):
        def make_objective(self):
            return objective()

    return Collator(**{"max_length": 16, "pad_token_id": 0, **(options or {})})


def right(ids, **more):
    return {"input_ids": ids, "labels": np.append(-100, ids[1:]), **more}


PREFIX = {"columns": ("prefix_mask",)}

NAMES = {
    "no ids": (lambda ids: {"labels": right(ids)["labels"]}, {}, "gave no `input_ids`; needed"),
    "no labels": (lambda ids: {"input_ids": ids}, {}, "gave no `labels`; needed: `input_ids`, `labels` and what"),
    "no column": (right, PREFIX, "gave no `prefix_mask`; needed"),
    "column not named": (lambda ids: right(ids, prefix_mask=ids > 1), {}, "gave `prefix_mask`, which `columns` does"),
    "positions not named": (lambda ids: right(ids, position_ids=ids), {}, "gave `position_ids`, which `columns` does"),
    "documents": (
        lambda ids: right(ids, document_ids=ids),
        {"columns": ("document_ids",)},
        "gave `document_ids`, which the collator makes itself",
    ),
    "nothing": (lambda ids: None, {}, "gave None; needed: a dict of arrays"),
}

ARRAYS = {
    "list": (lambda ids: right(ids.tolist()), {}, "gave `input_ids` as list; needed: an array of one axis, int64 "),
    "floats": (lambda ids: right(ids * 1.0), {}, r"gave `input_ids` as float64\[6\]"),
    "boolean ids": (lambda ids: right(ids) | {"input_ids": ids > 1}, {}, r"gave `input_ids` as bool\[6\]"),
    "float column": (lambda ids: right(ids, prefix_mask=ids / 7), PREFIX, "`prefix_mask` as float64.* or boolean"),
    "two axes": (lambda ids: right(ids, prefix_mask=ids[None]), PREFIX, r"`prefix_mask` as int64\[1, 6\]"),
    "few labels": (
        lambda ids: right(ids) | {"labels": ids[1:]},
        {},
        "gave 6 `input_ids`, 5 `labels`; needed: as many",
    ),
    "short column": (lambda ids: right(ids, prefix_mask=ids[1:]), PREFIX, "5 `prefix_mask`; needed: as many"),
    "no label behind": (
        right,
        {"behind": "label"},
        "6 `labels`; needed: as many of each, and a label more for the slot",
    ),
    "no slot": (lambda ids: {"input_ids": ids[:0], "labels": ids[:0]}, {}, "gave no slot; a document takes one"),
}

VALUES = {
    "first label": (lambda ids: {"input_ids": ids, "labels": ids}, {}, "gave the label 11 at a document's first slot"),
    "first label, one behind": (
        lambda ids: {"input_ids": ids, "labels": np.append(ids, 7)},
        {"behind": "label"},
        "gave the label 11 at a document's first slot",
    ),
    "negative id": (
        lambda ids: right(ids) | {"input_ids": -ids},
        {},
        "gave -24 in `input_ids`; needed: numbers from 0",
    ),
    "negative prefix": (lambda ids: right(ids, prefix_mask=ids * 0 - 1), PREFIX, "gave -1 in `prefix_mask`"),
    "negative label": (
        lambda ids: right(ids) | {"labels": np.append(-100, -ids[1:])},
        {},
        "gave the label -12; needed",
    ),
}

SLOTS = {
    "more than told": (
        lambda ids: right(np.append(ids, 1)),
        {"options": {"max_length": 10}},
        r"gave 7 slots for 6 tokens; `slots\(6\)` says 6",
    ),
    "fewer told": (
        right,
        {"options": {"max_length": 8}, "slots": lambda self, tokens: tokens - 2},
        r"gave 6 slots for 6 tokens; `slots\(6\)` says 4",
    ),
    "float": (right, {"slots": lambda self, tokens: tokens * 1.0}, r"`Mine\.slots\(\d+\)` is \d+\.0; needed: an int"),
    "none": (right, {"slots": lambda self, tokens: 0}, r"`Mine\.slots\(\d+\)` is 0; needed: an int from 1 on"),
    "more than a row": (
        right,
        {"options": {"max_length": 2}, "slots": lambda self, tokens: tokens + 3},
        "`max_length` is 2; a document of one token needs 4 slots",
    ),
    "decreasing": (
        lambda ids: right(np.resize(ids, 12)),
        # A search by halves asks for 5 and 7 of 0 to 10, and takes all up to 10 to fit.
        {"options": {"max_length": 10, "packing": False}, "slots": lambda self, tokens: {6: 12}.get(tokens, tokens)},
        "gave 12 slots for a row of 10: `slots` must never decrease",
    ),
}

CASES = {**NAMES, **ARRAYS, **VALUES, **SLOTS}


@pytest.mark.parametrize(("lay_out", "attributes", "message"), CASES.values(), ids=CASES)
def test_what_an_objective_gives_wrong_is_refused(lay_out, attributes, message):
    with pytest.raises(ValueError, match=message):
        collator_of(lay_out, **attributes)(DOCUMENTS)


def test_what_is_right_passes():
    def lay_out(ids):
        more = {"position_ids": ids % 2} if len(ids) == 4 else {}
        return right(ids, prefix_mask=ids < 13, **more)

    # `-1` at padding is not the objective's.
    collator = collator_of(
        lay_out,
        {"pad_token_id": -1, "padding": "max_length", "max_length": 12},
        columns=("prefix_mask", "position_ids"),
    )
    batch = {name: tensor[0].tolist() for name, tensor in collator(DOCUMENTS).items()}
    assert batch == {
        "input_ids": [11, 12, 13, 14, 15, 16, 21, 22, 23, 24, -1, -1],
        "attention_mask": [1] * 10 + [0] * 2,
        "labels": [-100, 12, 13, 14, 15, 16, -100, 22, 23, 24, -100, -100],
        "document_ids": [1] * 6 + [2] * 4 + [0] * 2,
        "position_ids": [0, 1, 2, 3, 4, 5, 1, 0, 1, 0, 0, 0],
        "prefix_mask": [1, 1] + [0] * 10,
    }


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ("prefix_mask", TypeError, "`Mine.columns` is 'prefix_mask'; needed: a tuple of names"),
        ((1,), TypeError, r"`Mine.columns` is \(1,\); needed"),
        (("labels",), ValueError, "`Mine.columns` names `labels`, which every batch has"),
        (("attention_mask",), ValueError, "names `attention_mask`"),
    ],
)
def test_columns_are_names_of_further_inputs(columns, error, message):
    with pytest.raises(error, match=message):
        collator_of(right, columns=columns)


@pytest.mark.parametrize(
    ("made", "told"), [(Objective, "the class Objective"), (None, "None"), (DOCUMENTS, r"\[\[11, 12")]
)
def test_what_is_made_is_an_objective(made, told):
    @dataclass
    class Collator(DocumentCollator):
        def make_objective(self):
            return made

    with pytest.raises(TypeError, match=rf"`Collator\.make_objective` gave {told}.*; needed: an instance of an `Obj"):
        Collator(max_length=8, pad_token_id=0)


def test_packing_needs_a_collator_of_documents():
    for collator in (DataCollatorWithFlattening(), None, DataCollatorForCausalLM):
        with pytest.raises(TypeError, match=r"`collator` is .*; needed: a collator of `minillm\.training`"):
            pack_dataset(DOCUMENTS, collator)
