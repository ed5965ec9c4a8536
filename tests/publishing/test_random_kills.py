"""Training, conversion, saving and tokenizers that are killed, or find the disk full, at moments drawn at random.

A moment is a file operation below the folder, which a failing case names, or a share of the time that the whole takes.
"""

import functools
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from cli_cases import invoke, python_source, save_small_model, tree
from folder_cases import (
    ENDINGS,
    at_event,
    events_of,
    fingerprint,
    in_child,
    llama,
    loaded,
    loaded_tokenizer,
    model,
    processes,
    tokenizer,
)
from hypothesis import strategies as st
from random_cases import random_test
from transformers import LlamaForCausalLM

from minillm.conversion import convert, export

pytestmark = pytest.mark.usefixtures("without_bars")


def command(*arguments):
    def run(folder):
        result = invoke(*(each.format(root=folder.parent, out=folder) for each in arguments))
        if result.exit_code and "the disk is full" in result.stderr:
            os._exit(3)
        assert result.exit_code == 0, result.output

    return run


def native(folder):
    """What loads from an exported folder."""
    if not folder.exists():
        return None
    return fingerprint(LlamaForCausalLM.from_pretrained(folder))


def tokenizer_or_nothing(folder):
    return loaded_tokenizer(folder)[::2] if folder.exists() else None


TRAIN = "train --model {root}/small --data {root}/texts --out {out} --max-steps 6 --batch-size 2".split()
WORK = {
    "save": (lambda folder: model(1, hidden_size=24).save_pretrained(folder), loaded),
    "save in shards": (lambda folder: model(1).save_pretrained(folder, max_shard_size="6KB"), loaded),
    "save a tokenizer": (lambda folder: tokenizer("other words", None).save_pretrained(folder), loaded_tokenizer),
    "convert": (lambda folder: convert(folder.parent / "llama", folder, overwrite=True), loaded),
    "export": (lambda folder: export(folder.parent / "plain", folder, "llama", overwrite=True), native),
    "train": (command(*TRAIN), loaded),
    "train a tokenizer": (
        command(*"tokenizer train {root}/texts --out {out} --vocab-size 400".split()),
        tokenizer_or_nothing,
    ),
}
FRESH = ("train", "train a tokenizer", "export")
"""Work that writes a folder anew."""


@functools.cache
def sources():
    """A folder with what the work reads, and what each makes of it, its number of file operations and its seconds."""
    holder = tempfile.TemporaryDirectory()
    root = Path(holder.name)
    save_small_model(root / "small")
    llama(root / "llama")
    model(0).save_pretrained(root / "plain")
    (root / "texts").mkdir()
    for number in range(3):
        (root / "texts" / f"{number}.py").write_text(python_source(number), "utf-8")
    return holder, root


@functools.cache
def whole(name):
    """What the work leaves if nothing ends it, its number of file operations, and the seconds it takes."""
    work, load = WORK[name]
    with prepared(name) as root:
        count = events_of(root, lambda: work(root / "out"))
    with prepared(name) as root:
        old, started = load(root / "out"), time.monotonic()
        assert in_child(work, root / "out") == 0
        return old, load(root / "out"), count, time.monotonic() - started


class prepared(tempfile.TemporaryDirectory):
    """A folder of its own with the sources, and what the work is to replace."""

    def __init__(self, name):
        super().__init__()
        self.work = name

    def __enter__(self):
        root = Path(super().__enter__())
        for path in sources()[1].iterdir():
            shutil.copytree(path, root / path.name)
        if self.work not in FRESH:
            model(0).save_pretrained(root / "out")
        if self.work == "save a tokenizer":
            tokenizer("some text", "{{ messages }}").save_pretrained(root / "out")
        return root


def end_at(work, folder, kind, share, count, seconds):
    """Runs the work in a process of its own that ends before its time."""
    if kind == "by the clock":
        child = processes.Process(target=work, args=(folder,))
        child.start()
        time.sleep(share * seconds)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return

    def cut_off():
        at_event(int(share * count), folder.parent, ENDINGS[kind])
        work(folder)

    in_child(cut_off)


MOMENTS = st.lists(
    st.tuples(st.sampled_from([*ENDINGS, "by the clock"]), st.floats(0, 1, width=16)), min_size=1, max_size=2
)


def end_and_recover(name, moments):
    """Old or new content loads after each end, and another run leaves what it always leaves, and nothing else."""
    (work, load), (old, new, count, seconds) = WORK[name], whole(name)
    assert new is not None and old != new
    with prepared(name) as root:
        for kind, share in moments:
            end_at(work, root / "out", kind, share, count, seconds)
            assert load(root / "out") in (old, new), tree(root)
        if load(root / "out") == new and name in FRESH:
            # They write nothing over a folder that is whole.
            return
        assert in_child(work, root / "out") == 0, tree(root)
        assert load(root / "out") == new
        left = {path.name for path in root.iterdir()} - {path.name for path in sources()[1].iterdir()}
        assert left <= {"out", "out-checkpoints", "out-run"}, tree(root)
        assert not [path for path in tree(root) if path.rpartition("/")[2].startswith(".")]


QUICK = ["save", "save in shards", "save a tokenizer", "convert", "train a tokenizer"]


@random_test(quick=8, full=600, name=st.sampled_from(QUICK), moments=MOMENTS)
def test_old_or_new_is_there_whenever_a_process_ends(name, moments):
    end_and_recover(name, moments)


@random_test(quick=1, full=120, name=st.sampled_from(["train", "export"]), moments=MOMENTS)
def test_long_work_that_ends_is_done_by_another_run(name, moments):
    end_and_recover(name, moments)
