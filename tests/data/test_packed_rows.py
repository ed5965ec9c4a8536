"""Rows on disk: the same as the rows in memory, from any source, after any end of a run; and what is refused."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from glm_cases import IDS, glm
from torch.utils.data import DataLoader
from training_cases import (
    VARIANTS,
    collator_for,
    counting_documents,
    largest_difference,
    losses,
    make_trainer,
    parameters,
    tiny_model,
)
from transformers.utils import logging

from benchmarks import rows_on_disk
from minillm.data import PackedRows
from minillm.evaluation import perplexity
from minillm.publishing.folders import FolderInUse, reserved
from minillm.training import (
    DataCollatorForCausalLM,
    DataCollatorForGLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    pack_dataset,
)

LENGTH = 32
WINDOW = 200
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}
forked = multiprocessing.get_context("fork")


def causal(**arguments):
    return DataCollatorForCausalLM(**{"max_length": LENGTH, "pad_token_id": 0, **arguments})


def prefix(**arguments):
    return DataCollatorForPrefixLM(**{"max_length": LENGTH, "pad_token_id": 0, **arguments})


def sft(**arguments):
    return DataCollatorForSFT(
        **{"max_length": LENGTH, "pad_token_id": 0, "prompt_is_prefix": True, "overlong": "truncate", **arguments}
    )


COLLATORS = {"causal": causal, "prefix": prefix, "sft": sft, "glm": lambda: glm(max_length=LENGTH)}


def samples_for(kind, count=60, seed=0):
    """Random documents of 1 to 50 tokens; of each length some. For "sft" with conversations of several answers."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    samples = []
    for number in range(count):
        ids = [rng.randrange(40, 90_000) for _ in range(rng.randint(1 + 2 * (kind == "sft"), 50))]
        if kind != "sft":
            samples.append({"input_ids": ids})
        elif number % 2:
            samples.append({"prompt_ids": ids[:2], "completion_ids": ids[2:]})
        else:
            marks = [0, *(rng.randrange(2) for _ in ids[2:]), 1]
            samples.append({"input_ids": ids, "assistant_masks": marks})
    return samples


def file_contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("fixed", [False, True], ids=["drawn", "fixed"])
@pytest.mark.parametrize("kind", COLLATORS)
def test_rows_of_one_window_are_those_in_memory(kind, fixed, tmp_path):
    collator, samples = COLLATORS[kind](), samples_for(kind)
    expected = pack_dataset(samples, collator, fixed_prefixes=fixed)
    rows = pack_dataset(samples, collator, fixed_prefixes=fixed, folder=tmp_path / "rows")
    assert isinstance(rows, PackedRows) and isinstance(rows, torch.utils.data.Dataset)
    assert len(rows) == len(expected) > 20 and list(rows) == expected
    assert [list(row) for row in rows] == [list(row) for row in expected]
    assert all(type(value) is int for values in rows[0].values() for value in values)
    assert ("prefix_mask" in rows[0]) == (fixed and kind != "causal")
    assert rows.num_tokens == sum(len(row["input_ids"]) for row in expected)
    batch, other = collator(rows[:8]), collator(expected[:8])
    assert all(torch.equal(batch[name], other[name]) for name in other)


def test_access_by_number_slice_and_list(tmp_path):
    samples, collator = samples_for("causal"), causal()
    expected = pack_dataset(samples, collator)
    rows = pack_dataset(samples, collator, folder=tmp_path / "rows")
    count = len(rows)
    assert rows[3] == rows[np.int64(3)] == rows[torch.tensor(3)] == expected[3]
    assert rows[-1] == expected[-1] and rows[-count] == expected[0]
    assert rows[2:9:3] == expected[2:9:3] and rows[::-1] == expected[::-1] and rows[5:5] == []
    chosen = [4, 1, -1, 4]
    assert rows[chosen] == rows[np.array(chosen)] == rows[torch.tensor(chosen)] == [expected[at] for at in chosen]
    for wrong in (count, -count - 1):
        with pytest.raises(IndexError, match=f"row {wrong} of {count}"):
            rows[wrong]
    with pytest.raises(TypeError):
        rows["input_ids"]
    assert f"{count} rows" in repr(rows)


