"""The prefix and the fine-tuning collators: prefixes, their draws, and which tokens are scored."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerState

from minillm.training.callbacks import SetEpochCallback
from minillm.training.collators import (
    DataCollatorForCausalLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    pack_dataset,
    uniform_draw,
)

DOCUMENTS = [{"input_ids": [10 * number + token for token in range(9)]} for number in range(1, 25)]


def prefix(**arguments):
    return DataCollatorForPrefixLM(**{"max_length": 16, "pad_token_id": 0, **arguments})


def sft(**arguments):
    return DataCollatorForSFT(**{"max_length": 16, "pad_token_id": 0, **arguments})


def prefix_lengths(batches):
    """{a document's first id: length of its prefix}, read from the tensors."""
    found = {}
    for batch in batches:
        for ids, mask, numbers in zip(batch["input_ids"], batch["prefix_mask"], batch["document_ids"], strict=True):
            for number in range(1, int(numbers.max()) + 1):
                mine = numbers == number
                found[int(ids[mine][0])] = int(mask[mine].sum())
    return found


def test_prefix_is_at_the_start_and_unscored():
    batch = prefix(max_length=32)(DOCUMENTS)
    for row in range(len(batch["input_ids"])):
        ids, labels, mask, numbers = (
            batch[name][row] for name in ("input_ids", "labels", "prefix_mask", "document_ids")
        )
        assert (mask[numbers == 0] == 0).all()
        for number in range(1, int(numbers.max()) + 1):
            mine = numbers == number
            length = int(mask[mine].sum())
            assert 1 <= length <= 8
            assert mask[mine].tolist() == [1] * length + [0] * (9 - length)
            assert labels[mine].tolist() == [-100] * length + ids[mine].tolist()[length:]


def test_prefix_example_by_hand():
    # 0.5 of 4 tokens is a prefix of 2, 0.5 of 2 tokens one of 1, and a single token is all prefix.
    collator = prefix(max_length=8, prefix_fraction=(0.5, 0.5))
    batch = {name: tensor.tolist() for name, tensor in collator([[1, 2, 3, 4], [5, 6], [7]]).items()}
    assert batch["input_ids"] == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["prefix_mask"] == [[1, 1, 0, 0, 1, 0, 1]]
    assert batch["labels"] == [[-100, -100, 3, 4, -100, 6, -100]]


def test_draws_do_not_depend_on_order_batch_or_packing():
    whole = prefix_lengths([prefix(max_length=64)(DOCUMENTS)])
    shuffled = prefix_lengths([prefix()([DOCUMENTS[index]]) for index in reversed(range(len(DOCUMENTS)))])
    collator = prefix()
    packed = prefix_lengths([collator(pack_dataset(DOCUMENTS, collator))])
    assert whole == shuffled == packed
    assert len(set(whole.values())) > 3


def test_draws_change_with_epoch_and_seed_and_come_back():
    collator = prefix()
    first = prefix_lengths([collator(DOCUMENTS)])
    collator.set_epoch(1)
    second = prefix_lengths([collator(DOCUMENTS)])
    collator.set_epoch(0)
    assert first == prefix_lengths([collator(DOCUMENTS)])
    assert first != second
    assert first != prefix_lengths([prefix(seed=1)(DOCUMENTS)])


def test_draws_are_fixed_numbers_spread_over_the_unit_interval():
    ids = torch.arange(5).numpy()
    assert uniform_draw(0, 0, ids) == uniform_draw(0, 0, ids.copy())
    draws = torch.tensor([uniform_draw(0, epoch, ids) for epoch in range(4000)], dtype=torch.float64)
    assert 0.0 <= draws.min() < 0.01 and 0.99 < draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 0.02
    # A golden value: the draws must not change between versions or machines.
    assert uniform_draw(0, 0, ids) == pytest.approx(0.21694294901356215, abs=1e-15)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epoch_reaches_workers_that_live_on(workers):
    collator = prefix()
    loader = DataLoader(
        DOCUMENTS, batch_size=4, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
    )
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        expected = prefix()
        expected.set_epoch(epoch)
        assert prefix_lengths(loader) == prefix_lengths([expected(DOCUMENTS)])


@pytest.mark.parametrize("epoch", [None, 0, 1.0, 1.5], ids=str)
def test_callback_sets_the_epoch(epoch):
    collator = prefix()
    collator.set_epoch(7)
    SetEpochCallback(collator).on_epoch_begin(None, TrainerState(epoch=epoch), None)
    assert collator.epoch == int(epoch or 0)


def test_callback_refuses_what_has_no_epoch():
    with pytest.raises(TypeError, match="list has no `set_epoch`"):
        SetEpochCallback([])


@pytest.mark.parametrize("fraction", [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)], ids=str)
def test_prefix_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match="`prefix_fraction` is"):
        prefix(prefix_fraction=fraction)


