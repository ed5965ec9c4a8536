"""What a bias on attention scores is: the form that ALiBi and Sandwich share.

Shapes: B batch, H heads, Q new tokens, K keys. Positions are integers [B or 1, length].
"""

import copy

import torch

from minillm.configuration.configuration_minillm import MiniLLMConfig


class PositionBias:
    """A bias on attention scores that depends on head and distance.

    It is written once, in closed form, for one score at a time: indexing with (batch, head, query, key) gives flex
    attention's `score_mod` its term without an n x n tensor, and `dense()` gives the whole table to other back ends.

    Args:
        config: the model's configuration.
        query_positions, key_positions: [B or 1, Q] and [B or 1, K] on the first axis.
        dtype: the model's dtype (read by `alibi_rounding='bloom'` only).
    """

    def __init__(
        self, config: MiniLLMConfig, query_positions: torch.Tensor, key_positions: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.query_positions = query_positions
        self.key_positions = key_positions
        self.dtype = dtype
        self.head_factors = self.factors(query_positions.device)

    def factors(self, device: torch.device) -> torch.Tensor:
        """One number per head [H], float32."""
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        """The bias [B or 1, H, Q, K] (Q may be 1 where it does not depend on the query), float32."""
        raise NotImplementedError

    def of_block(self, queries: slice, keys: slice) -> "PositionBias":
        """The bias of some of the queries on some of the keys."""
        part = copy.copy(self)
        part.query_positions, part.key_positions = self.query_positions[:, queries], self.key_positions[:, keys]
        return part

    def separate(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The bias as a sum of a number for each key [B or 1, H, 1, K] and one for each query [B or 1, H, Q or 1, 1],
        float32, if it is one."""
        return None

    def __getitem__(self, index: tuple) -> torch.Tensor:
        raise NotImplementedError

    def of_heads(self, heads: slice) -> "PositionBias":
        """The bias of some of the heads, those of a tensor-parallel rank."""
        part = copy.copy(self)
        part.head_factors = self.head_factors[heads]
        return part

    def _distance(self, batch: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # A single row of positions serves every batch row.
        query_row = batch if self.query_positions.shape[0] > 1 else 0
        key_row = batch if self.key_positions.shape[0] > 1 else 0
        return (self.query_positions[query_row, query] - self.key_positions[key_row, key]).abs()

    def _distances(self) -> torch.Tensor:
        return (self.query_positions[:, None, :, None] - self.key_positions[:, None, None, :]).abs()
