"""The causal collator: packing, labels, validation. Expected arrays are written by hand or built by a plain loop."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.utils import logging

from minillm.data.packing import best_fit_decreasing
from minillm.training.collators import DataCollatorForCausalLM, DataCollatorForSFT, pack_dataset


def causal(**arguments):
    return DataCollatorForCausalLM(**{"max_length": 8, "pad_token_id": 0, **arguments})


def lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


def random_documents(seed, count, mean=4.0, vocab_size=500):
    print(f"seed {seed}")
    rng = random.Random(seed)
    lengths = [max(1, int(rng.lognormvariate(mean, 1.0))) for _ in range(count)]
    return [{"input_ids": [rng.randrange(1, vocab_size) for _ in range(length)]} for length in lengths]


def test_worked_example_of_the_documentation():
    batch = causal()([{"input_ids": [11, 12, 13]}, {"input_ids": [21, 22, 23, 24, 25]}, {"input_ids": [31, 32]}])
    assert lists(batch) == {
        "input_ids": [[11, 12, 13, 21, 22, 23, 24, 25], [31, 32, 0, 0, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]],
        "labels": [[-100, 12, 13, -100, 22, 23, 24, 25], [-100, 32, -100, -100, -100, -100, -100, -100]],
        "document_ids": [[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 0, 0, 0, 0, 0]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_without_packing_each_document_has_its_row():
    batch = causal(packing=False, max_length=None)([[11, 12, 13], [21, 22]])
    assert lists(batch) == {
        "input_ids": [[11, 12, 13], [21, 22, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 12, 13], [-100, 22, -100]],
    }


@pytest.mark.parametrize(
    "sample",
    [
        [5, 6, 7],
        np.array([5, 6, 7], np.int32),
        torch.tensor([5, 6, 7]),
        {"input_ids": [5, 6, 7]},
        {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0]},
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "text": "not read"},
    ],
    ids=["list", "array", "tensor", "mapping", "padded", "labelled"],
)
def test_forms_of_a_sample(sample):
    assert lists(causal()([sample]))["labels"] == [[-100, 6, 7]]


def test_given_labels_are_kept():
    batch = causal()([{"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]}])
    assert lists(batch)["labels"] == [[-100, -100, 7, 8]]


def test_overlong_documents_are_split_into_documents():
    batch = causal(max_length=3)([{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8]}])
    assert lists(batch)["input_ids"] == [[1, 2, 3], [4, 5, 6], [7, 8, 0]]
    assert lists(batch)["labels"] == [[-100, 2, 3], [-100, 5, 6], [-100, 8, -100]]
    assert lists(batch)["position_ids"] == [[0, 1, 2], [0, 1, 2], [0, 1, 0]]


@pytest.mark.parametrize("length", [2, 3, 4, 7])
def test_no_piece_of_an_overlong_document_has_one_token(length):
    for count in range(2, 4 * length):
        rows = causal(max_length=length).rows([list(range(count))])
        pieces = [piece for row in rows for piece in row]
        assert all(2 <= len(piece.input_ids) <= length for piece in pieces)
        assert sorted({token for piece in pieces for token in piece.input_ids.tolist()}) == list(range(count))
        # Every token but the pieces' first ones is scored, and none twice.
        scored = sorted(token for piece in pieces for token in piece.labels.tolist() if token != -100)
        assert len(set(scored)) == len(scored) == sum(len(piece.input_ids) - 1 for piece in pieces)


@pytest.fixture
def warnings(caplog):
    """The log of transformers' loggers."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_overlong_documents_are_truncated_with_a_count(warnings):
    collator = causal(max_length=3, overlong="truncate")
    batch = collator([[1, 2, 3, 4, 5], [6, 7, 8, 9]])
    assert sorted(lists(batch)["input_ids"]) == [[1, 2, 3], [6, 7, 8]]
    assert [record.message for record in warnings.records] == [
        "1 documents longer than max_length=3 were truncated so far; 2 tokens dropped",
        "2 documents longer than max_length=3 were truncated so far; 3 tokens dropped",
    ]


