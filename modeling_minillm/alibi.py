"""ALiBi (arXiv 2108.12409): a bias that grows with the distance, by a slope of each head's own.

Shapes: B batch, H heads, Q new tokens, K keys.
"""

import math

import torch

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.position_bias import PositionBias


def alibi_slopes(config: MiniLLMConfig) -> list[float]:
    """ALiBi's slope of each head, before `alibi_scale` (arXiv 2108.12409, section 3)."""
    heads, bias_max = config.num_attention_heads, config.alibi_bias_max
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    if power != heads:
        # Every second slope is that of the next lower power of two; the ones between fill up.
        slopes = (slopes[1::2] + slopes[0::2])[:heads]
    return slopes


class AlibiBias(PositionBias):
    """ALiBi (arXiv 2108.12409): `-slope * distance`, formed from the integer distance so that it is exact at any
    length; under `alibi_rounding` the key-only form of Bloom or Falcon with their rounding."""

    def factors(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(alibi_slopes(self.config), device=device) * self.config.alibi_scale

    def dense(self) -> torch.Tensor:
        slopes = self.head_factors[None, :, None, None]
        if self.config.alibi_rounding == "none":
            return -slopes * self._distances()
        return self._rounded(slopes, self.key_positions[:, None, None, :])

    def separate(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        # Both numbers are counted from the key next to the queries, so that those that matter are small and exact.
        if self.config.alibi_rounding != "none":
            bias = self.dense()
            nearest = bias.amax(-1, keepdim=True)
            return bias - nearest, nearest
        slopes = self.head_factors[None, :, None, None]
        queries, keys = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
        nearest = keys.amax(-1, keepdim=True)
        if bool((nearest <= queries).all()):
            return slopes * (keys - nearest), slopes * (nearest - queries)
        nearest = keys.amin(-1, keepdim=True)
        if bool((nearest >= queries).all()):
            return slopes * (nearest - keys), slopes * (queries - nearest)
        return None

    def __getitem__(self, index: tuple) -> torch.Tensor:
        batch, head, query, key = index
        if self.config.alibi_rounding == "none":
            return -self.head_factors[head] * self._distance(batch, query, key)
        key_row = batch if self.key_positions.shape[0] > 1 else 0
        return self._rounded(self.head_factors[head], self.key_positions[key_row, key])

    def _rounded(self, slopes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.config.alibi_rounding == "bloom":
            return (slopes * positions).to(self.dtype).float()
        # Falcon rounds before its factor 1/sqrt(head_dim), which `alibi_scale` put into the slopes.
        scale = self.config.alibi_scale
        return ((slopes / scale).bfloat16() * positions.bfloat16()).float() * scale