def test_prefix_fraction_bounds_the_prefix():
    lengths = prefix_lengths([prefix(max_length=64, prefix_fraction=(0.25, 0.5))(DOCUMENTS)])
    assert set(lengths.values()) == {2, 3, 4}


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_fixed_prefixes_are_those_of_the_first_epoch_in_all_epochs(kind):
    samples = DOCUMENTS if kind == "list" else Dataset.from_list(DOCUMENTS)
    expected = prefix_lengths([prefix()(DOCUMENTS)])
    collator = prefix()
    drawn = pack_dataset(samples, collator)
    for packed_in in (0, 2):
        collator.set_epoch(packed_in)
        rows = pack_dataset(samples, collator, fixed_prefixes=True)
        for epoch in (0, 1, 5):
            collator.set_epoch(epoch)
            batch = collator(list(rows))
            assert prefix_lengths([batch]) == expected
            assert (batch["labels"][batch["prefix_mask"] == 1] == -100).all()
            assert (prefix_lengths([collator(list(drawn))]) == expected) == (epoch == 0)
    # Packed again, rows keep what they have.
    assert list(pack_dataset(rows, collator)) == list(rows)


def test_fixed_prefixes_of_answers_are_their_prompts_and_causal_rows_have_none():
    samples = [{"input_ids": [number] * 7, "prompt_length": number % 6 + 1} for number in range(1, 12)]
    for collator in (sft(prompt_is_prefix=True), sft()):
        drawn, fixed = (collator(pack_dataset(samples, collator, fixed_prefixes=value)) for value in (False, True))
        assert all(torch.equal(drawn[name], fixed[name]) for name in drawn)
    causal = DataCollatorForCausalLM(max_length=16, pad_token_id=0)
    assert set(pack_dataset(DOCUMENTS, causal, fixed_prefixes=True)[0]) == {"input_ids", "document_ids", "labels"}


def test_rows_with_prefixes_are_checked():
    rows = pack_dataset(DOCUMENTS[:1], prefix(), fixed_prefixes=True)
    with pytest.raises(ValueError, match="a packed row holds prefixes in `prefix_mask`; this collator marks none"):
        DataCollatorForCausalLM(max_length=16, pad_token_id=0)(rows)
    for mask in ([1, 0, 1], [2, 2, 1], [1, 2, 1], [-1, 0, 0]):
        rows[0]["prefix_mask"] = mask + [0] * 6
        with pytest.raises(ValueError, match="1 on the first prompt of a document, 2 on the second"):
            prefix()(rows)
    rows[0]["prefix_mask"] = [0, 1, 1, 0, 2, 3, 0, 0, 0]
    assert prefix()(rows)["prefix_mask"].tolist() == [rows[0]["prefix_mask"]]


def test_a_prefix_leaves_the_last_scored_token():
    ids = list(range(1, 13))
    for seed in range(20):
        batch = prefix(seed=seed)([{"input_ids": ids, "labels": [-100] * 3 + ids[3:5] + [-100] * 7}])
        assert 1 <= int(batch["prefix_mask"].sum()) <= 4 and batch["labels"][0, 4] == 5


SFT_FORMS = {
    "ids": {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5]},
    "length": {"input_ids": [1, 2, 3, 4, 5], "prompt_length": 3},
    "assistant": {"input_ids": [1, 2, 3, 4, 5], "assistant_masks": [0, 0, 0, 1, 1]},
    "completion": {"input_ids": [1, 2, 3, 4, 5], "completion_mask": [False, False, False, True, True]},
    "labels": {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
    "padded": {
        "input_ids": [0, 1, 2, 3, 4, 5],
        "attention_mask": [0, 1, 1, 1, 1, 1],
        "assistant_masks": [0, 0, 0, 0, 1, 1],
    },
}


