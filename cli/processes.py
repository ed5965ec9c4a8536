"""The processes of one command, where `torchrun` or `accelerate launch` started several: who writes, and agreement."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from minillm.cli.console import console, errors, one_line


def rank() -> int:
    """The number of this process among those that a launcher started; 0 without one."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that speaks and writes."""
    return rank() == 0


def quiet_others() -> None:
    """Leaves the command's lines to the first process, for as long as the others live."""
    if not is_first():
        console.quiet = errors.quiet = True


def join(device: str) -> None:
    """Lets the processes find one another. Nothing where there is one."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def leave() -> None:
    """Parts from the other processes: one that ends without it may be aborted by threads that wait for others."""
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exchange(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Work that all processes do: where it fails in one, it fails in all, and one of them says why.

    Raises:
        ValueError: in the first process, with the reason; SystemExit: in the others.
    """
    error = None
    try:
        yield
    except Exception as found:
        if world_size() == 1:
            raise
        error = found
    if world_size() == 1:
        return
    reasons = exchange(None if error is None else one_line(error))
    if failed := [number for number, reason in enumerate(reasons) if reason is not None]:
        if not is_first():
            raise SystemExit(1)
        if error is not None:
            raise error
        raise ValueError(f"process {failed[0]}: {reasons[failed[0]]}")
