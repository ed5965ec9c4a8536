"""Sandwich (arXiv 2212.10356): a bias that is the inner product of two sinusoidal embeddings.

Shapes: B batch, H heads, Q new tokens, K keys.
"""

import torch

from minillm.position_bias import PositionBias


class SandwichBias(PositionBias):
    """Sandwich (arXiv 2212.10356, section 5): the inner product of two sinusoidal embeddings, which depends on the
    distance alone, `sum_i cos(distance / 10000 ** (2i / sandwich_dim))`, divided by `8 * h / heads` for head h."""

    def factors(self, device: torch.device) -> torch.Tensor:
        heads = self.config.num_attention_heads
        return heads / (8.0 * torch.arange(1, heads + 1, device=device, dtype=torch.float))

    def _frequencies(self, dtype: torch.dtype) -> torch.Tensor:
        steps = torch.arange(0, self.config.sandwich_dim, 2, device=self.head_factors.device, dtype=dtype)
        return 10000.0 ** (-steps / self.config.sandwich_dim)

    def dense(self) -> torch.Tensor:
        # cos(a - b) = cos a cos b + sin a sin b turns the sum into one matrix product; the angles need float64.
        frequencies = self._frequencies(torch.float64)
        sides = []
        for positions in (self.query_positions, self.key_positions):
            angles = positions[..., None] * frequencies
            sides.append(torch.cat((angles.sin(), angles.cos()), dim=-1).float())
        return self.head_factors[None, :, None, None] * (sides[0] @ sides[1].transpose(1, 2))[:, None]

    def __getitem__(self, index: tuple) -> torch.Tensor:
        batch, head, query, key = index
        distance = self._distance(batch, query, key)
        total = 0.0
        for i in range(0, self.config.sandwich_dim, 2):
            total = total + torch.cos(distance * 10000.0 ** (-i / self.config.sandwich_dim))
        return self.head_factors[head] * total
