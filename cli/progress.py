"""Progress of training: lines and an expected end that are right on a terminal and in a log file alike."""

import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minillm.cli.console import console
from minillm.training.put_back import thread_count_kept

FIRST_ESTIMATE = 20


class Schedule:
    """Steps of the whole command that are still to come."""

    def __init__(self, total: int) -> None:
        self.left = total

    def skip(self, steps: int) -> None:
        self.left -= steps


class ProgressCallback(TrainerCallback):
    """Prints a line at every logging step, and the expected end of the whole command after 20 steps of a stage."""

    def __init__(self, name: str, schedule: Schedule | None = None) -> None:
        self.name = name
        self.schedule = schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if self.schedule is not None:
            self.schedule.skip(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.schedule is not None:
            self.schedule.skip(1)
        if state.global_step - self.first == FIRST_ESTIMATE:
            left = state.max_steps - state.global_step if self.schedule is None else self.schedule.left
            seconds = left * (time.monotonic() - self.started) / FIRST_ESTIMATE
            end = datetime.now() + timedelta(seconds=seconds)
            console.print(f"expected end: {end:%H:%M:%S} (in {timedelta(seconds=round(seconds))})")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs and "loss" in logs:
            done = state.global_step / max(1, state.max_steps)
            bar = "━" * round(20 * done) + "╌" * (20 - round(20 * done))
            loss = float(logs["loss"])
            console.print(f"{self.name:8} {bar} step {state.global_step}/{state.max_steps}  loss {loss:.3f}")


def fastest_thread_count(run: Callable[[], object], repeats: int = 3) -> tuple[int, float]:
    """Times `run` with one torch thread and with one per processor; returns the faster count and its seconds.

    torch has as many threads afterwards as before.
    """
    best = (1, float("inf"))
    with thread_count_kept():
        for count in sorted({1, min(os.cpu_count() or 1, 8)}):
            torch.set_num_threads(count)
            run()
            times = []
            for _ in range(repeats):
                started = time.monotonic()
                run()
                times.append(time.monotonic() - started)
            best = min(best, (count, sorted(times)[repeats // 2]), key=lambda pair: pair[1])
    return best
