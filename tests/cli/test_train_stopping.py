"""`minillm train` that is asked to stop, or for more: signals, longer runs, what stays of a finished one."""

import json
import math
import os
import signal

import pytest
from cli_cases import assert_same_weights, fail, invoke, succeed, tree
from safetensors.torch import load_file
from transformers import TrainerCallback

from minillm.cli import training_run

STEPS = 20


class Signalled(TrainerCallback):
    """Sends this process signals in a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_substep_end(self, args, state, control, **kwargs):
        # Between two batches of a step.
        if state.global_step == self.step - 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def signal_in_step(monkeypatch, step, *numbers):
    stock = training_run.LogitFreeTrainer
    monkeypatch.setattr(
        training_run,
        "LogitFreeTrainer",
        lambda *given, callbacks, **named: stock(*given, callbacks=[*callbacks, Signalled(step, *numbers)], **named),
    )


def arguments(small, out, *more, steps=STEPS):
    fixed = ("--model", small["causal"], "--data", small["corpus"], "--batch-size", 2, "--accumulate", 2)
    return ("train", *fixed, "--out", out, "--learning-rate", 0.01, "--max-steps", steps, *more)


def model_of(out):
    return load_file(out / "model.safetensors")


def metrics_of(out):
    file = out.with_name(f"{out.name}-run") / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run that nothing broke."""
    out = tmp_path_factory.mktemp("whole") / "out"
    succeed(*arguments(small, out))
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_has_the_step_finished_and_saved(number, whole, small, tmp_path, monkeypatch):
    out, handlers = tmp_path / "out", [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_in_step(patch, 7, number)
        result = invoke(*arguments(small, out))
    assert result.exit_code == 128 + number
    assert f"{number.name}: this step is finished and saved" in result.stdout
    assert result.stderr == "stopped after step 7 of 20, which is saved: the same command goes on from there\n"
    assert not out.exists()
    assert [path for path in tree(tmp_path / "out-checkpoints") if "/" not in path] == ["checkpoint-7", "options.json"]
    assert [row["step"] for row in metrics_of(out)] == list(range(1, 8))
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    told = succeed(*arguments(small, out))
    assert "going on from" in told and "step 8/20" in told
    assert_same_weights(model_of(out), model_of(whole))
    one, other = metrics_of(out), metrics_of(whole)
    assert [row["loss"] for row in one] == [row["loss"] for row in other]
    assert [row["step"] for row in one] == list(range(1, 21))


def test_a_second_signal_quits_at_once(small, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, 7, signal.SIGTERM, signal.SIGTERM)
    result = invoke(*arguments(small, tmp_path / "out"))
    assert result.exit_code == 130
    assert result.stderr == "interrupted: what was saved stays; the same command goes on from there\n"
    assert "checkpoint-4" in tree(tmp_path / "out-checkpoints")
    assert "checkpoint-7" not in tree(tmp_path / "out-checkpoints")


def test_a_signal_in_the_last_step_ends_nothing(whole, small, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, STEPS, signal.SIGINT)
    succeed(*arguments(small, tmp_path / "out"))
    assert_same_weights(model_of(tmp_path / "out"), model_of(whole))


def test_a_signal_while_held_out_rows_are_scored_stops_after_the_step(small, tmp_path, monkeypatch):
    import minillm.cli.training_evaluation as module

    stock, scored = module.score_held_out, []

    def signalled(model, rows, collator, batch_size, advance):
        def told(count):
            scored.append(count)
            os.kill(os.getpid(), signal.SIGINT)
            advance(count)

        return stock(model, rows, collator, batch_size, told)

    monkeypatch.setattr(module, "score_held_out", signalled)
    result = invoke(*arguments(small, tmp_path / "out", "--eval-steps", 5))
    assert result.exit_code == 130 and "stopped after step 5 of 20" in result.stderr
    assert len(scored) == 1 and "checkpoint-5" in tree(tmp_path / "out-checkpoints")


def test_a_longer_run_goes_on_from_a_finished_one_and_says_so(small, tmp_path):
    out = tmp_path / "out"
    succeed(*arguments(small, out, steps=6))
    short = model_of(out)
    assert "checkpoint-6" in tree(tmp_path / "out-checkpoints")
    told = fail(*arguments(small, out, steps=6))
    assert "this run is finished; more --max-steps go on from its last checkpoint" in told
    assert "was begun for 6 steps and is asked for 5" in fail(*arguments(small, out, steps=5))
    assert "seed was 0 and is 1" in fail(*arguments(small, out, "--seed", 1, steps=9))
    assert_same_weights(model_of(out), short)
    told = succeed(*arguments(small, out, steps=40))
    rates = [row["learning_rate"] for row in metrics_of(out)]
    # A cosine over all 40 steps, after two of warm-up, as far as it was not made yet.
    expected = [0.01 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 38)) for step in range(6, 40)]
    assert rates[6:] == pytest.approx(expected, rel=1e-5)
    assert f"lengthened from 6 to 40 steps: the learning rate goes on at {expected[0]:.2e}" in told
    assert "40 steps in one would have had other rates before step 6" in told
    page = (tmp_path / "out-run" / "report.md").read_text("utf-8")
    assert "from 6 to 40 steps after step 6, which is not what 40 steps in one would have given" in page
    assert any((model_of(out)[name] != short[name]).any() for name in short)
    checkpoints = [path for path in tree(tmp_path / "out-checkpoints") if path.count("/") == 0]
    assert checkpoints == ["checkpoint-40", "options.json"]


def test_an_unfinished_run_may_be_made_longer_too(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signal_in_step(patch, 3, signal.SIGINT)
        assert invoke(*arguments(small, out, steps=6)).exit_code == 130
    told = succeed(*arguments(small, out, steps=8))
    assert "lengthened from 6 to 8 steps" in told and len(metrics_of(out)) == 8


def test_what_stands_in_the_place_of_a_finished_model_is_not_replaced(small, tmp_path):
    out = tmp_path / "out"
    succeed(*arguments(small, out, steps=2))
    (out / "mine.txt").write_text("mine", "utf-8")
    assert "holds mine.txt, which is no file of a model" in fail(*arguments(small, out, steps=4))
    assert (out / "mine.txt").exists() and len(metrics_of(out)) == 2


def test_a_run_whose_model_was_not_written_trains_no_further_step(whole, small, tmp_path, monkeypatch):
    """As one that was killed between its last step and the end."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(training_run.Run, "write", lambda self, *given: (_ for _ in ()).throw(OSError("no disk")))
        assert "no disk" in fail(*arguments(small, out))
    assert not out.exists()
    told = succeed(*arguments(small, out))
    assert "step " not in told.replace("a step", "")
    assert_same_weights(model_of(out), model_of(whole))


@pytest.mark.parametrize("lora", [(), ("--lora",)], ids=["whole", "lora"])
def test_no_checkpoint_stays_if_none_is_to(lora, small, tmp_path):
    out = tmp_path / "out"
    succeed(*arguments(small, out, "--no-keep-checkpoint", *lora, steps=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-run"]
    assert "removed, as asked" in (tmp_path / "out-run" / "report.md").read_text("utf-8")
    assert "is not empty" in fail(*arguments(small, out, "--no-keep-checkpoint", *lora, steps=4))
