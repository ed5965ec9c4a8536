"""Objectives: two that MiniLLM does not have, in its collator, and how packed rows say that their draws are fixed."""

import pickle
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from glm_cases import glm, random_texts

from minillm.data.documents import IGNORE_INDEX
from minillm.training import (
    DataCollatorForCausalLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    DocumentCollator,
    Objective,
    pack_dataset,
)
from minillm.training.random_draws import draws

PAD, PRE, SUF, MID, MASK = range(5)


class FillInTheMiddle(Objective):
    scores_first = True
    added = "sentinels"

    def slots(self, tokens):
        return tokens + 3 if tokens else 0

    def lay_out(self, piece, seed, epoch):
        ids = piece.input_ids
        first, second = sorted((draws(seed, epoch, ids)(2) * (len(ids) + 1)).astype(int))
        ids = np.concatenate([[PRE], ids[:first], [SUF], ids[second:], [MID], ids[first:second]])
        return {"input_ids": ids, "labels": np.where(np.arange(len(ids)) > 0, ids, IGNORE_INDEX)}


class MaskedTokens(Objective):
    """A tenth of the tokens is hidden and predicted where it stands: a slot predicts the label of the next one."""

    scores_first = True
    added = "masks"
    behind = "label"
    columns = ("prefix_mask",)

    def lay_out(self, piece, seed, epoch):
        hidden = draws(seed, epoch, piece.input_ids)(len(piece.input_ids)) < 0.1
        labels = np.where(hidden, piece.labels, IGNORE_INDEX)
        ids = np.where(hidden, MASK, piece.input_ids)
        return {"input_ids": ids, "labels": np.append(IGNORE_INDEX, labels), "prefix_mask": np.ones_like(ids, bool)}


@dataclass
class CollatorForMiddles(DocumentCollator):
    def make_objective(self):
        return FillInTheMiddle()


@dataclass
class CollatorForMasks(DocumentCollator):
    def make_objective(self):
        return MaskedTokens()


def middles(**options):
    return CollatorForMiddles(**{"max_length": 64, "pad_token_id": PAD, **options})


def masks(**options):
    return CollatorForMasks(**{"max_length": 64, "pad_token_id": PAD, **options})