def test_many_windows_keep_every_document_and_token(tmp_path):
    samples, collator = samples_for("causal", 300, seed=1), causal()
    rows = pack_dataset(samples, collator, folder=tmp_path / "rows", window_tokens=WINDOW)

    def documents(rows):
        found = []
        for row in rows:
            numbers = np.array(row["document_ids"])
            for number in range(1, numbers[-1] + 1):
                found.append([np.array(row[name])[numbers == number].tolist() for name in ("input_ids", "labels")])
        return sorted(found)

    expected = pack_dataset(samples, collator)
    assert documents(rows) == documents(expected)
    assert rows.num_tokens == sum(len(row["input_ids"]) for row in expected)
    # Window by window they are the rows in memory.
    in_memory, window = [], []
    for number, sample in enumerate(samples):
        window.append(sample)
        if sum(len(each["input_ids"]) for each in window) >= WINDOW or number == len(samples) - 1:
            in_memory += pack_dataset(window, collator)
            window = []
    assert list(rows) == in_memory
    shards = json.loads((tmp_path / "rows" / "packed_rows.json").read_text("utf-8"))["shards"]
    assert len(shards) > 20 and sum(shard["samples"] for shard in shards) == 300
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == [
        "packed_rows.json",
        *(f"rows-{number:05d}.arrow" for number in range(len(shards))),
    ]


def streamed(samples):
    yield from samples


SOURCES = {
    "list": list,
    "datasets": Dataset.from_list,
    "datasets, torch": lambda samples: Dataset.from_list(samples).with_format("torch"),
    "stream of datasets": lambda samples: IterableDataset.from_generator(streamed, gen_kwargs={"samples": samples}),
    "generator": streamed,
    "arrays": lambda samples: [np.array(sample["input_ids"], np.int32) for sample in samples],
}


@pytest.mark.parametrize("source", SOURCES)
def test_all_sources_give_the_same_files(source, tmp_path):
    samples, collator = samples_for("causal"), causal()
    pack_dataset(samples, collator, folder=tmp_path / "list", window_tokens=WINDOW)
    made = SOURCES[source](samples)
    rows = pack_dataset(made, collator, folder=tmp_path / "other", window_tokens=WINDOW)
    expected, found = file_contents(tmp_path / "list"), file_contents(tmp_path / "other")
    for content in (expected, found):
        manifest = json.loads(content.pop("packed_rows.json"))
        assert manifest.pop("source_length") in (None, len(samples))
        content["manifest"] = manifest
    assert found == expected
    # Any form of the same source opens the folder.
    assert list(pack_dataset(samples, collator, folder=tmp_path / "other", window_tokens=WINDOW)) == list(rows)


def test_rows_with_and_without_fixed_prefixes_stand_side_by_side(tmp_path):
    collator = prefix()
    fixed = pack_dataset(samples_for("prefix", 10), collator, fixed_prefixes=True)
    samples = [*fixed, *pack_dataset(samples_for("prefix", 10, seed=1), collator), *samples_for("prefix", 10, seed=2)]
    expected = pack_dataset(samples, collator)
    assert len({len(row) for row in expected}) == 2
    assert list(pack_dataset(samples, collator, folder=tmp_path / "rows")) == expected


def test_a_conversation_of_many_turns_keeps_its_numbers(tmp_path):
    marks = [0, 1] * 400
    sample = {"input_ids": list(range(1, 801)), "assistant_masks": marks}
    collator = sft(max_length=1024)
    rows = pack_dataset([sample], collator, fixed_prefixes=True, folder=tmp_path / "rows")
    assert rows[0] == pack_dataset([sample], collator, fixed_prefixes=True)[0]
    assert max(rows[0]["prefix_mask"]) == 400


def test_at_most_eight_bytes_a_token(tmp_path):
    samples = [[7, 8]] * 3000
    for name, collator, fixed in (("causal", causal(), False), ("prefix", prefix(), True)):
        rows = pack_dataset(samples, collator, fixed_prefixes=fixed, folder=tmp_path / name)
        size = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        assert rows.num_tokens == 6000 and size < 8 * rows.num_tokens


def test_copies_and_worker_processes_open_the_files_anew(tmp_path):
    collator = prefix()
    rows = pack_dataset(samples_for("prefix", 200), collator, folder=tmp_path / "rows", window_tokens=WINDOW)
    small = len(pickle.dumps(rows))
    expected = list(rows)
    assert len(pickle.dumps(rows)) == small < 5_000
    assert list(pickle.loads(pickle.dumps(rows))) == list(PackedRows(tmp_path / "rows")) == expected
    batches = list(DataLoader(rows, batch_size=4, collate_fn=collator))
    for batch, other in zip(DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=2), batches, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux tells how many files are open")
