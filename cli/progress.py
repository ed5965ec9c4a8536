"""Progress of training: lines and an expected end that are right on a terminal and in a log file alike."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import torch
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minillm.cli.console import console, say
from minillm.training.put_back import thread_count_kept

FIRST_ESTIMATE = 20
REDRAWN = 0.25
"""Seconds between two looks of a live line."""
TOLD = 10.0
"""Seconds after which a count that is no live line says how far it is."""


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


class Line:
    """A line at the bottom of a terminal that changes in place. Elsewhere there is none."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self.drawn = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it would be drawn anew: what it shows may cost something to find out."""
        return console.is_terminal and not console.quiet and time.monotonic() - self.drawn >= REDRAWN

    def show(self, text: str) -> None:
        if self.live is None:
            self.live = Live(console=console, transient=True, auto_refresh=False)
            self.live.start()
        self.live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        self.drawn = time.monotonic()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows how much of `total` is done, with the time left; what it gives is told of each that is done."""
        started, said, done = time.monotonic(), time.monotonic(), 0

        def advance(count: int) -> None:
            nonlocal said, done
            done += count
            seconds = time.monotonic() - started
            left = seconds / done * (total - done)
            text = f"{what}: {done} of {total}  {in_words(seconds)} elapsed, {in_words(left)} left"
            if self.is_due:
                self.show(text)
            elif not console.is_terminal and time.monotonic() - said >= TOLD:
                said = time.monotonic()
                say(text)

        try:
            yield advance
        finally:
            self.close()


def in_words(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class LineCallback(TrainerCallback):
    """Training as one live line from the first step on; a line at every logging step where there is no terminal.

    Args:
        name: what is trained, in a word.
        line: where it stands.
        step_loss: the loss of the last step.
        tokens_per_step: of all processes.
    """

    def __init__(self, name: str, line: Line, step_loss: Callable[[], float], tokens_per_step: float) -> None:
        self.name, self.line = name, line
        self.step_loss, self.tokens_per_step = step_loss, tokens_per_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first = time.monotonic(), state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.line.is_due:
            self.line.show(self.text(state, self.step_loss(), kwargs["lr_scheduler"].get_last_lr()[0]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and not console.is_terminal:
            say(self.text(state, float(logs["loss"]), float(logs["learning_rate"])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.line.close()

    def text(self, state: TrainerState, loss: float, rate: float) -> str:
        """The line: step, loss, learning rate, speed, and how long it took and will take."""
        share = state.global_step / max(1, state.max_steps)
        bar = "━" * round(20 * share) + "╌" * (20 - round(20 * share))
        done = max(1, state.global_step - self.first)
        seconds = time.monotonic() - self.started
        left = seconds / done * (state.max_steps - state.global_step)
        return (
            f"{self.name:8} {bar} step {state.global_step}/{state.max_steps}  loss {loss:.3f}  rate {rate:.2e}  "
            f"{done * self.tokens_per_step / max(seconds, 1e-9):,.0f} tokens/s  "
            f"{in_words(seconds)} elapsed, {in_words(left)} left"
        )


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
