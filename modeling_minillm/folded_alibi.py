"""ALiBi folded into queries and keys, so that SDPA's kernels for plain causal attention serve it in 16 bits.

Shapes: B batch, H heads, K tokens, D channels of a head, C channels of the bias.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minillm.alibi import alibi_slopes
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.tuning import tuning

SLOPE_PARTS = 3
"""So many parts of 8 significant bits hold all 24 of a float32 slope."""


class FoldedBias(NamedTuple):
    """ALiBi under a plain causal mask, as channels that queries and keys have in addition.

    Softmax does not see what is constant along a row of scores, so that `-slope * (i - j)` and `slope * j` are the
    same bias; and `slope * j` is an inner product. The slope is the query's, since shared keys have none.

    Attributes:
        query: parts of the slope over the softmax's scaling, [1, H, 1, C].
        key: digits of the position, [1, 1, K, C].
    """

    query: torch.Tensor
    key: torch.Tensor

    def of_heads(self, heads: slice) -> "FoldedBias":
        """The channels of some of the heads, those of a tensor-parallel rank."""
        return FoldedBias(self.query[:, heads], self.key)

    def widen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Appends the channels to queries [B, H, K, D] and keys [B, key/value heads, K, D], and zeros to values, since
        flash kernels want one width of all three: [..., D + C]."""
        zeros = value.new_zeros(1, 1, 1, self.key.shape[-1])
        return _append(query, self.query), _append(key, self.key), _append(value, zeros)


def _append(states: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    # Joined as the projections lie in memory (batch, length, heads), the form in which a flash kernel leaves its
    # output: nothing needs to be copied for the order of its dimensions afterwards.
    states, channels = states.transpose(1, 2), channels.to(states).transpose(1, 2)
    return torch.cat((states, channels.expand(*states.shape[:-1], -1)), dim=-1).transpose(1, 2)


def folded_width(head_dim: int) -> int:
    """Channels of a head with those of the bias, in multiples of 8, to which kernels would pad by themselves."""
    return -(-(head_dim + 2 * SLOPE_PARTS) // 8) * 8


def is_foldable(config: MiniLLMConfig) -> bool:
    """Whether a config's bias can become channels, given a dtype, a device and a call that allow it.

    Roundings of other libraries are theirs, and with a steeper scale the sums would outgrow their precision.
    """
    is_exact = config.position_embedding_type == "alibi" and config.alibi_rounding == "none"
    fits = config.alibi_scale <= 1 and folded_width(config.head_dim) <= tuning.widest_fold
    return is_exact and fits and config.attention_type != "bidirectional"


def split(number: float, bits: int) -> list[float]:
    """`number` as a sum of `SLOPE_PARTS` numbers of `bits` significant bits each."""
    parts = []
    for _ in range(SLOPE_PARTS):
        mantissa, exponent = math.frexp(number)
        parts.append(math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits))
        number -= parts[-1]
    return parts


def fold_alibi(config: MiniLLMConfig, length: int, dtype: torch.dtype, device: torch.device) -> FoldedBias:
    """The channels for `length` tokens at positions 0, 1, 2, ..., exact in `dtype`."""
    # Split in Python: in a compiled graph a rounding that is undone at once would be optimised away.
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    per_score = config.alibi_scale * config.head_dim**0.5
    parts = [split(slope * per_score, bits) for slope in alibi_slopes(config)]
    filling = [0.0] * (folded_width(config.head_dim) - config.head_dim - 2 * SLOPE_PARTS)
    # The factor 256 of the high digit stands here, lest small slopes leave float16's range of full precision.
    of_query = [[256 * part for part in of_head] + of_head + filling for of_head in parts]
    positions = torch.arange(length, device=device)
    digits = torch.stack((positions // 256, positions % 256), dim=-1).to(dtype)
    of_key = nn.functional.pad(digits.repeat_interleave(SLOPE_PARTS, dim=-1), (0, len(filling)))
    return FoldedBias(torch.tensor(of_query, dtype=dtype, device=device)[None, :, None], of_key[None, None])


def folded_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    position_bias: FoldedBias,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA, plainly causal, over queries [B, H, K, D] and keys and values [B, key/value heads, K, D] that are widened
    by the channels of the bias. An attention function of transformers' form.

    Returns:
        The output [B, K, H, D], and None.
    """
    head_dim, length = query.shape[-1], query.shape[-2]
    # A cache of fixed size, which was empty, returns its unwritten places too.
    states = position_bias.widen(query, key[:, :, :length], value[:, :, :length])
    output, probabilities = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, attention_mask, **kwargs)
    return output[..., :head_dim], probabilities