def test_overlong_documents_are_refused_on_demand():
    with pytest.raises(ValueError, match="sample 1 of 2: a document has 4 tokens; `max_length` is 3"):
        causal(max_length=3, overlong="error")([[1, 2], [1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 3), ({"padding": "max_length"}, 8), ({"pad_to_multiple_of": 4}, 4)],
    ids=["longest", "max_length", "multiple"],
)
def test_width_of_the_rows(options, width):
    assert causal(**options)([[1, 2, 3]])["input_ids"].shape == (1, width)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packing_keeps_every_document_whole_and_once(seed):
    documents = random_documents(seed, 300)
    batch = causal(max_length=1024)(documents)
    found = []
    for ids, mask, numbers, positions, labels in zip(
        *(batch[name] for name in ("input_ids", "attention_mask", "document_ids", "position_ids", "labels")),
        strict=True,
    ):
        real = mask.bool()
        assert (real.long().diff() <= 0).all()
        assert numbers[real].unique_consecutive().tolist() == list(range(1, int(numbers.max()) + 1))
        assert (labels[~real] == -100).all()
        for number in range(1, int(numbers.max()) + 1):
            mine = numbers == number
            found.append(ids[mine].tolist())
            assert positions[mine].tolist() == list(range(int(mine.sum())))
            assert labels[mine].tolist() == [-100, *ids[mine].tolist()[1:]]
    assert sorted(found) == sorted(document["input_ids"] for document in documents)


@pytest.mark.parametrize("mean", [3.0, 4.0, 5.0], ids=["short", "medium", "long"])
@pytest.mark.parametrize("seed", [0, 1])
def test_padding_of_packed_rows_stays_under_five_percent(mean, seed):
    lengths = [min(256, len(document["input_ids"])) for document in random_documents(seed, 1000, mean)]
    rows = best_fit_decreasing(lengths, 256)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 256 for row in rows)
    assert 1 - sum(lengths) / (256 * len(rows)) < 0.05


def test_padding_of_batches_stays_under_five_percent():
    collator = causal(max_length=256)
    documents = random_documents(3, 1024)
    tokens = slots = 0
    for start in range(0, len(documents), 64):
        batch = collator(documents[start : start + 64])
        tokens += int(batch["attention_mask"].sum())
        slots += batch["attention_mask"].numel()
    assert 1 - tokens / slots < 0.05


