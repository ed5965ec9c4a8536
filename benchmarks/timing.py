"""Timing that a shared and drifting machine can hardly mislead: interleaved rounds, medians, bootstrap intervals."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}

FEWEST_ROUNDS = 3
"""What is timed of every contender even when the time is up."""


@dataclass
class Options:
    """What all kinds of measurement are told.

    Args:
        steps: timed rounds, after the warm-up.
        device: type of the device, `"cpu"` or `"cuda"`.
        tiny: shapes that take seconds, to see that everything runs.
        clock: on CPU `"wall"`, or `"process"` for the processor time of this process. CUDA has its own events.
        minutes: no group of contenders is begun after so long; None: no limit.
    """

    steps: int = 10
    device: str = "cpu"
    tiny: bool = False
    clock: str = "wall"
    minutes: float | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> str:
        """The key of the shapes to take: `"tiny"`, or the device."""
        return "tiny" if self.tiny else self.device

    def out_of_time(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.begun > 60 * self.minutes


class Stopwatch:
    """Seconds on a device: between two events on CUDA, between two readings of a clock elsewhere."""

    def __init__(self, device: str = "cpu", clock: str = "wall") -> None:
        self.on_cuda = device == "cuda"
        self.read = CLOCKS[clock]
        self.begin: Any = None

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def start(self) -> None:
        """Starts, or starts anew: what came before does not count."""
        if self.on_cuda:
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
        else:
            self.begin = self.read()

    def stop(self) -> float:
        if not self.on_cuda:
            return self.read() - self.begin
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return self.begin.elapsed_time(end) / 1000


def make_ready(makers: dict[str, Callable[[], Callable[[], object]]]) -> dict[str, Callable[[], object]]:
    """What each maker makes, without those that the device's memory does not hold."""
    runs = {}
    for name, make in makers.items():
        try:
            runs[name] = make()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return runs


@contextmanager
def old_objects_frozen() -> Iterator[None]:
    """What is there already is not searched for garbage in every round."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def interleave(
    runs: dict[str, Callable[[], object]], stopwatch: Stopwatch, options: Options, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Every round times every contender once, so that a drift of the machine meets all of them alike. Rounds begin with
    another contender each and go forwards and backwards in turn: none always follows the same one.

    Args:
        runs: what to time, by contender; `stopwatch` runs meanwhile, and may be started anew by them.
        warmup: rounds that do not count.

    Returns:
        Lists of one length; an empty one for a contender that the device's memory did not hold.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    alive = list(runs)
    with old_objects_frozen():
        for index in range(-warmup, options.steps):
            if index >= FEWEST_ROUNDS and options.out_of_time():
                break
            gc.collect()
            first = index % len(alive) if alive else 0
            order = alive[first:] + alive[:first]
            for name in order if index % 2 else reversed(order):
                stopwatch.wait()
                stopwatch.start()
                try:
                    runs[name]()
                except torch.OutOfMemoryError:
                    alive.remove(name)
                    times[name].clear()
                    torch.cuda.empty_cache()
                    continue
                elapsed = stopwatch.stop()
                if index >= 0:
                    times[name].append(elapsed)
    return times


def bootstrap_interval(
    sample: Sequence[float], confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the median: what medians of samples drawn anew from this one are between."""
    values = np.asarray(sample, dtype=float)
    medians = np.median(np.random.default_rng(seed).choice(values, (resamples, len(values))), axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def summarise(sample: Sequence[float]) -> dict[str, Any]:
    """Median, its 95 % interval, and the spread from the least to the greatest value."""
    return {
        "median": statistics.median(sample),
        "interval": list(bootstrap_interval(sample)),
        "spread": [min(sample), max(sample)],
        "rounds": len(sample),
    }


class Comparison(NamedTuple):
    """Who is held to whom; of several names the fastest counts. A target is a bound of the ratio, or None."""

    contender: str | tuple[str, ...]
    baseline: str | tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None


def best(values: dict[str, list[float]], names: str | tuple[str, ...]) -> str | None:
    """The name with the least median, of those that were measured."""
    names = (names,) if isinstance(names, str) else names
    return min(
        (name for name in names if values.get(name)), key=lambda name: statistics.median(values[name]), default=None
    )


def compare(what: str, values: dict[str, list[float]], comparison: Comparison, quantity: str = "speed") -> list[dict]:
    """A row with the median, over rounds, of the ratio within a round; no row where one side was not measured.

    Args:
        quantity: `"speed"` is the baseline's value over the contender's; `"time"` or `"memory"` its inverse.
    """
    contender, baseline = best(values, comparison.contender), best(values, comparison.baseline)
    if contender is None or baseline is None:
        return []
    pairs = list(zip(values[contender], values[baseline], strict=True))
    ratio = summarise([other / own if quantity == "speed" else own / other for own, other in pairs])
    low, high = comparison.at_least, comparison.at_most
    met = None
    if low is not None or high is not None:
        met = (low is None or ratio["median"] >= low) and (high is None or ratio["median"] <= high)
    return [
        {
            "what": what,
            "quantity": quantity,
            "contender": contender,
            "baseline": baseline,
            **ratio,
            "at_least": low,
            "at_most": high,
            "met": met,
        }
    ]