def texts(seed, count=60, longest=150):
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [[rng.randrange(5, 90) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def documents_of(batch):
    """The documents of a batch by their numbers: lists of tensors, and the first slot of each."""
    for row in range(len(batch["input_ids"])):
        columns = {name: tensor[row].tolist() for name, tensor in batch.items()}
        numbers = columns["document_ids"]
        for number in range(1, max(numbers) + 1):
            start = numbers.index(number)
            yield columns, start, start + numbers.count(number)


@pytest.mark.parametrize("seed", [0, 1])
def test_fill_in_the_middle_keeps_every_text(seed):
    documents = texts(seed)
    collator = middles()
    batch = collator(pack_dataset(documents, collator))
    assert batch["input_ids"].shape[1] <= 64
    found = []
    for columns, start, stop in documents_of(batch):
        ids = columns["input_ids"][start:stop]
        assert ids[0] == PRE and columns["labels"][start:stop] == [-100, *ids[1:]]
        assert columns["position_ids"][start:stop] == list(range(stop - start))
        suffix, middle = ids.index(SUF), ids.index(MID)
        found.append([*ids[1:suffix], *ids[middle + 1 :], *ids[suffix + 1 : middle]])
    # A row takes 61 tokens of a text with its three sentinels.
    parts = [document[start : start + 61] for document in documents for start in range(0, len(document), 61)]
    assert sorted(found) == sorted(parts)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_masked_tokens_are_predicted_where_they_stood(packing):
    documents = texts(2, longest=63)
    batch = masks(packing=packing)(documents)
    if not packing:
        assert "document_ids" not in batch and len(batch["input_ids"]) == len(documents)
        batch["document_ids"] = batch["attention_mask"]
    found, hidden = [], 0
    for columns, start, stop in documents_of(batch):
        targets = columns["labels"][start + 1 : stop + 1]
        pairs = list(zip(columns["input_ids"][start:stop], targets, strict=True))
        assert all((token == MASK) == (target != -100) for token, target in pairs)
        found.append([token if target == -100 else target for token, target in pairs])
        hidden += sum(token == MASK for token, _ in pairs)
    assert sorted(found) == sorted(documents)
    assert int((batch["labels"] != -100).sum()) == hidden
    assert 0.05 < hidden / sum(map(len, documents)) < 0.15
    # A label may stand behind the last document.
    assert batch["input_ids"].shape[1] <= 64 and int(batch["attention_mask"].sum(-1).max()) <= 63
    assert torch.equal(batch["prefix_mask"], batch["attention_mask"])


def test_documents_that_do_not_fit_are_told_with_what_is_added():
    with pytest.raises(
        ValueError, match=r"with sentinels, `max_length` \(64\) allows 61, and `overlong` is \"error\""
    ):
        middles(overlong="error")([list(range(5, 67))])
    with pytest.raises(ValueError, match=r"with masks, `max_length` \(64\) allows 63, and"):
        masks(overlong="error")([list(range(5, 69))])
    with pytest.raises(ValueError, match=r"may need 65 slots for its documents with sentinels; `max_length` is 64"):
        middles()([{"input_ids": list(range(5, 67)), "document_ids": [1] * 62}])
    with pytest.raises(ValueError, match=r"64 slots for its documents with masks, and one for the last label; "):
        masks()([{"input_ids": list(range(5, 69)), "document_ids": [1] * 64}])
    with pytest.raises(ValueError, match="`max_length` is 3; a document of one token needs 4 slots"):
        middles(max_length=3)


@pytest.mark.parametrize("make", [middles, masks, glm], ids=["middles", "masks", "glm"])
def test_rows_with_fixed_draws_say_so_and_stay_the_same(make):
    documents, collator = random_texts(3, 40), make(max_length=256)
    first = collator(pack_dataset(documents, collator))
    collator.set_epoch(2)
    rows, loose = pack_dataset(documents, collator, fixed_prefixes=True), pack_dataset(documents, collator)
    assert all(set(row["prefix_mask"]) == {-1} for row in rows) and "prefix_mask" not in loose[0]
    found = collator(rows)
    assert all(torch.equal(found[name], first[name]) for name in first)
    assert not torch.equal(collator(loose)["labels"], found["labels"])
    assert pack_dataset(rows, collator) == rows


def test_glm_takes_rows_that_were_fixed_by_zeros():
    documents, collator = random_texts(4, 40), glm(max_length=256)
    rows = pack_dataset(documents, collator, fixed_prefixes=True)
    old = [{**row, "prefix_mask": [0] * len(row["input_ids"])} for row in rows]
    collator.set_epoch(1)
    expected, found = collator(rows), collator(old)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert pack_dataset(old, collator) == rows


OTHERS = {
    "causal": (DataCollatorForCausalLM, "this collator marks none"),
    "prefix": (DataCollatorForPrefixLM, "must be 1 on the first prompt"),
}


@pytest.mark.parametrize(("kind", "message"), OTHERS.values(), ids=OTHERS)
def test_rows_with_fixed_blanks_do_not_pass_for_rows_without_prefixes(kind, message):
    rows = pack_dataset([list(range(10, 40))], glm(), fixed_prefixes=True)
    with pytest.raises(ValueError, match=message):
        kind(max_length=64, pad_token_id=PAD)(rows)


def test_rows_with_prefixes_are_no_rows_with_fixed_draws():
    prefix = DataCollatorForPrefixLM(max_length=32, pad_token_id=PAD)
    rows = pack_dataset([list(range(10, 30))], prefix, fixed_prefixes=True)
    for collator in (masks(), middles(), glm()):
        with pytest.raises(ValueError, match="holds the prefixes of another collator"):
            collator(rows)


def test_a_field_that_is_set_later_counts():
    documents = texts(5, longest=20)
    changes = {"prefix_fraction": (0.5, 0.5), "seed": 4, "max_length": 24, "packing": False}
    for name, value in changes.items():
        changed = DataCollatorForPrefixLM(max_length=32, pad_token_id=PAD)
        changed(documents)
        setattr(changed, name, value)
        made = DataCollatorForPrefixLM(**{"max_length": 32, "pad_token_id": PAD, name: value})
        expected, found = made(documents), changed(documents)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    with pytest.raises(ValueError, match=r"`mask_fraction` is 0\.6"):
        changed = glm()
        changed.mask_fraction = 0.6
        changed(documents)


def test_collators_go_to_other_processes():
    documents = random_texts(6, 20)
    for collator in (glm(), masks(), DataCollatorForSFT(max_length=64, pad_token_id=PAD, prompt_is_prefix=True)):
        collator.set_epoch(3)
        copy = pickle.loads(pickle.dumps(collator))
        assert copy.epoch == 3 and copy == collator and repr(copy) == repr(collator)
        samples = (
            documents if not isinstance(collator, DataCollatorForSFT) else [{"input_ids": [5, 6], "labels": [-100, 6]}]
        )
        expected, found = collator(samples), copy(samples)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_collator_shows_is_its_fields():
    found = repr(DataCollatorForPrefixLM(max_length=8, pad_token_id=0, prefix_fraction=(0.1, 0.2)))
    assert found == (
        "DataCollatorForPrefixLM(tokenizer=None, max_length=8, packing=True, pad_token_id=0, padding='longest', "
        "pad_to_multiple_of=None, overlong='split', seed=0, prefix_fraction=(0.1, 0.2))"
    )