def test_any_number_of_files_takes_no_descriptors(tmp_path):
    rows = pack_dataset(samples_for("causal"), causal(), folder=tmp_path / "rows", window_tokens=30)
    before = len(os.listdir("/proc/self/fd"))
    kept = rows[:]
    assert len(list((tmp_path / "rows").glob("*.arrow"))) > 30 and len(os.listdir("/proc/self/fd")) == before
    assert rows[:] == kept


# --- a run that ends before it is complete ---


def in_child(function):
    """The exit code of a forked process that runs the function: 0, 1 after an error, or minus a signal."""
    child = forked.Process(target=function)
    child.start()
    child.join()
    return child.exitcode


def killed_in_source(samples, at):
    for number, sample in enumerate(samples):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample


@pytest.mark.parametrize("again", ["generator", "list", "stream of datasets"])
@pytest.mark.parametrize("at", [3, 30, 59])
def test_a_killed_run_goes_on_to_the_same_files(at, again, tmp_path):
    samples, collator, folder = samples_for("prefix"), prefix(), tmp_path / "rows"
    options = {"fixed_prefixes": True, "window_tokens": WINDOW}
    whole = pack_dataset(streamed(samples), collator, folder=tmp_path / "whole", **options)
    assert in_child(lambda: pack_dataset(killed_in_source(samples, at), collator, folder=folder, **options)) == -9
    complete = sorted(folder.glob("rows-*.arrow")) if folder.exists() else []
    assert (at == 3) == (not complete)
    times = {path: path.stat().st_mtime_ns for path in complete}
    if complete:
        with pytest.raises(ValueError, match="is not complete: `pack_dataset` with the same arguments goes on"):
            PackedRows(folder)
    rows = pack_dataset(SOURCES[again](samples), collator, folder=folder, **options)
    assert list(rows) == list(whole)
    assert {path: path.stat().st_mtime_ns for path in complete} == times
    # The samples that the source has are noted where it tells.
    found, expected = file_contents(folder), file_contents(tmp_path / "whole")
    if not (at == 3 and again == "list"):
        assert found == expected


def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_files(tmp_path):
    samples, collator = samples_for("causal", 16), causal()

    def pack(folder):
        return pack_dataset(streamed(samples), collator, folder=folder, window_tokens=WINDOW)

    def pack_until(number, folder):
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            inside = any(
                isinstance(one, (str, bytes, os.PathLike)) and str(folder) in os.fsdecode(one) for one in arguments
            )
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and inside:
                seen += 1
                if seen > number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        pack(folder)

    pack(tmp_path / "whole")
    expected, states = file_contents(tmp_path / "whole"), set()
    for number in range(200):
        folder = tmp_path / str(number) / "rows"
        ended = in_child(lambda number=number, folder=folder: pack_until(number, folder))
        if folder.exists():
            states.add(tuple(file_contents(folder)))
            assert list(pack(folder)) == list(PackedRows(tmp_path / "whole"))
            assert file_contents(folder) == expected
        if ended == 0:
            break
    assert number > 12 and len(states) >= 6 and ended == 0


