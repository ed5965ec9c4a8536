"""Rotary embeddings (arXiv 2104.09864): cosines and sines by position, and the rotation of queries and keys.

Shapes: B batch, H heads, Q new tokens, D channels of a head. Positions are integers [B or 1, Q].
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minillm.configuration.configuration_minillm import MiniLLMConfig


class MiniLLMRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (arXiv 2104.09864) for all of transformers' scaling types and the fixed NTK-aware one.

    It has no state: where frequencies follow the length, they are a function of the lengths that `forward` is given.

    Args:
        config: gives `rope_parameters`, `rope_interleaved`, `rope_2d` and `head_dim`.
        device: of the tables, as for transformers' classes; the default one if left out.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor
    long_inv_freq: torch.Tensor

    def __init__(self, config: MiniLLMConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        config.standardize_rope_params()
        self.config = config
        self.interleaved, self.two_axes = config.rope_interleaved, config.rope_2d
        self.rope_type = rope_of(config)["rope_type"]
        self.by_length = FREQUENCIES_BY_LENGTH.get(self.rope_type)
        tables, self.attention_scaling = self.compute_tables()
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)

    def compute_tables(self) -> tuple[dict[str, torch.Tensor], float]:
        """The buffers by name, inverse frequencies [rotary channels of one axis / 2] in float32, and the factor on
        cosines and sines."""
        config = copy.copy(self.config)
        if config.rope_2d:
            config.head_dim = config.head_dim // 2
        functions = {**ROPE_INIT_FUNCTIONS, "default": self.compute_default_rope_parameters, "ntk": compute_ntk}
        inv_freq, scaling = functions[self.rope_type](config)
        tables = {"inv_freq": inv_freq, "original_inv_freq": inv_freq.clone()}
        if self.rope_type == "longrope":
            beyond = rope_of(config)["original_max_position_embeddings"] + 1
            tables["long_inv_freq"], _ = functions["longrope"](config, seq_len=beyond)
        return tables, scaling

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MiniLLMRotaryEmbedding":
        """Moves the tables, but keeps them in float32 where a model is cast: rounded frequencies turn far positions by
        other angles."""
        tables = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = self.get_buffer(name)
            if moved.dtype != table.dtype:
                self._buffers[name] = table.to(moved.device)
        return self

    @staticmethod
    def compute_default_rope_parameters(
        config: MiniLLMConfig, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """`theta ** (-2i / dim)` over the rotary channels."""
        return inverse_frequencies(config, rope_of(config)["rope_theta"]), 1.0

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        block_position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines [B or 1, Q, rotary channels] in the dtype of `x`; both axes side by side in 2D.

        Args:
            position_ids, block_position_ids: [B or 1, Q].
            lengths: of each token's document [B or 1, Q or 1], where the frequencies follow it; see
                `minillm.token_facts.document_lengths`. Left out, a row is one document, all of it given.
        """
        # [rotary channels / 2], or [B or 1, Q or 1, rotary channels / 2] by length
        inv_freq = self.inv_freq
        if self.by_length is not None:
            inv_freq = self.by_length(self, position_ids.amax(-1, keepdim=True) + 1 if lengths is None else lengths)
        cos, sin = self.rotate(x, position_ids, inv_freq)
        if self.two_axes:
            second = torch.zeros_like(position_ids) if block_position_ids is None else block_position_ids
            block_cos, block_sin = self.rotate(x, second, inv_freq)
            cos = torch.cat(torch.broadcast_tensors(cos, block_cos), dim=-1)
            sin = torch.cat(torch.broadcast_tensors(sin, block_sin), dim=-1)
        return cos, sin

    @torch.no_grad()
    def rotate(
        self, x: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines along one axis, each frequency twice as `rope_interleaved` lays them out."""
        angles = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        else:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        return cos.to(x.dtype), sin.to(x.dtype)


def rope_of(config: MiniLLMConfig) -> dict[str, Any]:
    """`rope_parameters` of a config that has RoPE."""
    return vars(config)["rope_parameters"]


def inverse_frequencies(config: MiniLLMConfig, theta: float) -> torch.Tensor:
    dim = int(config.head_dim * rope_of(config).get("partial_rotary_factor", 1.0))
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def compute_ntk(config: MiniLLMConfig, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:
    """Fixed NTK-aware scaling: the base grows by `factor ** (dim / (dim - 2))`, so that the lowest frequency is
    stretched by `factor` and the highest stays."""
    dim = int(config.head_dim * rope_of(config).get("partial_rotary_factor", 1.0))
    stretch = rope_of(config)["factor"] ** (dim / (dim - 2))
    return inverse_frequencies(config, rope_of(config)["rope_theta"] * stretch), 1.0


def dynamic_frequencies(rotary: MiniLLMRotaryEmbedding, lengths: torch.Tensor) -> torch.Tensor:
    """NTK-aware scaling by length, in transformers' own formula: lengths [B or 1, Q or 1] to inverse frequencies
    [B or 1, Q or 1, rotary channels / 2]."""
    return ROPE_INIT_FUNCTIONS["dynamic"](rotary.config, lengths.device, seq_len=lengths[..., None])[0]


def longrope_frequencies(rotary: MiniLLMRotaryEmbedding, lengths: torch.Tensor) -> torch.Tensor:
    """LongRoPE's two sets (arXiv 2402.13753): the long one beyond the original length. Shapes as above."""
    limit = rope_of(rotary.config)["original_max_position_embeddings"]
    return torch.where(lengths[..., None] > limit, rotary.long_inv_freq, rotary.inv_freq)


FREQUENCIES_BY_LENGTH = {"dynamic": dynamic_frequencies, "longrope": longrope_frequencies}
"""RoPE types whose frequencies follow the length of a token's document."""


def follows_length(config: MiniLLMConfig) -> bool:
    """Whether a config's RoPE asks for the length of each token's document."""
    return (vars(config)["rope_parameters"] or {}).get("rope_type") in FREQUENCIES_BY_LENGTH


def swap_halves(x: torch.Tensor) -> torch.Tensor:
    """Swaps the channels of each pair, which are half a vector apart."""
    return x.roll(x.shape[-1] // 2, dims=-1)


def sign_halves(sin: torch.Tensor) -> torch.Tensor:
    """Turns the sign for the first of each pair."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def swap_halves_of_axes(x: torch.Tensor) -> torch.Tensor:
    """The same in each half of the channels, one for either position axis."""
    return swap_halves(x.unflatten(-1, (2, -1))).flatten(-2)


def sign_halves_of_axes(sin: torch.Tensor) -> torch.Tensor:
    return sign_halves(sin.unflatten(-1, (2, -1))).flatten(-2)


def swap_neighbours(x: torch.Tensor) -> torch.Tensor:
    """Swaps the channels of each pair, which are neighbours."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def sign_neighbours(sin: torch.Tensor) -> torch.Tensor:
    return sign_halves(sin.unflatten(-1, (-1, 2))).flatten(-2)


class Pairs(NamedTuple):
    """How channels that RoPE rotates together lie: what swaps them, what turns the sign of the first one's sine."""

    swap: Callable[[torch.Tensor], torch.Tensor]
    sign: Callable[[torch.Tensor], torch.Tensor]


def pairs_of(config: MiniLLMConfig) -> Pairs:
    if config.rope_interleaved:
        return Pairs(swap_neighbours, sign_neighbours)
    return Pairs(swap_halves_of_axes, sign_halves_of_axes) if config.rope_2d else Pairs(swap_halves, sign_halves)


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: Pairs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the first channels of queries and keys [B, H, Q, D] by `cos` and `sin` [B or 1, Q, rotary channels]; the
    rest stays. A pair (a, b) becomes (a cos - b sin, b cos + a sin): the swapped pair times the sine, whose sign is
    turned once for both, which costs less than turning the channels of each."""
    cos, sin = cos.unsqueeze(1), pairs.sign(sin).unsqueeze(1)
    return rotate_pairs(query, cos, sin, pairs), rotate_pairs(key, cos, sin, pairs)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return x * cos + pairs.swap(x) * sin
    rotary, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((rotary * cos + pairs.swap(rotary) * sin, rest), dim=-1)