@pytest.mark.parametrize("form", SFT_FORMS)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_answer_only_is_scored_and_the_prompt_is_prefix(form, packing):
    batch = sft(prompt_is_prefix=True, packing=packing)([SFT_FORMS[form], {"prompt_ids": [6], "completion_ids": [7]}])
    flat = [tensor.tolist() for tensor in batch["input_ids"]]
    assert flat == ([[1, 2, 3, 4, 5, 6, 7]] if packing else [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
    assert batch["labels"].tolist() == (
        [[-100, -100, -100, 4, 5, -100, 7]] if packing else [[-100, -100, -100, 4, 5], [-100, 7, -100, -100, -100]]
    )
    assert batch["prefix_mask"].tolist() == (
        [[1, 1, 1, 0, 0, 1, 0]] if packing else [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    )


def test_causal_models_get_no_prefix_mask():
    assert "prefix_mask" not in sft()([SFT_FORMS["ids"]])


def test_several_answers_are_all_scored_and_each_prompt_is_a_block():
    sample = {"input_ids": [1, 2, 3, 4, 5, 6], "assistant_masks": [0, 0, 1, 0, 0, 1]}
    batch = sft(prompt_is_prefix=True)([sample])
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, -100, 6]]
    assert batch["prefix_mask"].tolist() == [[1, 1, 0, 2, 2, 0]]


def test_packed_rows_equal_direct_packing():
    samples = [{"input_ids": [number] * 7, "prompt_length": number % 6 + 1} for number in range(1, 12)]
    collator = sft(prompt_is_prefix=True)
    rows = pack_dataset(samples, collator)
    packed, direct = collator(rows), collator(samples)
    assert all(torch.equal(packed[name], direct[name]) for name in direct)
    assert set(direct) == {"input_ids", "attention_mask", "labels", "document_ids", "position_ids", "prefix_mask"}


@pytest.mark.parametrize(
    ("prompt", "answer", "expected_prompt", "expected_answer"),
    [
        # max_length 8: the prompt loses its start, down to 4, before the answer loses its end.
        (10, 3, [6, 7, 8, 9, 10], [101, 102, 103]),
        (10, 6, [7, 8, 9, 10], [101, 102, 103, 104]),
        (2, 9, [1, 2], [101, 102, 103, 104, 105, 106]),
    ],
    ids=["prompt", "both", "answer"],
)
def test_truncation_leaves_an_answer(prompt, answer, expected_prompt, expected_answer):
    sample = {"prompt_ids": range(1, prompt + 1), "completion_ids": range(101, 101 + answer)}
    batch = sft(max_length=8)([sample])
    assert batch["input_ids"].tolist() == [expected_prompt + expected_answer]
    assert batch["labels"].tolist() == [[-100] * len(expected_prompt) + expected_answer]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([1, 2, 3], "no field tells where the answer begins"),
        ({"input_ids": [1, 2, 3]}, "set `remove_unused_columns=False` or pack the data set"),
        (
            {"input_ids": [1, 2], "prompt_length": 1, "labels": [-100, 2]},
            r"several fields tell \(prompt_length, labels\)",
        ),
        ({"input_ids": [1, 2], "prompt_length": 2}, "`prompt_length` is 2; a sample of 2 tokens allows 0 to 1"),
        ({"input_ids": [1, 2], "prompt_length": -1}, "`prompt_length` is -1"),
        ({"input_ids": [1, 2], "assistant_masks": [0, 0]}, "has no answer to score, judged by `assistant_masks`"),
        ({"prompt_ids": [1, 2], "completion_ids": []}, "has no answer to score, judged by `completion_ids`"),
        ({"completion_ids": [1, 2]}, "has `completion_ids` but no `prompt_ids`"),
        ({"input_ids": [1, 2], "completion_mask": [0]}, "`completion_mask` has 1 values for 2"),
    ],
)
def test_bad_samples_are_named(sample, message):
    with pytest.raises(ValueError, match="sample 0 of 1: .*" + message):
        sft()([sample])


def test_answers_are_never_split():
    with pytest.raises(ValueError, match="`overlong` is 'split'; allowed: 'truncate', 'error'"):
        sft(overlong="split")