def test_a_run_goes_on_behind_its_complete_files(tmp_path):
    class Watched(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    samples, collator, folder = samples_for("causal"), causal(), tmp_path / "rows"
    options = {"folder": folder, "window_tokens": WINDOW}
    broken = [*samples[:-1], {"input_ids": [1, -2]}]
    with pytest.raises(ValueError, match=r"in the window of \d+ samples from number \d+ on: sample \d+ of .* id -2"):
        pack_dataset(broken, collator, **options)
    shards = json.loads((folder / "packed_rows.json").read_text("utf-8"))["shards"]
    done, read = sum(shard["samples"] for shard in shards), []
    assert done > 40
    rows = pack_dataset(Watched(samples), collator, **options)
    assert list(rows) == list(pack_dataset(samples, collator, folder=tmp_path / "whole", window_tokens=WINDOW))
    looked_at = read[: -(60 - done)]
    assert read[-(60 - done) :] == list(range(done, 60)) and len(looked_at) <= 4 * len(shards)
    read.clear()
    assert list(pack_dataset(Watched(samples), collator, **options)) == list(rows)
    assert len(read) <= 4 * (len(shards) + 1)


def test_of_a_stream_its_first_samples_are_compared_with_a_complete_folder(tmp_path):
    samples, collator = samples_for("causal"), causal()
    options = {"folder": tmp_path / "rows", "window_tokens": WINDOW}
    rows = pack_dataset(streamed(samples), collator, **options)

    def begun():
        yield from samples[:4]
        raise AssertionError("read on")

    assert list(pack_dataset(begun(), collator, **options)) == list(rows)
    before = file_contents(tmp_path / "rows")
    others = samples_for("causal", seed=1)
    for other in (others, [*samples[:3], others[3]], samples[:3], samples[1:], []):
        for source in ("generator", "stream of datasets") if other else ("generator",):
            with pytest.raises(
                ValueError, match=r"packed from another source \(its samples 0 to 3 are others, or miss"
            ):
                pack_dataset(SOURCES[source](other), collator, **options)
    assert file_contents(tmp_path / "rows") == before
    few = tmp_path / "few"
    pack_dataset(streamed(samples[:2]), collator, folder=few)
    with pytest.raises(ValueError, match="its samples 0 to 1 are others, or missing"):
        pack_dataset(streamed(others), collator, folder=few)


@pytest.mark.parametrize("size", [150, 1_200])
def test_a_full_disk_is_one_line_and_another_call_recovers(size, tmp_path):
    """No file of this process grows beyond some bytes: of the smaller size the manifest, else a file of rows."""
    samples, collator, folder = samples_for("causal"), causal(), tmp_path / "rows"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        with pytest.raises(OSError, match="the disk is full, or a quota is reached") as caught:
            pack_dataset(samples, collator, folder=folder, window_tokens=WINDOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob(".*"))
    rows = pack_dataset(samples, collator, folder=folder, window_tokens=WINDOW)
    assert list(rows) == list(pack_dataset(samples, collator, folder=tmp_path / "whole", window_tokens=WINDOW))


# --- what is refused ---


def test_other_settings_are_refused_by_name(tmp_path):
    samples, folder = samples_for("causal"), tmp_path / "rows"
    before = list(pack_dataset(samples, causal(), folder=folder))
    for collator, options, told in (
        (causal(max_length=16), {}, "`max_length` was 32, now 16"),
        (causal(overlong="truncate"), {}, "`overlong` was 'split', now 'truncate'"),
        (causal(pad_token_id=1), {}, "`pad_token_id` was 0, now 1"),
        (prefix(), {}, "`type` was 'DataCollatorForCausalLM', now 'DataCollatorForPrefixLM'"),
        (causal(), {"fixed_prefixes": True}, "`fixed_prefixes` was False, now True"),
        (causal(), {"window_tokens": 500}, "`window_tokens` was 4000000, now 500"),
    ):
        with pytest.raises(ValueError, match=f"holds rows of other settings .*{told}.*: repeat them, or choose"):
            pack_dataset(samples, collator, folder=folder, **options)
    # These show in the tensors only.
    same = causal(padding="max_length", pad_to_multiple_of=8, seed=3)
    assert list(pack_dataset(samples, same, folder=folder)) == before


def test_prefix_settings_count_where_prefixes_are_fixed(tmp_path):
    samples = samples_for("prefix", 5)
    for fixed in (False, True):
        options = {"folder": tmp_path / str(fixed), "fixed_prefixes": fixed}
        pack_dataset(samples, prefix(), **options)
        other = prefix(seed=1, prefix_fraction=(0.5, 0.5))
        if fixed:
            with pytest.raises(ValueError, match=r"`seed` was 0, now 1, `prefix_fraction` was \[0.0, 1.0\]"):
                pack_dataset(samples, other, **options)
        else:
            pack_dataset(samples, other, **options)


def test_settings_of_blanks_count_too(tmp_path):
    options = {"folder": tmp_path / "rows"}
    pack_dataset(samples_for("glm", 5), glm(max_length=LENGTH), **options)
    pack_dataset(samples_for("glm", 5), glm(max_length=LENGTH), **options)
    arguments = {"max_length": LENGTH, "mixture": {"token": 1.0}, **IDS}
    with pytest.raises(ValueError, match="`mixture` was"):
        pack_dataset(samples_for("glm", 5), DataCollatorForGLM(**arguments), **options)


@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "begun"])
def test_another_source_is_refused(is_complete, tmp_path):
    samples, collator, folder = samples_for("causal"), causal(), tmp_path / "rows"
    options = {"folder": folder, "window_tokens": WINDOW}
    if is_complete:
        pack_dataset(samples, collator, **options)
    else:
        with pytest.raises(ValueError, match="id -2"):
            pack_dataset([*samples[:-1], [1, -2]], collator, **options)
    before = file_contents(folder)
    starts = json.loads(before["packed_rows.json"])["shards"]
    second = starts[0]["samples"]
    changed = [*samples[:second], {"input_ids": [5, 6, 7]}, *samples[second + 1 :]]
    differing = rf"was packed from another source \(its samples {second} to \d+ are others, or missing\)"
    with pytest.raises(ValueError, match=differing):
        pack_dataset(changed, collator, **options)
    with pytest.raises(ValueError, match=r"it had 60 samples, this one has 61\): give that one, from its beginning"):
        pack_dataset([*samples, [1, 2]], collator, **options)
    if not is_complete:
        with pytest.raises(ValueError, match=differing):
            pack_dataset(streamed(changed), collator, **options)
        with pytest.raises(ValueError, match="its samples 0 to 3 are others, or missing"):
            pack_dataset(iter([]), collator, **options)
    assert file_contents(folder) == before


