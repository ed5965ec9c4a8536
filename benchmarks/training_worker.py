"""Training steps in a process of their own, which tells seconds and peak memory of each case.

The peak of a process counts from its start, so that each measurement gets a fresh one; several cases share it only in
growing order. On CUDA the peak is the allocator's, which can be reset: there the cases run in the calling process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.models import Contender, Shape, build, rotating_ids
from benchmarks.steps import training_step
from benchmarks.timing import Stopwatch

ROOT = Path(__file__).parent.parent


class TrainingCase(NamedTuple):
    """A model, a batch of `rows` x `length` tokens, and how many steps are timed after one that is not."""

    contender: Contender
    shape: Shape
    rows: int
    length: int
    steps: int = 1


def current_memory(device: str) -> int:
    """Bytes that this process holds: tensors on CUDA, else everything."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    """The most bytes that this process ever held; on CUDA since the last reset.

    What `getrusage` tells is inherited from the parent, whose own peak may be higher: Linux keeps this process's apart.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_case(case: TrainingCase, device: str, clock: str) -> dict[str, Any] | None:
    """Seconds of each step and bytes: `before` a step, when weights and the optimiser's state are there, and `peak`.

    None if the device's memory did not suffice.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stopwatch = Stopwatch(device, clock)
    try:
        model = build(case.contender, case.shape, device)
        ids = rotating_ids(case.shape, case.rows, case.length, device)
        step = training_step(model, case.contender.model, ids)
        # A short one makes the optimiser's state.
        training_step_of_one_row(model, case, step.optimizer, device)
        before, seconds = current_memory(device), []
        if case.steps > 1:
            step()
        for _ in range(case.steps):
            stopwatch.wait()
            stopwatch.start()
            step()
            seconds.append(stopwatch.stop())
    except torch.OutOfMemoryError:
        return None
    return {"seconds": seconds, "before": before, "peak": peak_memory(device)}
