"""`minillm demo`: corpora and folders that it refuses before any work, other corpora, and a real Ctrl-C."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import fail, invoke, python_source, succeed, tree, write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

import minillm.cli.demo as demo_module
from minillm.cli.demo import other_kind_of_text
from minillm.cli.progress import fastest_thread_count
from minillm.data import TextDocument


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(demo_module.ARCHITECTURE, "hidden_size", 32)
    monkeypatch.setitem(demo_module.ARCHITECTURE, "num_hidden_layers", 1)
    monkeypatch.setattr(demo_module, "LENGTH", 32)
    monkeypatch.setattr(demo_module, "HELD_OUT_ROWS", 8)
    monkeypatch.setattr(demo_module, "fastest_thread_count", lambda run: (1, 0.0))
    # A process of its own takes seconds; another file tests it.
    monkeypatch.setattr(demo_module.Demo, "visit_as_stranger", lambda demo: {})


def bad_corpora(folder):
    """Corpora that cannot be used, with a word of the error that each must give."""
    (folder / "empty").mkdir()
    (folder / "binary").mkdir()
    (folder / "binary" / "a.bin").write_bytes(b"\x00\x01\x02" * 50)
    (folder / "latin.txt").write_bytes("größer".encode("latin-1"))
    (folder / "blank.txt").write_text("\u3000 \n" * 5000, "utf-8")
    (folder / "short.txt").write_text("print()\n" * 20, "utf-8")
    (folder / "lone").mkdir()
    (folder / "lone" / "a.py").write_text(python_source(0), "utf-8")
    return {
        "missing": "does not exist",
        "empty": "holds no text",
        "binary": "is binary",
        "latin.txt": "not UTF-8",
        "blank.txt": "nothing but white space",
        "short.txt": "cannot be split into training and held-out text",
        "lone": "cannot be split into training and held-out text",
    }


@pytest.mark.parametrize("name", ["missing", "empty", "binary", "latin.txt", "blank.txt", "short.txt", "lone"])
def test_a_bad_corpus_is_one_line_and_leaves_no_folder(name, tmp_path):
    words = bad_corpora(tmp_path)[name]
    before = tree(tmp_path)
    told = fail("demo", "--out", tmp_path / "new" / "demo", "--corpus", tmp_path / name)
    assert words in told
    assert tree(tmp_path) == before


def test_an_unreadable_corpus_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", files=2)
    opened = Path.open

    def refuse(path, *mode, **options):
        if path.name == "module_1.py":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode, **options)

    # A permission bit would not stop the tests of a super-user.
    monkeypatch.setattr(Path, "open", refuse)
    told = fail("demo", "--out", tmp_path / "demo", "--corpus", corpus)
    assert "module_1.py cannot be read: Permission denied" in told
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", "utf-8")
    (tmp_path / "file").write_text("mine", "utf-8")
    before = tree(tmp_path)
    told = fail("demo", "--out", tmp_path / "mine", "--corpus", corpus)
    assert "is not empty and holds no earlier demo: choose another --out" in told
    assert "file is a file: choose another --out" in fail("demo", "--out", tmp_path / "file", "--corpus", corpus)
    (tmp_path / "mine" / "state.json").write_text("{", "utf-8")
    assert "state.json is damaged" in fail("demo", "--out", tmp_path / "mine", "--corpus", corpus)
    (tmp_path / "mine" / "state.json").write_text("[]", "utf-8")
    assert "state.json is damaged" in fail("demo", "--out", tmp_path / "mine", "--corpus", corpus)
    (tmp_path / "mine" / "state.json").unlink()
    assert tree(tmp_path) == before


def test_other_settings_in_the_same_folder_are_refused(small, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=6)
    other = write_corpus(tmp_path / "other", files=6)
    common = {"--out": tmp_path / "demo", "--corpus": corpus, "--steps": 1, "--vocab-size": 300, "--seed": 1}

    def command(**changes):
        options = common | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        return ("demo", *(part for pair in options.items() for part in pair))

    succeed(*command())
    state = (tmp_path / "demo" / "state.json").read_bytes()
    assert "begun with other settings ({'steps': 1})" in fail(*command(steps=2))
    assert "begun with other settings ({'seed': 1})" in fail(*command(seed=2))
    assert "begun with other settings ({'vocab_size': 300})" in fail(*command(vocab_size=301))
    assert str(corpus) in fail(*command(corpus=other))
    assert "({'corpus': " in fail("demo", "--out", tmp_path / "demo", "--steps", 1, "--vocab-size", 300, "--seed", 1)
    assert (tmp_path / "demo" / "state.json").read_bytes() == state


@pytest.mark.parametrize("arguments", [["--steps", 0], ["--vocab-size", 299], ["--steps", "many"]])
def test_numbers_out_of_range_are_refused(arguments, tmp_path):
    result = invoke("demo", "--out", tmp_path / "demo", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.output
    assert tree(tmp_path) == []


def test_a_corpus_without_docstrings_is_tuned_to_its_lines_backwards(small, tmp_path):
    file = tmp_path / "chinese.txt"
    file.write_text("".join(f"第{number}行：你好，世界！Peking 是首都。\n" for number in range(1500)), "utf-8")
    told = succeed("demo", "--out", tmp_path / "demo", "--corpus", file, "--steps", 8, "--vocab-size", 320)
    assert "lora: perplexity on lines backwards" in told
    lora = json.loads((tmp_path / "demo" / "report.json").read_text("utf-8"))["lora"]
    assert lora["text"] == "lines backwards" and lora["perplexity_after"] < lora["perplexity_before"]
    assert "LoRA on lines backwards" in (tmp_path / "demo" / "report.md").read_text("utf-8")


@pytest.mark.mostly_thorough("1")
@pytest.mark.parametrize("steps", [1, 4])
def test_every_stage_of_a_short_demo_learns(steps, small, tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus", files=20), tmp_path / "demo"
    succeed("demo", "--out", out, "--corpus", corpus, "--steps", steps, "--vocab-size", 300)
    stages = json.loads((out / "state.json").read_text("utf-8"))["stages"]
    assert len(stages["causal"]["curve"]) == steps and len(stages["lora"]["curve"]) == 4
    fresh = math.log(300) + demo_module.ARCHITECTURE["initializer_range"] ** 2 * 32 / 2
    assert all(stages[name]["perplexity"] < 0.97 * math.exp(fresh) for name in ("causal", "prefix", "alibi"))
    assert stages["lora"]["perplexity_after"] < 0.99 * stages["lora"]["perplexity_before"]


def test_the_other_kind_of_text():
    sources = [TextDocument(f"{number}.py", python_source(number)) for number in range(2)]
    plain = [TextDocument("a.txt", "ab c\n\ndé")]
    words, train, held_out = other_kind_of_text(sources[:1], sources[1:])
    assert words == "docstring prose" and len(train) == len(held_out) == 1
    assert "def " not in train[0].text and train[0].text.splitlines()[0] in sources[0].text
    for pair in ((plain, plain), (sources, plain), (plain, sources)):
        words, *parts = other_kind_of_text(*pair)
        assert words == "lines backwards"
        for part, documents in zip(parts, pair, strict=True):
            assert [document.name for document in part] == [document.name for document in documents]
    assert other_kind_of_text(plain, plain)[1][0].text == "c ba\n\néd"


def test_the_faster_number_of_threads_is_taken(monkeypatch):
    """On a made-up clock: a run takes 3 s with one thread and 1 s a thread with more."""
    now = [0.0]
    monkeypatch.setattr("minillm.cli.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("minillm.cli.progress.os.cpu_count", lambda: 2)
    before = torch.get_num_threads()
    try:
        for cost, expected in (({1: 3.0, 2: 2.0}, (2, 2.0)), ({1: 3.0, 2: 4.0}, (1, 3.0))):

            def run(cost=cost):
                now[0] += cost[torch.get_num_threads()]

            assert fastest_thread_count(run) == expected
    finally:
        torch.set_num_threads(before)


def demo_process(out, corpus):
    command = [sys.executable, "-m", "minillm", "demo", "--out", str(out), "--corpus", str(corpus)]
    return subprocess.Popen(
        [*command, "--steps", "16", "--vocab-size", "300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A test run in the background may have been told to ignore the signal, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.thorough
@pytest.mark.slow
def test_ctrl_c_in_a_real_process_and_going_on(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=60)
    reports = {}
    for name, stops in (("whole", 0), ("broken", 1)):
        out = tmp_path / name
        if stops:
            process = demo_process(out, corpus)
            for line in process.stdout:
                if line.startswith("prefix") and "step 9/16" in line:
                    process.send_signal(signal.SIGINT)
                    break
            _, complaint = process.communicate(timeout=120)
            assert process.returncode == 130
            assert complaint == "interrupted: what was saved stays; the same command goes on from there\n"
            assert (out / "causal" / "model.safetensors").exists() and not (out / "prefix").exists()
        process = demo_process(out, corpus)
        told, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
        # Neither bars nor warnings of libraries.
        assert complaint == ""
        if stops:
            assert "skipped causal: finished in an earlier run" in told
            # Every fourth step is saved; the signal may come some steps late.
            assert re.search(r"prefix: going on from checkpoint-(8|12)\n", told)
        assert "loaded and generated in a process without MiniLLM: causal, prefix, alibi, lora" in told
        reports[name] = json.loads((out / "report.json").read_text("utf-8"))
    # The two runs may have measured another number of threads.
    for name, variant in reports["whole"]["variants"].items():
        found = reports["broken"]["variants"][name]
        assert found["tokens"] == variant["tokens"]
        assert found["perplexity"] == pytest.approx(variant["perplexity"], rel=1e-2)


@pytest.mark.thorough
@pytest.mark.slow
def test_the_standard_library_is_the_corpus_of_a_demo_without_one(tmp_path):
    """One step of each stage on the real corpus: what the numbers count and that models load and speak."""
    process = subprocess.run(
        [sys.executable, "-m", "minillm", "demo", "--out", str(tmp_path / "demo"), "--steps", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0 and process.stderr == "", process.stderr
    report = json.loads((tmp_path / "demo" / "report.json").read_text("utf-8"))
    assert report["settings"]["corpus"] is None and report["lora"]["text"] == "docstring prose"
    assert report["baselines"]["tokens"] > 160 * 256 * 0.95
    # So few steps see too little text for pairs of tokens to tell more than single ones.
    assert all(1 < report["baselines"][kind] < 512 for kind in ("unigram", "bigram"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "causal")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "demo" / "tokenizer")) == 512