def test_files_of_others_stay(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    pack_dataset(samples_for("causal"), causal(), folder=folder)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "more").is_dir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows-00003.arrow").write_text("mine")
    with pytest.raises(ValueError, match=r"holds rows-00003.arrow, which is not of this run: choose another folder"):
        pack_dataset(samples_for("causal"), causal(), folder=other)
    assert file_contents(other) == {"rows-00003.arrow": b"mine"}
    with pytest.raises(ValueError, match=r"notes\.txt is a file: choose another folder"):
        pack_dataset(samples_for("causal"), causal(), folder=tmp_path / "rows" / "notes.txt")


def test_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "rows"
    with pytest.raises(ValueError, match="holds no packed rows: `pack_dataset"):
        PackedRows(folder)
    pack_dataset(samples_for("causal"), causal(), folder=folder, window_tokens=WINDOW)
    file = folder / "rows-00001.arrow"
    content = file.read_bytes()
    for text, told in ((content[:-8], "has [0-9,]+ bytes in place of [0-9,]+: remove"), (None, "is missing: remove")):
        file.unlink() if text is None else file.write_bytes(text)
        with pytest.raises(ValueError, match=f"rows-00001.arrow {told} the folder, and pack again"):
            PackedRows(folder)
    file.write_bytes(content)
    manifest = folder / "packed_rows.json"
    values = json.loads(manifest.read_text("utf-8"))
    for text, told in (
        (json.dumps({**values, "format": 99}), "is of another version of MiniLLM"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"format": 1}), "is damaged"),
    ):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=f"packed_rows.json {told}"):
            PackedRows(folder)


def test_one_process_at_a_time(tmp_path):
    folder, ready, done = tmp_path / "rows", threading.Event(), threading.Event()

    def hold():
        with reserved(folder):
            ready.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait(20)
    try:
        with pytest.raises(FolderInUse, match=f"is being written by process {os.getpid()} since"):
            pack_dataset([[1, 2]], causal(), folder=folder)
    finally:
        done.set()
        holder.join()
    rows = pack_dataset([[1, 2]], causal(), folder=folder)
    with reserved(folder):
        assert list(pack_dataset([[1, 2]], causal(), folder=folder)) == list(rows)


def test_arguments_are_refused_by_name(tmp_path):
    folder = tmp_path / "rows"
    for samples, options, told in (
        ([[1, 2]], {"window_tokens": 100}, "`window_tokens` is 100, but only packing into a `folder`"),
        (streamed([[1, 2]]), {}, "a generator is a stream, whose rows need a place: give a `folder`"),
        ([[1, 2]], {"folder": folder, "window_tokens": 0}, "`window_tokens` is 0; needed: 1 to"),
        ({"train": [[1, 2]]}, {"folder": folder}, "`samples` is a mapping with 'train': give one of these"),
        ([], {"folder": folder}, "there are no samples to pack"),
        ([[1], [2]], {"folder": folder}, "the data set holds no token to score"),
        ([[1], [2]], {"folder": tmp_path / "unscored", "window_tokens": 1}, "the data set holds no token to score"),
        ([[1, 2**31]], {"folder": folder}, "`input_ids` hold 2147483648; rows on disk hold ids up to 2147483647"),
        ([5], {"folder": folder}, "sample 0 of 1: `input_ids` must be a flat list"),
    ):
        with pytest.raises(ValueError, match=told):
            pack_dataset(samples, causal(), **options)
    with pytest.raises(ValueError, match="needs a collator with `packing=True`"):
        pack_dataset([[1, 2]], causal(packing=False), folder=folder)


