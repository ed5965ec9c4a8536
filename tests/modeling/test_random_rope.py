"""RoPE dictionaries drawn at random: angles by the formulas of the papers in plain Python, or a refusal by name."""

import math

import pytest
import torch
from hypothesis import strategies as st
from matrix_cases import tiny_config
from random_cases import random_test, rope_dictionaries

from minillm import MiniLLMConfig
from minillm.configuration.rope_fields import ALL_ROPE_KEYS, ROPE_KEYS
from minillm.rotary import MiniLLMRotaryEmbedding

LENGTH = 16
"""`max_position_embeddings` of the configs here."""


def frequencies(rope, dim, length):
    """Inverse frequencies of `dim` channels for a text of so many tokens, and the factor on cosines and sines."""
    base, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor")
    original = rope.get("original_max_position_embeddings", LENGTH)
    if kind == "ntk":
        base *= factor ** (dim / (dim - 2))
    if kind == "dynamic":
        # "Dynamically scaled RoPE further increases performance of long context LLaMA", the formula of its author.
        stretch = factor * max(length, LENGTH) / LENGTH - (factor - 1)
        base *= stretch ** (dim / (dim - 2))
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if kind == "linear":
        return [frequency / factor for frequency in plain], 1.0
    if kind == "llama3":
        return [llama3(frequency, rope, original) for frequency in plain], 1.0
    if kind == "yarn":
        scale = rope.get("attention_factor") or (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1)
        return [yarn(frequency, i, rope, dim, original) for i, frequency in enumerate(plain)], scale
    if kind == "longrope":
        ratio = factor or LENGTH / original
        scale = rope.get("attention_factor")
        if scale is None:
            scale = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
        factors = rope["long_factor" if length > original else "short_factor"]
        return [frequency / each for frequency, each in zip(plain, factors, strict=True)], scale
    return plain, 1.0


def llama3(frequency, rope, original):
    """Llama 3.1: long waves are stretched, short ones stay, and those between are mixed."""
    turns = original * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return share * frequency + (1 - share) * frequency / rope["factor"]


def yarn(frequency, index, rope, dim, original):
    """YaRN (arXiv 2309.00071, section 3.2): a ramp between the channels that turn `beta_fast` and `beta_slow` times
    within the original length."""

    def channel_of(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = channel_of(rope.get("beta_fast") or 32), channel_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (index - low) / (high - low if high != low else 0.001)
    stretched = min(1.0, max(0.0, ramp))
    return stretched * frequency / rope["factor"] + (1 - stretched) * frequency


@st.composite
def cases(draw):
    """A config's pairs of channels and axes, its dictionary, and the length of a text."""
    two_axes = draw(st.booleans())
    pairs = draw(st.integers(1, 6)) * (2 if two_axes else 1)
    return pairs, two_axes, draw(rope_dictionaries(pairs, two_axes)), draw(st.integers(1, 40))


@random_test(quick=150, full=6000, case=cases(), interleaved=st.booleans())
def test_angles_are_those_of_the_formulas(case, interleaved):
    pairs, two_axes, rope, length = case
    fields = {"hidden_size": 2 * pairs, "num_attention_heads": 1, "max_position_embeddings": LENGTH}
    config = MiniLLMConfig(**fields, rope_parameters=rope, rope_2d=two_axes, rope_interleaved=interleaved)
    channels = int(2 * pairs * rope.get("partial_rotary_factor", 1.0))
    wanted, factor = frequencies(rope, channels // (2 if two_axes else 1), length)
    positions = torch.arange(length)[None]
    axes = [positions, positions.flip(-1)] if two_axes else [positions]
    cos, sin = MiniLLMRotaryEmbedding(config)(torch.zeros(1), *axes)
    angles = [axis[0, :, None].double() * torch.tensor(wanted, dtype=torch.float64) for axis in axes]
    twice = [angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1) for angle in angles]
    expected = torch.cat(twice, -1)
    assert cos.shape == sin.shape == (1, length, channels)
    tolerance = 1e-5 * factor
    torch.testing.assert_close(cos[0].double(), factor * expected.cos(), atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(sin[0].double(), factor * expected.sin(), atol=tolerance, rtol=1e-5)


NUMBERS = st.floats() | st.integers(-3, 40) | st.sampled_from([10**400, 1e-10, 1e30])
OTHERS = st.none() | st.booleans() | st.text(max_size=4) | st.lists(NUMBERS, max_size=4)
WILD = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from([*ROPE_KEYS, "su", None, 3]),
        **{key: NUMBERS | OTHERS for key in ALL_ROPE_KEYS if key not in ("rope_type", "type")},
    },
)


@random_test(quick=80, full=8000, rope=WILD)
def test_any_dictionary_is_refused_by_name_or_gives_finite_angles(rope):
    try:
        config = tiny_config(rope_parameters=rope)
    except ValueError as error:
        assert "rope" in str(error), error
        return
    positions = torch.tensor([[0, 1, 31, 32, 100_000]])
    for table in MiniLLMRotaryEmbedding(config)(torch.zeros(1), positions):
        assert torch.isfinite(table).all()


def test_formulas_by_hand():
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    assert frequencies(rope, 4, 9)[0] == pytest.approx([0.25, 0.025])
