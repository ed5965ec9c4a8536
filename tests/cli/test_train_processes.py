"""`torchrun -m minillm train` and `accelerate launch -m minillm train`: several processes work as one does."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_cases import succeed, tree
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minillm"]
# By --cpu it would start one process. The command finds by itself that there is no GPU.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "minillm"]
LONGEST = 120


def start(launcher, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )


def finish(process):
    try:
        return process.communicate(timeout=LONGEST)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise


def command(small, out, batch, *more):
    fixed = ("--model", small["causal"], "--data", small["corpus"], "--out", out, "--batch-size", batch)
    return ("train", *fixed, "--max-steps", 8, "--learning-rate", 0.01, *more)


@pytest.mark.parametrize(
    ("launcher", "more"), [(TORCHRUN, ()), (ACCELERATE, ("--lora",))], ids=["torchrun", "accelerate-lora"]
)
def test_two_processes_train_as_one_with_the_larger_batch(launcher, more, small, tmp_path):
    more = (*more, "--eval-steps", 4)
    process = start(launcher, *command(small, tmp_path / "two", 2, *more))
    told, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    # One speaks, and one writes.
    assert told.count("rows to train on") == told.count("written: ") == told.count("step 8/8") == 1
    one = succeed(*command(small, tmp_path / "one", 4, *more))
    file = "adapter_model.safetensors" if "--lora" in more else "model.safetensors"
    alone, together = (load_file(tmp_path / name / file) for name in ("one", "two"))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=2e-4, rtol=0)
    figures = [next(line for line in text.splitlines() if line.startswith("held-out")) for text in (one, told)]
    assert figures[0] == figures[1]
    # Of both processes' random states, to go on from.
    states = [path for path in tree(tmp_path / "two-checkpoints") if "rng_state" in path]
    assert len(states) == 2


def test_all_stop_together_and_go_on(small, tmp_path):
    out = tmp_path / "out"
    arguments = command(small, out, 2, "--trainer", "logging_steps=1")
    long = [4000 if argument == 8 else argument for argument in arguments]
    process, file = start(TORCHRUN, *long), tmp_path / "out-run" / "metrics.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if file.exists() and file.read_text("utf-8").count("\n") >= 5:
            break
    # As a launcher on another machine does: it tells its workers.
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process)
    assert process.returncode != 0 and "which is saved: the same command goes on from there" in errors
    (checkpoint,) = [path for path in tree(tmp_path / "out-checkpoints") if path.count("/") == 0 and "-" in path]
    step = int(checkpoint.partition("-")[2])
    assert len(file.read_text("utf-8").splitlines()) == step and not out.exists()
    short = [step + 2 if argument == 4000 else argument for argument in long]
    note = tmp_path / "out-checkpoints" / "options.json"
    # As if it had been begun for two steps more than it made.
    note.write_text(json.dumps({**json.loads(note.read_text("utf-8")), "total_steps": step + 2}), "utf-8")
    process = start(TORCHRUN, *short)
    told, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    assert f"going on from {tmp_path / 'out-checkpoints' / checkpoint}" in told and out.exists()


def test_what_is_refused_is_said_once(small, tmp_path):
    process = start(TORCHRUN, *command(small, tmp_path / "out", 2, "--lora", "--lora-targets", "nothing"))
    _, errors = finish(process)
    assert process.returncode != 0 and errors.count("error: --lora-targets 'nothing'") == 1
    assert tree(tmp_path) == []
