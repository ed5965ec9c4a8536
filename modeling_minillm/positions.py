"""How order is known: rotary embeddings, additive position embeddings, and attention biases.

Shapes: B batch, H heads, Q new tokens, K keys, D channels. Positions are integers [B or 1, length].
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minillm.configuration.configuration_minillm import MiniLLMConfig


class MiniLLMRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (arXiv 2104.09864) for all of transformers' scaling types and the fixed NTK-aware one.

    It has no state: where frequencies follow the length, they are a function of the lengths that `forward` is given.

    Args:
        config: gives `rope_parameters`, `rope_interleaved`, `rope_2d` and `head_dim`.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        config.standardize_rope_params()
        self.config = config
        self.interleaved, self.two_axes = config.rope_interleaved, config.rope_2d
        self.rope_type = config.rope_parameters["rope_type"]
        self.by_length = FREQUENCIES_BY_LENGTH.get(self.rope_type)
        tables, self.attention_scaling = self.compute_tables()
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

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
            beyond = config.rope_parameters["original_max_position_embeddings"] + 1
            tables["long_inv_freq"], _ = functions["longrope"](config, seq_len=beyond)
        return tables, scaling

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MiniLLMRotaryEmbedding":
        """Moves the tables, but keeps them in float32 where a model is cast: rounded frequencies turn far positions by
        other angles."""
        tables = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if self._buffers[name].dtype != table.dtype:
                self._buffers[name] = table.to(self._buffers[name].device)
        return self

    @staticmethod
    def compute_default_rope_parameters(config: MiniLLMConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """`theta ** (-2i / dim)` over the rotary channels."""
        return inverse_frequencies(config, config.rope_parameters["rope_theta"]), 1.0

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        block_position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and signed sines [B, 1, Q, rotary channels] in the dtype of `x`; both axes side by side in
        2D.

        Args:
            position_ids, block_position_ids: [B or 1, Q].
            lengths: of each token's document [B or 1, Q or 1], where the frequencies follow it; see
                `minillm.layout.Layout.document_lengths`.
        """
        # [rotary channels / 2], or [B or 1, Q or 1, rotary channels / 2] by length
        inv_freq = self.inv_freq if lengths is None else self.by_length(self, lengths)
        cos, sin = self.rotate(x, position_ids, inv_freq)
        if self.two_axes:
            second = torch.zeros_like(position_ids) if block_position_ids is None else block_position_ids
            block_cos, block_sin = self.rotate(x, second, inv_freq)
            cos = torch.cat(torch.broadcast_tensors(cos, block_cos), dim=-1)
            sin = torch.cat(torch.broadcast_tensors(sin, block_sin), dim=-1)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    @torch.no_grad()
    def rotate(
        self, x: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines along one axis, each frequency twice as `rope_interleaved` lays them out, with the sine
        negative for the first of a pair."""
        angles = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(x.dtype), sin.to(x.dtype)


def inverse_frequencies(config: MiniLLMConfig, theta: float) -> torch.Tensor:
    dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def compute_ntk(config: MiniLLMConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
    """Fixed NTK-aware scaling: the base grows by `factor ** (dim / (dim - 2))`, so that the lowest frequency is
    stretched by `factor` and the highest stays."""
    dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    stretch = config.rope_parameters["factor"] ** (dim / max(dim - 2, 1))
    return inverse_frequencies(config, config.rope_parameters["rope_theta"] * stretch), 1.0


def dynamic_frequencies(rotary: MiniLLMRotaryEmbedding, lengths: torch.Tensor) -> torch.Tensor:
    """NTK-aware scaling by length, in transformers' own formula: lengths [B or 1, Q or 1] to inverse frequencies
    [B or 1, Q or 1, rotary channels / 2]."""
    return ROPE_INIT_FUNCTIONS["dynamic"](rotary.config, lengths.device, seq_len=lengths[..., None])[0]


def longrope_frequencies(rotary: MiniLLMRotaryEmbedding, lengths: torch.Tensor) -> torch.Tensor:
    """LongRoPE's two sets (arXiv 2402.13753): the long one beyond the original length. Shapes as above."""
    limit = rotary.config.rope_parameters["original_max_position_embeddings"]
    return torch.where(lengths[..., None] > limit, rotary.long_inv_freq, rotary.inv_freq)


FREQUENCIES_BY_LENGTH = {"dynamic": dynamic_frequencies, "longrope": longrope_frequencies}
"""RoPE types whose frequencies follow the length of a token's document."""


def follows_length(config: MiniLLMConfig) -> bool:
    """Whether a config's RoPE asks for the length of each token's document."""
    return (vars(config)["rope_parameters"] or {}).get("rope_type") in FREQUENCIES_BY_LENGTH


def swap_halves(x: torch.Tensor) -> torch.Tensor:
    """Swaps the channels of each pair, which are half a vector apart."""
    return x.roll(x.shape[-1] // 2, dims=-1)


def swap_halves_of_axes(x: torch.Tensor) -> torch.Tensor:
    """The same in each half of the channels, one for either position axis."""
    return swap_halves(x.unflatten(-1, (2, -1))).flatten(-2)


def swap_neighbours(x: torch.Tensor) -> torch.Tensor:
    """Swaps the channels of each pair, which are neighbours."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def pair_swap(config: MiniLLMConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that swaps what RoPE rotates together."""
    if config.rope_interleaved:
        return swap_neighbours
    return swap_halves_of_axes if config.rope_2d else swap_halves


def apply_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, swap: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Rotates the first channels of `x` [B, H, Q, D] by `cos` and the signed `sin` [B, 1, Q, rotary channels]; the
    rest stays. A pair (a, b) becomes (a cos - b sin, b cos + a sin): the swapped pair times the signed sine."""
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return x * cos + swap(x) * sin
    rotary, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((rotary * cos + swap(rotary) * sin, rest), dim=-1)


def sinusoidal_embedding(position_ids: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines at even and cosines at odd channels (arXiv 1706.03762, section 3.5): [B, length, size]."""
    step = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float) / size
    angles = position_ids[..., None].float() * 10000.0**-step
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :size].to(dtype)


