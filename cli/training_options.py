"""What `minillm train` was asked for: options that fit together, and fields of other classes read by their types."""

import dataclasses
import importlib.util
import math
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from minillm.cli.config_settings import read_settings, require_open
from minillm.cli.field_values import read_pairs
from minillm.cli.train_command import TrainOptions

FLAGS = {
    "max_steps": "--max-steps",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulate",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--schedule",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "weight_decay": "--weight-decay",
    "optim": "--optimizer",
    "bf16": "--precision",
    "fp16": "--precision",
    "torch_compile": "--compile",
    "eval_strategy": "--eval-steps",
    "eval_steps": "--eval-steps",
    "save_strategy": "--save-steps",
    "save_steps": "--save-steps",
    "report_to": "--report-to",
    "use_cpu": "--device",
    "seed": "--seed",
}
"""Fields of `TrainingArguments` that have a flag of their own."""

OURS = {
    "output_dir": "checkpoints stand beside --out",
    "remove_unused_columns": "the rows hold what the model reads",
    "label_names": "the collator names them",
    "resume_from_checkpoint": "the same command goes on by itself",
    "ignore_data_skip": "a run that goes on would read other rows",
    "auto_find_batch_size": "the number of steps would change on the way",
    "disable_tqdm": "the command has a progress line of its own",
    "push_to_hub": "use `minillm push`",
    "fsdp": "the command holds whole models: write a script with the stock Trainer",
    "fsdp_config": "the command holds whole models: write a script with the stock Trainer",
    "deepspeed": "the command holds whole models: write a script with the stock Trainer",
    "parallelism_config": "the command holds whole models: write a script with the stock Trainer",
}
"""Fields that the command sets, or that contradict what it does, and why."""

OF_LORA = ("lora_rank", "lora_alpha", "lora_targets", "dora", "train_new_tokens")
OTHER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}


def read_options(given: Mapping[str, Any]) -> TrainOptions:
    """The options of the command, checked against one another.

    Args:
        given: what the flags and the file of options say, by the names of `TrainOptions`.

    Raises:
        ValueError: an option is missing, they contradict one another, or a field or a package is unknown.
    """
    options = TrainOptions(**{name: plain(value) for name, value in given.items()})
    for name in ("out", "data"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing (a flag, or a key of --config)")
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the option {name} is {value}; it must be a finite number")
    require_consistent(options)
    require_names(options)
    settings = read_settings(options.settings or [])
    if options.model is not None:
        require_open(settings)
    return dataclasses.replace(options, settings=settings, trainer=read_trainer_fields(options.trainer or []))


def plain(value: Any) -> Any:
    """A value without enumerations."""
    if isinstance(value, Enum):
        return value.value
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def require_consistent(options: TrainOptions) -> None:
    if (options.preset is None) == (options.model is None):
        raise ValueError("give exactly one of --preset (from scratch) and --model (go on from a model)")
    if options.preset is not None and options.tokenizer is None:
        raise ValueError("--preset needs --tokenizer: make one with `minillm tokenizer train`")
    if options.preset is not None and options.lora:
        raise ValueError("--lora adapts a trained model: give --model in place of --preset")
    if options.max_steps is not None and options.epochs is not None:
        raise ValueError(f"give one of --max-steps {options.max_steps} and --epochs {options.epochs:g}")
    if options.epochs == 0:
        raise ValueError("--epochs 0 trains nothing: give more than 0")
    fields = TrainOptions.__dataclass_fields__
    alone = [name for name in OF_LORA if getattr(options, name) != fields[name].default and not options.lora]
    if alone:
        raise ValueError(f"--{alone[0].replace('_', '-')} needs --lora: without it all weights are trained")
    if options.lora_alpha == 0:
        raise ValueError("--lora-alpha 0 makes an adapter that does nothing: give more than 0")


def require_names(options: TrainOptions) -> None:
    """Refuses names that nothing has: of the optimizer, the schedule, and packages to report to."""
    for flag, name, names in (
        ("--optimizer", options.optimizer, OptimizerNames),
        ("--schedule", options.schedule, SchedulerType),
    ):
        known = [member.value for member in names]
        if name not in known:
            raise ValueError(f"{flag} {name!r} is unknown; allowed: {', '.join(known)}")
    for tracker in options.report_to or []:
        packages = OTHER_PACKAGES.get(tracker, (tracker,))
        if not any(importlib.util.find_spec(package) for package in packages):
            raise ValueError(f"--report-to {tracker} needs a package that is missing: pip install {tracker}")


def read_trainer_fields(pairs: list[str]) -> dict[str, Any]:
    """Fields of `TrainingArguments` from FIELD=VALUE pairs.

    Raises:
        ValueError: a field that there is not, that has a flag, or that the command sets itself.
    """
    named = {pair.partition("=")[0]: pair for pair in pairs}
    for name, pair in named.items():
        if name in FLAGS:
            raise ValueError(f"--trainer {pair!r}: there is a flag for it, {FLAGS[name]}")
        if name in OURS or name.startswith("hub_"):
            raise ValueError(f"--trainer {pair!r} cannot be set: {OURS.get(name, 'use `minillm push`')}")
    hints = typing.get_type_hints(TrainingArguments, localns={"torch": torch})
    fields = {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}
    return read_pairs(pairs, "--trainer", fields, "TrainingArguments")