def test_padding_is_as_documented():
    """The table of docs/training.md, over four distributions of lengths."""
    rng = random.Random(1)
    kinds = [[rng.randint(2, 256) for _ in range(4096)]]
    for mean in (3.0, 4.0, 5.0):
        kinds.append([min(256, max(2, int(rng.lognormvariate(mean, 1.0)))) for _ in range(4096)])

    def padding(lengths, size, packing=True):
        collator = causal(max_length=256, packing=packing)
        slots = 0
        for at in range(0, len(lengths), size):
            slots += collator([{"input_ids": [1] * length} for length in lengths[at : at + size]])["input_ids"].numel()
        return 100 * (1 - sum(lengths) / slots)

    rows = {
        "not packed, batches of 32": (32, False),
        "packed inside batches of 32": (32,),
        "packed inside batches of 128": (128,),
        "256 documents packed beforehand": (256,),
        "4096 documents packed beforehand": (4096,),
    }
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    for name, how in rows.items():
        found = [padding(lengths, *how) for lengths in kinds]
        assert f"| {name} | {min(found):.2g} to {max(found):.2g} % |" in page, (name, found)


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit_decreasing([5, 4, 3, 3, 2], 8) == [[0, 2], [1, 3], [4]]
    assert best_fit_decreasing([2, 6, 7, 1], 8) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_equals_a_search_through_all_rows(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    capacity = rng.choice([6, 40, 500])
    lengths = [rng.randint(1, rng.choice([capacity, capacity // 3])) for _ in range(300)]
    rows = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rooms = [capacity - sum(lengths[other] for other in row) for row in rows]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[index]]
        rows[min(fitting)[1]].append(index) if fitting else rows.append([index])
    assert best_fit_decreasing(lengths, capacity) == sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_packed_data_set_goes_through_the_collator_unchanged(kind):
    # Those of one token are left out by `pack_dataset`.
    documents = [document for document in random_documents(5, 40, mean=2.0) if len(document["input_ids"]) > 1]
    collator = causal(max_length=64)
    samples = documents if kind == "list" else Dataset.from_list(documents)
    rows = pack_dataset(samples, collator)
    assert isinstance(rows, Dataset if kind == "datasets" else list)
    assert set(rows[0]) == {"input_ids", "document_ids", "labels"}
    packed = collator([rows[index] for index in range(len(rows))])
    direct = collator(documents)
    assert all(torch.equal(packed[name], direct[name]) for name in direct)


def test_packing_leaves_out_documents_without_a_score_and_counts_them(warnings):
    """Each would fill a row of its own, which no Trainer could take a step on."""
    unscored = [[5], {"input_ids": [6] * 8, "labels": [-100] * 8}, {"input_ids": [7] * 7, "labels": [7] + [-100] * 6}]
    collator = causal(overlong="truncate")
    samples = [*unscored, [1, 2, 3], {"input_ids": [4] * 10, "labels": [-100] * 9 + [4]}]
    rows = pack_dataset(samples, collator)
    assert [row["input_ids"] for row in rows] == [[1, 2, 3]]
    # The last one lost its label by truncation.
    assert "4 of 5 documents hold no token to score and are left out" in warnings.records[-1].message
    warnings.clear()
    assert pack_dataset([*rows, {"input_ids": [8], "document_ids": [1]}], collator) == rows
    assert "1 of 2 documents" in warnings.records[-1].message
    warnings.clear()
    assert pack_dataset(rows, collator) == rows and not warnings.records
    with pytest.raises(ValueError, match="the data set holds no token to score"):
        pack_dataset(unscored, collator)


@pytest.mark.parametrize("folder", [None, "rows"], ids=["memory", "disk"])
def test_packing_leaves_out_empty_documents_and_counts_them(folder, warnings, tmp_path):
    empty = [{"input_ids": []}, [], {"input_ids": [1, 2], "attention_mask": [0, 0]}, np.empty(0, np.int32)]
    folder = None if folder is None else tmp_path / folder
    rows = pack_dataset([*empty, [5], {"input_ids": [1, 2, 3]}, []], causal(), folder=folder)
    assert [row["input_ids"] for row in rows] == [[1, 2, 3]]
    assert "6 of 7 documents hold no token to score and are left out" in warnings.records[-1].message
    with pytest.raises(ValueError, match="the data set holds no token to score"):
        pack_dataset(empty, causal(), folder=folder and tmp_path / "empty")
    # All else that is wrong with a sample still ends packing.
    with pytest.raises(ValueError, match="sample 1 of 2: `input_ids` hold the negative id -2"):
        pack_dataset([[], [1, -2]], causal())


def test_packing_leaves_out_conversations_without_a_token():
    collator = DataCollatorForSFT(max_length=8, pad_token_id=0)
    empty = [{"prompt_ids": [], "completion_ids": []}, {"input_ids": [], "labels": []}]
    rows = pack_dataset([*empty, {"prompt_ids": [1], "completion_ids": [2, 3]}], collator)
    assert [row["labels"] for row in rows] == [[-100, 2, 3]]


def test_every_row_of_a_packed_data_set_can_be_a_batch():
    collator = causal(max_length=4)
    # The fifth tokens alone would fill rows in which nothing is scored.
    rows = pack_dataset([[1, 2, 3, 4, 5]] * 8, collator)
    assert all((collator([row])["labels"] != -100).any() for row in rows)


def test_packed_rows_are_not_packed_again():
    collator = causal()
    rows = pack_dataset([[1, 2, 3]], collator) + pack_dataset([[4, 5, 6]], collator)
    assert collator(rows)["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"input_ids": []}, "a sample has no tokens"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "a sample has no tokens"),
        ({"text": "a"}, r"a sample needs `input_ids`; it has \['text'\]"),
        ({"input_ids": [1.0, 2.0]}, "`input_ids` must be a flat list of integers, got list"),
        ({"input_ids": ["a"]}, "`input_ids` must be a flat list of integers"),
        ({"input_ids": "abc"}, "`input_ids` must be a flat list of integers, got str 'abc'"),
        ({"input_ids": [[1, 2], [3, 4]]}, "`input_ids` must be a flat list of integers"),
        ({"input_ids": [[1, 2], [3]]}, "`input_ids` must be a flat list of integers"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, r"got Tensor\[1, 3\]"),
        ({"input_ids": [True, False]}, "`input_ids` must be a flat list of integers"),
        ({"input_ids": [1, -2]}, "`input_ids` hold the negative id -2"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 values for 2 `input_ids`"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "`labels` hold 2 at token 0 whose id is 1"),
        ({"input_ids": [1, 2], "prefix_mask": [1, 0]}, "a sample holds `prefix_mask`, which the collator makes"),
        ({"input_ids": [1, 2, 3], "document_ids": [2, 1, 1]}, "`document_ids` decrease inside a row"),
        ({"input_ids": [1] * 9, "document_ids": [1] * 9}, "a packed row has 9 tokens; `max_length` is 8"),
    ],
)
def test_bad_samples_are_named(sample, message):
    with pytest.raises(ValueError, match="sample 1 of 2: .*" + message):
        causal()([{"input_ids": [1, 2]}, sample])


def test_a_batch_without_samples_or_without_a_score_is_refused():
    with pytest.raises(ValueError, match="called without samples"):
        causal()([])
    with pytest.raises(ValueError, match="none of the 2 samples of this batch holds a token to score"):
        causal()([[1], [2]])
    with pytest.raises(ValueError, match=r"is a packed row; this collator has `packing=False`"):
        causal(packing=False)([{"input_ids": [1, 2], "document_ids": [1, 1]}])
    with pytest.raises(ValueError, match="needs a collator with `packing=True`"):
        pack_dataset([[1, 2]], causal(packing=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": None}, "no id for padding: give `pad_token_id`"),
        ({"max_length": None}, "need `max_length`"),
        ({"max_length": None, "packing": False, "padding": "max_length"}, "need `max_length`"),
        ({"max_length": 1}, "`max_length` is 1"),
        ({"overlong": "drop"}, "`overlong` is 'drop'; allowed: 'split', 'truncate', 'error'"),
        ({"padding": True}, "`padding` is True; allowed: 'longest', 'max_length'"),
        ({"pad_to_multiple_of": 3}, r"`pad_to_multiple_of` is 3; it must divide `max_length` \(8\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        causal(**options)


class EndOnlyTokenizer:
    pad_token_id = None
    eos_token_id = 7


def test_padding_id_comes_from_the_tokenizer():
    assert DataCollatorForCausalLM(EndOnlyTokenizer(), max_length=4).pad_token_id == 7
    assert DataCollatorForCausalLM(EndOnlyTokenizer(), max_length=4, pad_token_id=3).pad_token_id == 3


@pytest.mark.parametrize(("lengths", "wrong"), [([3, 0], "document 1 has 0"), ([9], "document 0 has 9")])
def test_fitting_refuses_lengths_out_of_range(lengths, wrong):
    with pytest.raises(ValueError, match=wrong + " tokens; a row holds between 1 and 8"):
        best_fit_decreasing(lengths, 8)
