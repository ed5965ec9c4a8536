"""What a run of `minillm train` comes to on this machine and with these data: device, precision, steps, rates."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from minillm.cli.console import one_line, say
from minillm.cli.loading import best_device
from minillm.cli.processes import world_size
from minillm.cli.progress import fastest_thread_count
from minillm.cli.train_command import TrainOptions
from minillm.cli.training_checkpoints import Begun
from minillm.training.put_back import random_states_kept

STEPS = 1000
RATES = {"preset": 1e-3, "model": 5e-5, "lora": 2e-3}
"""Peak learning rates: from scratch, of all weights of a trained model, of an adapter."""


class Machine(NamedTuple):
    """Where a run computes, a type such as `"cpu"`, and how exactly: fp32, bf16 or fp16."""

    device: str
    precision: str


class Plan(NamedTuple):
    """The numbers of a run that follow from options and data."""

    total_steps: int
    steps_per_epoch: int
    learning_rate: float
    warmup_steps: int
    logging_steps: int
    save_steps: int
    rows_per_step: int


def choose_machine(options: TrainOptions, begun: Begun) -> Machine:
    """The device and the precision; of a run that goes on, the precision that it began with.

    Raises:
        ValueError: there is no such device, or it does not compute so.
    """
    device = choose_device(options.device)
    asked = options.precision
    if asked == "auto":
        asked = begun.note.get("precision", "auto")
    if asked == "auto":
        asked = "bf16" if device != "cpu" and supports_bf16(device) else "fp32"
    if asked == "fp16" and device == "cpu":
        raise ValueError("--precision fp16 needs an accelerator, and the device is cpu: give bf16 or fp32")
    if asked == "bf16" and device != "cpu" and not supports_bf16(device):
        raise ValueError(f"--precision bf16 is not supported by this {device} device: give fp32 or fp16")
    return Machine(device, asked)


def choose_device(asked: str) -> str:
    found = best_device().type
    if asked == "auto":
        return found
    if asked not in ("cpu", found):
        raise ValueError(
            f"--device {asked}: there is {'no accelerator' if found == 'cpu' else f'only {found}, and cpu'} here; of "
            "several accelerators choose by their environment variable, such as CUDA_VISIBLE_DEVICES=1"
        )
    return asked


def supports_bf16(device: str) -> bool:
    """Whether an accelerator computes in bfloat16 by itself."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((ones @ ones).isfinite().all())
    except (RuntimeError, TypeError):
        return False


def choose_threads(options: TrainOptions, begun: Begun, machine: Machine, run: Callable[[], object]) -> int:
    """Sets and returns the number of threads: the one asked for, else that of the run which goes on, else the faster.

    Args:
        run: a forward and backward pass, which is timed.
    """
    # Sums of another number of threads are rounded otherwise: a resumed run goes on as it began.
    count = options.threads or begun.note.get("threads")
    if count is None:
        count = torch.get_num_threads()
        if machine.device == "cpu" and world_size() == 1 and "OMP_NUM_THREADS" not in os.environ:
            with random_states_kept():
                count, seconds = fastest_thread_count(run, repeats=1)
            say(f"{count} thread{'s' if count > 1 else ''}: {seconds:.2f} s for a row forward and backward")
    torch.set_num_threads(count)
    return count


def make_plan(options: TrainOptions, rows: int) -> Plan:
    """The steps and rates of a run over so many rows."""
    batches = math.ceil(rows / (options.batch_size * world_size()))
    steps_per_epoch = math.ceil(batches / options.accumulate)
    total = options.max_steps or STEPS
    if options.epochs is not None:
        total = max(1, math.ceil(options.epochs * steps_per_epoch))
    rate = options.learning_rate
    if rate is None:
        rate = RATES["lora" if options.lora else "preset" if options.preset is not None else "model"]
    return Plan(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        learning_rate=rate,
        warmup_steps=int(options.warmup if options.warmup >= 1 else options.warmup * total),
        logging_steps=max(1, total // 50),
        save_steps=options.save_steps or max(1, total // 5),
        rows_per_step=options.batch_size * options.accumulate * world_size(),
    )


def name_of(choice: Any) -> str:
    """The name of a member of one of transformers' enums."""
    return choice.value


def require_buildable(arguments: TrainingArguments, model: Any) -> None:
    """Builds what the Trainer would build after the work has begun: a package or a setting may be missing.

    Raises:
        ValueError: the optimizer or the schedule cannot be made.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except Exception as error:
        raise ValueError(f"--optimizer {name_of(arguments.optim)} cannot be made: {one_line(error)}") from error
    own: Any = arguments.lr_scheduler_kwargs
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]),
            num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
            num_training_steps=arguments.max_steps,
            scheduler_specific_kwargs=own,
        )
    except Exception as error:
        raise ValueError(
            f"--schedule {name_of(arguments.lr_scheduler_type)} cannot be made: {one_line(error)}; its own settings "
            "are given as --trainer lr_scheduler_kwargs='{...}'"
        ) from error


def training_arguments(options: TrainOptions, plan: Plan, machine: Machine, checkpoints: Path) -> TrainingArguments:
    """What the stock Trainer is told."""
    evaluated = options.eval_steps is not None
    told: dict[str, Any] = {
        "max_steps": plan.total_steps,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": options.weight_decay,
        "optim": options.optimizer,
        "logging_steps": plan.logging_steps,
        "logging_first_step": True,
        "eval_strategy": "steps" if evaluated else "no",
        "eval_steps": options.eval_steps,
        "save_steps": plan.save_steps,
        "save_total_limit": 1,
        "seed": options.seed,
        "use_cpu": machine.device == "cpu",
        "bf16": machine.precision == "bf16",
        "fp16": machine.precision == "fp16",
        "torch_compile": options.compile,
        "disable_tqdm": True,
        "report_to": options.report_to or "none",
    }
    if world_size() > 1:
        # All of them are used in each step, also those of experts; looking for others takes time.
        told["ddp_find_unused_parameters"] = False
    return TrainingArguments(str(checkpoints), **{**told, **(options.trainer or {})})
