"""Training steps in a process of their own, which tells seconds and peak memory of each case.

The peak of a process counts from its start, so that each measurement gets a fresh one; several cases share it only in
growing order. On CUDA the peak is the allocator's, which can be reset: there the cases run in the calling process.
"""

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.models import Contender, Shape, build, rotating_ids, start_afresh
from benchmarks.steps import adamw, batches_of, training_step
from benchmarks.timing import Options, Stopwatch, interleave

TOY = Shape(64, 64, 1, 2, 16)


class TrainingCase(NamedTuple):
    """A model, a batch of `rows` x `length` tokens, and how many steps are timed; several follow one that is not. With
    `documents` rows are packed with documents of so many tokens."""

    contender: Contender
    shape: Shape
    rows: int
    length: int
    steps: int = 1
    documents: int | None = None


def current_memory(device: str) -> int:
    """Bytes that this process holds: tensors on CUDA, else everything."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    """The most bytes that this process ever held; on CUDA since the last reset.

    What `getrusage` tells is at least the peak of the parent process; Linux has this process's own as well.
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
    """Seconds of each timed step, and bytes: `before` a step, when there are weights and the optimiser's state, and
    at the `peak`; None if the device's memory did not suffice."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stopwatch = Stopwatch(device, clock)
    try:
        model = build(case.contender, case.shape, device)
        optimizer = adamw(model)
        name = case.contender.model
        # A short step makes the optimiser's state.
        training_step(model, batches_of(name, rotating_ids(case.shape, 1, 8, device)), optimizer)()
        before = current_memory(device)
        ids = rotating_ids(case.shape, case.rows, case.length, device)
        batches = batches_of(name, ids)
        if case.documents is not None:
            positions = (torch.arange(case.length, device=device) % case.documents).expand(case.rows, -1)
            batches = ({**batch, "position_ids": positions} for batch in batches)
        runs = {"step": training_step(model, batches, optimizer)}
        seconds = interleave(runs, stopwatch, Options(case.steps), warmup=min(case.steps - 1, 1))["step"]
    except torch.OutOfMemoryError:
        return None
    return {"seconds": seconds, "before": before, "peak": peak_memory(device)} if seconds else None


def warm_up(contender: Contender, device: str, threads: int) -> int:
    """Bytes that are held when all code was in use once: what is more later on belongs to a case."""
    torch.set_num_threads(threads)
    run_case(TrainingCase(contender, TOY, 1, TOY.length), device, "wall")
    return current_memory(device)


def run_cases(cases: Sequence[TrainingCase], device: str, clock: str) -> list[dict[str, Any] | None]:
    """What `run_case` tells of each, and `start`, the bytes that were held before the first.

    On CPU they are to be in growing order, of one contender; a case for which the system's memory did not suffice, and
    those behind it, are None.
    """
    first = (cases[0].contender, device, torch.get_num_threads())
    start_afresh()
    if device == "cuda":
        start = warm_up(*first)
        told = [run_case(case, device, clock) for case in cases]
        return [result and {"start": start, **result} for result in told]
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    # Imported once by the server, from which fresh processes fork.
    context.set_forkserver_preload([__name__])
    told = []
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            start = pool.submit(warm_up, *first).result()
            for case in cases:
                result = pool.submit(run_case, case, device, clock).result()
                told.append(result and {"start": start, **result})
        except BrokenProcessPool:
            told += [None] * (len(cases) - len(told))
    return told
