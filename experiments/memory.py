"""What a training holds in memory: weights, gradients and the optimizer by formula, activations by one probed pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from minillm.training.put_back import random_states_kept

STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_32bit": 8,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "paged_lion_32bit": 4,
    "paged_lion_8bit": 1,
    "adagrad": 4,
    "rmsprop": 4,
    "sgd": 0,
}
"""Bytes of an optimizer's state for a float32 parameter, by transformers' name."""


class TrainingMemory(NamedTuple):
    """Bytes that a training step holds on a device.

    Attributes:
        weights: all parameters, tied ones once.
        gradients: of those that are trained.
        optimizer: its state; None where it is not known by formula.
        activations: what the forward pass of a batch keeps for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int | None
    activations: int

    @property
    def total(self) -> int:
        """All of it, as far as it is known."""
        return self.weights + self.gradients + (self.optimizer or 0) + self.activations


def training_memory(model: torch.nn.Module, optimizer: str, row: Mapping[str, Any], rows: int) -> TrainingMemory:
    """The memory of a training step.

    Args:
        model: as it trains: with its adapter, in the dtype of its weights.
        optimizer: a name of transformers' `OptimizerNames`.
        row: a batch of one row, on the model's device.
        rows: how many a batch has.
    """
    own = list(model.parameters())
    trained = [parameter for parameter in own if parameter.requires_grad]
    state = STATE_BYTES.get(optimizer)
    if optimizer == "adafactor":
        # A mean for each row and each column.
        bytes_held = 4 * sum(sum(parameter.shape[-2:]) for parameter in trained)
    else:
        bytes_held = None if state is None else sum(parameter.numel() for parameter in trained) * state
    return TrainingMemory(
        weights=sum(parameter.numel() * parameter.element_size() for parameter in own),
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        optimizer=bytes_held,
        activations=rows * probe_activations(model, row),
    )


def probe_activations(model: torch.nn.Module, batch: Mapping[str, Any]) -> int:
    """Bytes that a forward pass of a batch keeps for the backward pass, beside the weights.

    Each stretch of memory counts once. Random states, gradients and the model's mode are as before.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mode = model.training
    model.train()
    try:
        with random_states_kept(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # Held until the end, so that no memory is given to two tensors.
            output = model(**batch)
            del output
    finally:
        model.train(mode)
    return sum(kept.values())


def peak_bytes(device: str) -> int:
    """The most memory that this process has held: of the accelerator, else of the system."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", 0) or resident_peak() or info.rss


def resident_peak() -> int:
    """Linux' own count of it, in bytes; 0 elsewhere."""
    file = Path("/proc/self/status")
    if not file.exists():
        return 0
    line = next((line for line in file.read_text("utf-8").splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return 1024 * int(line.split()[1])
