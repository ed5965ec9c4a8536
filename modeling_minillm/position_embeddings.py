"""Positions that are added to the token embedding: learned, sinusoidal, and GLM's two axes.

Shapes: B batch, Q new tokens. Positions are integers [B or 1, Q].
"""

from typing import Any

import torch


def sinusoidal_embedding(position_ids: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines at even and cosines at odd channels (arXiv 1706.03762, section 3.5): [B, length, size]."""
    step = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float) / size
    angles = position_ids[..., None].float() * 10000.0**-step
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :size].to(dtype)


def learned(model: Any, position_ids: torch.Tensor, block_position_ids: torch.Tensor | None) -> torch.Tensor:
    return model.embed_positions(position_ids)


def sinusoidal(model: Any, position_ids: torch.Tensor, block_position_ids: torch.Tensor | None) -> torch.Tensor:
    return sinusoidal_embedding(position_ids, model.config.hidden_size, model.embed_tokens.weight.dtype)


def glm_2d(model: Any, position_ids: torch.Tensor, block_position_ids: torch.Tensor | None) -> torch.Tensor:
    if block_position_ids is None:
        block_position_ids = torch.zeros_like(position_ids)
    return model.embed_positions(position_ids) + model.embed_block_positions(block_position_ids)
