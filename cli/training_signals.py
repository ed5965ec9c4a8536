"""A run that is asked to stop: the step is finished and saved first."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minillm.cli.console import say
from minillm.cli.processes import world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 5.0
"""Seconds within which a launcher passes on the signal that the terminal had sent to all processes already."""


class StopCallback(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint; a second signal ends it at once.

    Attributes:
        asked: the number of the signal that came, 0 before.
        stopped: whether training ended for it before its last step.
    """

    def __init__(self) -> None:
        self.asked, self.since, self.stopped = 0, 0.0, False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM are ours meanwhile. Only the main thread may ask for them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame: Any) -> None:
        if self.asked and (world_size() == 1 or time.monotonic() - self.since > ECHO):
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = number, time.monotonic()
            say(f"{signal.Signals(number).name}: this step is finished and saved, then it stops; once more: at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop_if_asked(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop_if_asked(args, state, control)

    def stop_if_asked(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Asks the Trainer to save and to stop; all processes agree on it."""
        if world_size() > 1:
            # They hear of it in different steps, and stop in the same.
            told = torch.tensor(self.asked, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            if int(told) and not self.asked:
                self.asked, self.since = int(told), time.monotonic()
        if self.asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