def test_nothing_stays_of_a_run_that_cannot_begin(tmp_path):
    with pytest.raises(ValueError, match="id -2"):
        pack_dataset([[1, -2]], causal(), folder=tmp_path / "new" / "rows")
    assert list(tmp_path.iterdir()) == []


def test_windows_without_a_score_are_left_out_with_a_warning(tmp_path, caplog):
    logging.enable_propagation()
    try:
        samples = [[1, 2, 3], *[[5]] * 8, [4, 5]]
        rows = pack_dataset(samples, causal(), folder=tmp_path / "rows", window_tokens=3)
    finally:
        logging.disable_propagation()
    assert [row["input_ids"] for row in rows] == [[1, 2, 3], [4, 5]]
    assert "3 samples from number 1 on hold no token to score and are left out" in caplog.text


def test_without_pyarrow_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^rows on disk need pyarrow: pip install 'minillm-hf\[train\]'$"):
        pack_dataset([[1, 2]], causal(), folder=tmp_path / "rows")
    assert len(pack_dataset([[1, 2]], causal())) == 1


# --- the rest of the house ---


@pytest.mark.mostly_thorough("prefix-0")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_trainer_learns_from_them_as_from_a_list(variant, workers, tmp_path):
    runs = []
    for number, folder in enumerate((None, tmp_path / "rows")):
        collator = collator_for(variant)
        rows = pack_dataset(counting_documents(60), collator, folder=folder)
        options = {"max_steps": 8, "dataloader_num_workers": workers if folder else 0}
        trainer = make_trainer(tiny_model(variant), rows, collator, tmp_path / f"run-{number}", **options)
        trainer.train()
        runs.append((losses(trainer), parameters(trainer.model), perplexity(trainer.model, rows, collator)))
    assert runs[0][0] == runs[1][0] and largest_difference(runs[0][1], runs[1][1]) == 0.0
    assert runs[0][2] == runs[1][2]


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    def trainer_in(folder, **arguments):
        collator = prefix(max_length=32)
        rows = pack_dataset(counting_documents(60), collator, folder=tmp_path / "rows")
        return make_trainer(tiny_model("prefix"), rows, collator, folder, save_steps=5, max_steps=8, **arguments)

    whole = trainer_in(tmp_path / "whole")
    whole.train()
    first = trainer_in(tmp_path / "first", save_strategy="steps")
    first.train()
    second = trainer_in(tmp_path / "first")
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-5"))
    assert losses(second) == losses(whole)
    assert largest_difference(parameters(second.model), parameters(whole.model)) == 0.0


def test_fixed_prefixes_are_evaluated_as_from_a_list(tmp_path):
    collator = collator_for("prefix")
    documents, model = counting_documents(20), tiny_model("prefix")
    rows = pack_dataset(documents, collator, fixed_prefixes=True, folder=tmp_path / "rows")
    expected = perplexity(model, pack_dataset(documents, collator, fixed_prefixes=True), collator)
    collator.set_epoch(3)
    assert perplexity(model, rows, collator) == expected


def test_the_benchmark_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_on_disk, "LOOKS", 20)
    folder = tmp_path / "rows"
    found = [rows_on_disk.run(way, 50_000, 256, str(folder)) for way in (rows_on_disk.DISK, rows_on_disk.MEMORY)]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert found[0]["bytes_per_token"] == size / PackedRows(folder).num_tokens < 8
    # Longer documents are split, and a piece of one token takes its predecessor along.
    assert 50_000 <= found[0]["tokens"] == found[1]["tokens"] < 50_100 and found[0]["rows"] == found[1]["rows"]
    assert found[0]["peak_bytes"] > found[0]["bytes_before"] > 0
    assert "| in a folder | 50,0" in rows_on_disk.table(found)
