"""Liger's fused linear cross-entropy (github.com/linkedin/Liger-Kernel), on CUDA where `liger-kernel` is installed.

Only its forward is taken, which makes loss and gradients chunk by chunk. What Liger wraps around it returns no
gradient for a head on frozen states, scales saved gradients once more in each further backward pass, and lets
gradients of gradients pass without a word.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from minillm.tuning import tuning

DEVICES = ("cuda",)
# In float64 Liger rounds to float32.
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Without the first, gradients of the head in half precision lose what each chunk adds; without the last, chunks are so
# small that the gain is lost. Liger 0.8.3 has them all.
NEEDED = ("accum_dtype", "compute_gradients", "weight_requires_grad", "chunk_mem_const")


@cache
def find_liger() -> Callable[..., Sequence[Any]] | str:
    """Liger's function, or why there is none to be used."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
            fused_linear_cross_entropy_forward,
        )
    except Exception as error:  # Nobody asked for it: what is broken there must not stop a training here.
        return str(error)
    missing = [name for name in NEEDED if name not in inspect.signature(fused_linear_cross_entropy_forward).parameters]
    return f"liger-kernel is too old, it lacks {', '.join(missing)}" if missing else fused_linear_cross_entropy_forward


def uses_liger(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the loss of these is Liger's.

    Liger asks the device for a number, which neither a compiled model nor a CUDA graph allows; a compiled one fuses
    torch's own operations.
    """
    return (
        tuning.use_liger
        and hidden.device.type in DEVICES
        and not torch.compiler.is_compiling()
        and not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
        and hidden.dtype in TYPES
        and hidden.dtype == weight.dtype
        and hidden.shape[0] > 0
        and callable(find_liger())
    )


def liger_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    chunk: int,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `minillm.loss.chunked_cross_entropy`, with sums over chunks in float32 as there.

    Raises:
        ImportError: without Liger's kernel.
        IndexError: for targets outside the vocabulary, where Liger would read and write outside its memory.
    """
    function, vocabulary = find_liger(), weight.shape[0]
    if isinstance(function, str):
        raise ImportError(function)
    if not ((target == ignore_index) | ((target >= 0) & (target < vocabulary))).all():
        raise IndexError(f"labels must be {ignore_index} or from 0 to {vocabulary - 1}")
    # Liger counts in multiples of `hidden`, and rounds up to a power of two; of each logit it keeps two bytes in half
    # precision, where torch holds eight.
    multiple = max(1, chunk * vocabulary // hidden.numel())
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, whatever the tensors say.
        total, *_, of_hidden, of_weight, of_bias = function(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            reduction="sum",
            accum_dtype=torch.float32,
            compute_gradients=any(needed),
            weight_requires_grad=needed[1],
            chunk_mem_const=multiple,
        )
    gradients = of_hidden, of_weight, of_bias
    of_hidden, of_weight, of_bias = (each if wanted else None for each, wanted in zip(gradients, needed, strict=True))
    return total, of_hidden, of_weight, of_bias
