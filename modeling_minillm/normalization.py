"""Normalisation layers: `NORMS[config.norm_type](config, size)`."""

import torch
from torch import nn

from minillm.configuration.configuration_minillm import MiniLLMConfig


def identity(hidden_states: torch.Tensor) -> torch.Tensor:
    """Stands where a variant has nothing; a function, since the call of a module costs a decoding step its time."""
    return hidden_states


class MiniLLMRMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467): statistics in float32, the result in the input's dtype.

    Args:
        config: gives `norm_eps`.
        size: number of channels of the last axis.
    """

    def __init__(self, config: MiniLLMConfig, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.norm_eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden_states.dtype)


class MiniLLMLayerNorm(nn.LayerNorm):
    """LayerNorm (arXiv 1607.06450) with `config.norm_eps`, and a bias if `config.norm_bias`."""

    def __init__(self, config: MiniLLMConfig, size: int) -> None:
        super().__init__(size, eps=config.norm_eps, bias=config.norm_bias)


NORMS = {"rmsnorm": MiniLLMRMSNorm, "layernorm": MiniLLMLayerNorm}