def _learned(model: nn.Module, position_ids: torch.Tensor, block_position_ids: torch.Tensor | None) -> torch.Tensor:
    return model.embed_positions(position_ids)


def _sinusoidal(model: nn.Module, position_ids: torch.Tensor, block_position_ids: torch.Tensor | None) -> torch.Tensor:
    return sinusoidal_embedding(position_ids, model.config.hidden_size, model.embed_tokens.weight.dtype)


def _glm_2d(model: nn.Module, position_ids: torch.Tensor, block_position_ids: torch.Tensor | None) -> torch.Tensor:
    if block_position_ids is None:
        block_position_ids = torch.zeros_like(position_ids)
    return model.embed_positions(position_ids) + model.embed_block_positions(block_position_ids)


POSITION_TABLES = {"learned": ("embed_positions",), "glm_2d": ("embed_positions", "embed_block_positions")}
"""Names of the learned tables [position_table_size, hidden] that a scheme keeps on the model."""

POSITION_EMBEDDINGS = {"learned": _learned, "sinusoidal": _sinusoidal, "glm_2d": _glm_2d}
"""Schemes that add something to the token embedding."""


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

    @property
    def num_heads(self) -> int:
        return self.head_factors.shape[0]

    def local_heads(self, first: int, count: int) -> "PositionBias":
        """The bias of `count` heads from `first` on, for a tensor-parallel rank."""
        part = copy.copy(self)
        part.head_factors = self.head_factors[first : first + count]
        return part

    def _distance(self, batch, query, key) -> torch.Tensor:
        # A single row of positions serves every batch row.
        query_row = batch if self.query_positions.shape[0] > 1 else 0
        key_row = batch if self.key_positions.shape[0] > 1 else 0
        return (self.query_positions[query_row, query] - self.key_positions[key_row, key]).abs()

    def _distances(self) -> torch.Tensor:
        return (self.query_positions[:, None, :, None] - self.key_positions[:, None, None, :]).abs()


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


LONGEST_FOLD = {torch.bfloat16: 2**16, torch.float16: 2**13}
"""Up to so many tokens the fold is as exact as a table of the bias, by dtype. The larger `slope * position`, the fewer
digits of a float32 sum are left to the score, which float16 is fine enough to show, and float32 at any length. In
bfloat16 the limit is that of two digits below 256."""
WIDEST_FOLD = 256
"""The widest heads that SDPA's fused kernels take."""
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

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    def local_heads(self, first: int, count: int) -> "FoldedBias":
        """The channels of `count` heads from `first` on, for a tensor-parallel rank."""
        return FoldedBias(self.query[:, first : first + count], self.key)

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
    fits = config.alibi_scale <= 1 and folded_width(config.head_dim) <= WIDEST_FOLD
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


POSITION_BIASES = {"alibi": AlibiBias, "sandwich": SandwichBias}
"""Schemes that act inside attention."""
