"""How tensors of a family become MiniLLM's and back: pairs of functions, each the inverse of the other.

Rows are the output channels of a projection, so that a weight [rows, columns] and its bias [rows] are cut alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from minillm.configuration.configuration_minillm import MiniLLMConfig

Tensors = list[torch.Tensor]


class Transform(NamedTuple):
    """`to_minillm(native tensors, config)` and `to_native(MiniLLM's tensors, config)`."""

    to_minillm: Callable[[Tensors, MiniLLMConfig], Tensors]
    to_native: Callable[[Tensors, MiniLLMConfig], Tensors]

    def after(self, first: "Transform") -> "Transform":
        """On the way in `first`, then this one; on the way out the other way round."""
        return Transform(
            lambda tensors, config: self.to_minillm(first.to_minillm(tensors, config), config),
            lambda tensors, config: first.to_native(self.to_native(tensors, config), config),
        )


def _same(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    return tensors


def _transpose(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    return [tensor.t() if tensor.ndim == 2 else tensor for tensor in tensors]


def _join_rows(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    return [torch.cat(tensors)]


def _qkv_sizes(config: MiniLLMConfig) -> list[int]:
    keys = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, keys, keys]


def _split_qkv(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    return list(tensors[0].split(_qkv_sizes(config)))


def _split_grouped_qkv(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    shape = tensors[0].shape[1:]
    groups = config.num_key_value_heads
    cut = tensors[0].reshape(groups, -1, config.head_dim, *shape)
    parts = cut.split([cut.shape[1] - 2, 1, 1], dim=1)
    return [part.reshape(-1, *shape) for part in parts]


def _join_grouped_qkv(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    shape = tensors[0].shape[1:]
    groups = config.num_key_value_heads
    cut = [tensor.reshape(groups, -1, config.head_dim, *shape) for tensor in tensors]
    return [torch.cat(cut, dim=1).reshape(-1, *shape)]


def _halves(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    return list(tensors[0].chunk(2))


def _swapped_halves(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    return list(tensors[0].chunk(2))[::-1]


def _join_swapped(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    return [torch.cat(tensors[::-1])]


def _stack_experts(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    """[w of each expert] or [gate of each expert, up of each expert] to [experts, rows, columns]."""
    count = config.num_local_experts
    kinds = [tensors[start : start + count] for start in range(0, len(tensors), count)]
    return [torch.stack([torch.cat(parts) for parts in zip(*kinds, strict=True)])]


def _unstack(kinds: int) -> Callable[[Tensors, MiniLLMConfig], Tensors]:
    def unstack(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
        parts = [expert.chunk(kinds) for expert in tensors[0]]
        return [expert[kind] for kind in range(kinds) for expert in parts]

    return unstack


def _normalise_rows(tensors: Tensors, config: MiniLLMConfig) -> Tensors:
    wide, dtype = tensors[0].float(), tensors[0].dtype
    lengths = wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    # Rows that have length 1 but for rounding stay, so that doing it again changes nothing.
    done = (lengths - 1).abs() <= 4 * torch.finfo(dtype).eps
    return [torch.where(done, wide, wide / lengths).to(dtype)]


SAME = Transform(_same, _same)
TRANSPOSED = Transform(_transpose, _transpose)
"""GPT-2's Conv1D, whose weight is [columns, rows]."""

QKV_STACKED = Transform(_split_qkv, _join_rows)
"""All of q, then all of k, then all of v."""

QKV_BY_GROUP = Transform(_split_grouped_qkv, _join_grouped_qkv)
"""For each key/value head: its query heads, its key, its value. With as many key heads as query heads this is q, k, v
of the first head, then of the second, and so on; with one it is all of q, one k, one v."""

GATE_UP = Transform(_halves, _join_rows)
UP_GATE = Transform(_swapped_halves, _join_swapped)

EXPERTS_GATE_UP = Transform(_stack_experts, _unstack(2))
EXPERTS = Transform(_stack_experts, _unstack(1))

NORMALISED_ROWS = Transform(_normalise_rows, _same)
"""A head whose rows are divided by their length anyway: whoever reads the weight itself then sees what is used."""
