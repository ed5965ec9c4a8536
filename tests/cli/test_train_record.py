"""What `minillm train` says while it runs, and what it leaves beside the model."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cli_cases import fail, invoke, succeed, tree
from hub_server import running_hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.cli import progress
from minillm.data import load_corpus, split_corpus, tokenize_documents
from minillm.evaluation import perplexity
from minillm.evaluation.held_out import score_held_out
from minillm.publishing.cards import model_card, read_summary
from minillm.training import DataCollatorForCausalLM, pack_dataset

STEPS = 12


@pytest.fixture(scope="module")
def ran(small, tmp_path_factory):
    """A run with all it leaves: the folder of the model, and what was printed."""
    out = tmp_path_factory.mktemp("ran") / "out"
    start = ("--model", small["causal"], "--data", small["corpus"], "--out", out, "--max-steps", STEPS)
    return out, succeed("train", *start, "--batch-size", 4, "--learning-rate", 0.01, "--eval-steps", 4)


def record(ran, name):
    return (ran[0].with_name("out-run") / name).read_text("utf-8")


def test_it_first_says_what_a_step_takes(ran):
    out, told = ran
    lines = told.splitlines()
    count = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert lines[1] == f"parameters: {count:,}, of which {count:,} are trained"
    assert lines[2].startswith("a step: 4 rows of 64 tokens: 256, ")
    memory = re.match(
        r"memory: 312 kB of weights, 312 kB of gradients, 624 kB of the optimizer, (.*) of activ", lines[3]
    )
    assert memory and "step 1/12  loss" in lines[4]


def test_each_step_has_a_line_with_speed_and_times(ran):
    lines = [line for line in ran[1].splitlines() if "━" in line or "╌" in line]
    pattern = (
        r"causal +[━╌]{20} step (\d+)/12  loss [\d.]+  rate [\d.e+-]+  [\d,]+ tokens/s  [\d:]+ elapsed, [\d:]+ left"
    )
    assert [int(re.fullmatch(pattern, line)[1]) for line in lines] == list(range(1, STEPS + 1))


def test_evaluations_in_between_say_a_perplexity_and_are_not_made_twice(ran, small):
    _, told = ran
    assert re.findall(r"^step (\d+): perplexity [\d.]+ held out$", told, re.M) == ["4", "8", "12"]
    rows = [json.loads(line) for line in record(ran, "metrics.jsonl").splitlines()]
    scores = {row["step"]: row["eval_perplexity"] for row in rows if "eval_loss" in row}
    assert f"held-out perplexity {scores[12]:.2f} on" in told


def held_out(out, corpus):
    tokenizer = AutoTokenizer.from_pretrained(out)
    collator = DataCollatorForCausalLM(tokenizer, max_length=64)
    samples = tokenize_documents(split_corpus(load_corpus(corpus))[1], tokenizer)
    return collator, pack_dataset(samples, collator, fixed_prefixes=True)


def test_the_report_holds_perplexity_interval_and_loss_by_frequency(ran, small):
    out, _ = ran
    collator, rows = held_out(out, small["corpus"])
    model, page = AutoModelForCausalLM.from_pretrained(out), record(ran, "report.md")
    expected = perplexity(model, rows, collator)
    score = score_held_out(model, rows, collator)
    low, high = score.interval(0)
    assert low < expected.perplexity < high
    line = f"perplexity {expected.perplexity:.2f} on {expected.num_tokens:,} tokens of {len(score.losses)} documents"
    assert f"{line} (95 % interval {low:.2f} to {high:.2f})" in page
    cells = re.findall(r"^\| (\d+|never seen) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", page, re.M)
    tokens = np.array([int(cell[2].replace(",", "")) for cell in cells])
    losses = np.array([float(cell[3]) for cell in cells])
    assert tokens.sum() == expected.num_tokens
    assert (tokens * losses).sum() / tokens.sum() == pytest.approx(expected.nll, abs=1e-3)
    for topic in ("cost", "memory", "peak of memory", "checkpoints", "learning rate", "steps"):
        assert f"- **{topic}**: " in page
    assert "![loss](curve.png)" in page and page.count("⟶") >= 1


def test_the_settings_are_there_in_full(ran):
    settings = json.loads(record(ran, "settings.json"))
    assert set(settings) == {"options", "run", "trainer", "config", "environment"}
    assert settings["run"]["precision"] == "fp32" and settings["run"]["threads"] == 1
    assert settings["run"]["total_steps"] == STEPS and settings["trainer"]["learning_rate"] == 0.01
    assert settings["config"]["hidden_size"] == 32 and settings["environment"]["torch"]
    assert tree(ran[0].with_name("out-run")) == sorted(
        ["curve.png", "metrics.jsonl", "options.yaml", "report.md", "settings.json"]
    )


def test_the_card_takes_the_numbers(ran):
    out, told = ran
    figure = re.search(r"held-out (perplexity .*)", told)[1]
    section = read_summary(out)
    assert f"- **held-out**: {figure}\n" in section and "objective causal" in section
    model = AutoModelForCausalLM.from_pretrained(out)
    assert "## Training" not in str(model_card(model))
    model.training_summary = section
    assert str(model_card(model)).strip() == (out / "README.md").read_text("utf-8").strip()


@pytest.mark.slow
def test_an_upload_keeps_them(ran, tmp_path):
    out, _ = ran
    section = read_summary(out)
    with running_hub(tmp_path / "hub") as environment:
        code = (
            "import sys; from minillm.cli.publishing import push_model; push_model(sys.argv[1], 'user/model')\n"
            "from huggingface_hub import HfApi; import pathlib; api = HfApi()\n"
            "print(sorted(api.list_repo_files('user/model')))\n"
            "print(pathlib.Path(api.hf_hub_download('user/model', 'README.md')).read_text())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(out)],
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert section.strip() in done.stdout and "metrics.jsonl" not in done.stdout


def test_the_record_of_another_run_is_not_written_over(small, tmp_path):
    out = tmp_path / "out"
    start = ("train", "--model", small["causal"], "--data", small["corpus"], "--out", out, "--max-steps", 1)
    (tmp_path / "out-run").mkdir()
    (tmp_path / "out-run" / "mine.txt").write_text("mine", "utf-8")
    assert "out-run is not empty" in fail(*start)
    (tmp_path / "out-run" / "mine.txt").rename(tmp_path / "out-run" / "report.md")
    assert "holds the record of a finished run: move it away" in fail(*start)
    assert tree(tmp_path) == ["out-run", "out-run/report.md"]
    # What is left of a run that came to nothing goes.
    (tmp_path / "out-run" / "report.md").rename(tmp_path / "out-run" / "metrics.jsonl")
    succeed(*start)
    assert len((tmp_path / "out-run" / "metrics.jsonl").read_text("utf-8").splitlines()) == 1


def test_without_matplotlib_there_is_no_picture(small, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name))
    start = ("--model", small["causal"], "--data", small["corpus"], "--out", tmp_path / "out", "--max-steps", 1)
    succeed("train", *start)
    assert "curve.png" not in tree(tmp_path / "out-run")
    assert "![" not in (tmp_path / "out-run" / "report.md").read_text("utf-8")


@pytest.mark.parametrize("objective", ["sft", "glm"])
def test_samples_go_on_from_held_out_prompts(objective, small, tmp_path):
    from cli_cases import write_answers

    data = write_answers(tmp_path / "data.jsonl", "prompts") if objective == "sft" else small["corpus"]
    start = ("--model", small["prefix"], "--data", data, "--out", tmp_path / "out", "--max-steps", 1)
    succeed("train", *start, "--objective", objective)
    page = (tmp_path / "out-run" / "report.md").read_text("utf-8")
    assert page.count("⟶") == (2 if objective == "sft" else 1)
    assert objective == "glm" or "38 plus 1 is⟶" in page


def test_no_more_rows_are_scored_than_asked_for(small, tmp_path):
    start = ("--model", small["causal"], "--data", small["corpus"], "--out", tmp_path / "out", "--max-steps", 1)
    told = succeed("train", *start, "--eval-rows", 2)
    assert " 2 held out" in told or "10 held out" in told
    tokens = int(re.search(r"held-out perplexity .* on ([\d,]+) tokens", told)[1].replace(",", ""))
    assert tokens <= 2 * 63


def test_a_terminal_shows_one_line_in_place(monkeypatch):
    import io

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    line = progress.Line()
    with line.counting("held-out rows", 3) as advance:
        for _ in range(3):
            advance(1)
    told = screen.getvalue()
    assert "held-out rows: 1 of 3" in told and "held-out rows: 3 of 3" in told
    assert re.search(r"0:00:00 elapsed, 0:00:00 left", told)
    # Drawn over, and gone in the end.
    assert told.count("\n") <= 1 and line.live is None


def test_a_log_hears_of_a_long_evaluation_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Line().counting("held-out rows", 8) as advance:
        for _ in range(4):
            advance(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.match(r"held-out rows: \d of 8  [\d:]+ elapsed, [\d:]+ left", line) for line in lines)


@pytest.mark.slow
def test_metrics_are_whole_lines_after_a_kill(small, tmp_path):
    file = tmp_path / "out-run" / "metrics.jsonl"
    command = ["train", "--model", small["causal"], "--data", small["corpus"], "--out", tmp_path / "out"]
    command += ["--max-steps", "5000", "--batch-size", "2", "--trainer", "logging_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minillm", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            time.sleep(0.1)
            if file.exists() and file.read_text("utf-8").count("\n") >= 20:
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    text = file.read_text("utf-8")
    assert text.endswith("\n")
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 20
    assert all(math.isfinite(json.loads(line)["loss"]) for line in text.splitlines())


def test_help_is_quick():
    """Processor time: the machine may be busy."""
    code = (
        "import time, contextlib, io\nstarted = time.process_time()\nfrom minillm.cli.main import app\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): app(['train', '--help'])\n"
        "print(time.process_time() - started)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 1.0


def test_an_error_in_a_command_leaves_no_record(small, tmp_path):
    result = invoke("train", "--model", small["causal"], "--data", tmp_path / "no", "--out", tmp_path / "out")
    assert result.exit_code == 1 and tree(tmp_path) == []
