"""Attention on CPU by blocks of queries, each of which meets only the keys that one of its rows sees.

SDPA's CPU kernel skips what lies beyond the diagonal for plain causal attention alone: given a mask or a bias it works
through all of the square. Cut into blocks, every variant does the work that its mask asks for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KEPT_ELEMENTS = 2**26
"""Up to so many elements the mask of all blocks is made once for all layers, and above that anew wherever it is used,
the backward pass included: memory then grows with the length, not with its square."""


class Block(NamedTuple):
    queries: slice
    keys: slice


def block_size(length: int) -> int:
    """Queries in a block: few enough to leave out most of what is hidden, enough to keep the kernel busy."""
    return min(256, max(128, length // 8))


class BlockedMask:
    """A square mask, in blocks of queries.

    Args:
        length: number of queries and of keys.
        visible: boolean mask [B or 1, 1, queries, keys] of a block.
        additive: the same with the bias in it, as numbers to add to the scores, [B or 1, 1 or H, queries, keys].
    """

    def __init__(
        self,
        length: int,
        visible: Callable[[Block], torch.Tensor],
        additive: Callable[[Block], torch.Tensor],
    ) -> None:
        self.additive = additive
        self.blocks, everything = [], slice(0, length)
        for start in range(0, length, block_size(length)):
            queries = slice(start, min(length, start + block_size(length)))
            seen = visible(Block(queries, everything)).flatten(0, -2).any(0).nonzero()
            self.blocks.append(Block(queries, slice(int(seen[0]), int(seen[-1]) + 1)))
        first = additive(self.blocks[0])
        per_pair = first.shape[0] * first.shape[1]
        pairs = sum((block.queries.stop - block.queries.start) * _length(block.keys) for block in self.blocks)
        self.is_kept = per_pair * pairs <= KEPT_ELEMENTS
        self.kept = [first, *(additive(block) for block in self.blocks[1:])] if self.is_kept else None

    def of_block(self, index: int) -> torch.Tensor:
        return self.kept[index] if self.is_kept else self.additive(self.blocks[index])


def _length(part: slice) -> int:
    return part.stop - part.start


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockedMask,
    fit: Callable[[torch.Tensor], torch.Tensor],
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    """Scaled dot-product attention under a blocked mask.

    Args:
        query: [B, H, length, head_dim]; `key` and `value`: [B, key/value heads, length, head_dim].
        fit: gives the mask of a block the dtype, device and heads of the query.

    Returns:
        [B, length, H, head_dim].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))

    def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        block = mask.blocks[index]
        return F.scaled_dot_product_attention(
            query[:, :, block.queries],
            key[:, :, block.keys],
            value[:, :, block.keys],
            attn_mask=fit(mask.of_block(index)),
            dropout_p=dropout,
            scale=scaling,
        )

    if not mask.is_kept and torch.is_grad_enabled():
        parts = [checkpoint(attend, i, query, key, value, use_reentrant=False) for i in range(len(mask.blocks))]
    else:
        parts = [attend(i, query, key, value) for i in range(len(mask.blocks))]
    return torch.cat(parts, dim=2).transpose(1, 2)
