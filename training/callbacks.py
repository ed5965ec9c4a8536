"""Callbacks for the stock `Trainer`."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class HasEpoch(Protocol):
    """Anything whose random draws belong to an epoch, such as the collators."""

    def set_epoch(self, epoch: int) -> None: ...


class SetEpochCallback(TrainerCallback):
    """Tells collators the epoch when it begins, so that each epoch draws anew and a resumed run draws what an
    unbroken one would have drawn. A `Trainer` evaluates with the same collator: give it rows whose prefixes are fixed
    (`pack_dataset(..., fixed_prefixes=True)`), or `eval_loss` changes with the epoch too.

    Args:
        collators: objects with `set_epoch`.

    Raises:
        TypeError: an object has no `set_epoch`.
    """

    def __init__(self, *collators: HasEpoch) -> None:
        for collator in collators:
            if not callable(getattr(collator, "set_epoch", None)):
                raise TypeError(f"{type(collator).__name__} has no `set_epoch`")
        self.collators = collators

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for collator in self.collators:
            collator.set_epoch(int(state.epoch or 0))
