"""Half precision must not touch the statistics of norms, nor angles and biases of positions: they are float32.

Each value is held against the same formula in float64 on the *rounded* inputs, so that only the arithmetic in between
counts.
"""

import pytest
import torch
from matrix_cases import batch, loud_model, tiny_config
from precision_cases import HALVES, assert_rounded_once, each_half, randn
from reference import alibi_slopes, rope_frequencies, sandwich_bias, sinusoid
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minillm.conversion.transforms import _normalise_rows
from minillm.normalization import NORMS
from minillm.position_embeddings import sinusoidal_embedding
from minillm.position_schemes import POSITION_BIASES
from minillm.rotary import MiniLLMRotaryEmbedding
from minillm.training.vocabulary import fill_rows

FAR = [0, 1, 2, 255, 257, 4_097, 65_537, 99_999, 100_000, 131_071]
"""Positions of which bfloat16 holds the first four exactly, and float16 the first five."""


SCALES = {"ordinary": 1.0, "squares above float16": 3e3, "squares below float16": 1e-4}


def exact_norm(norm_type, x, eps):
    centred = x - x.mean(-1, keepdim=True) if norm_type == "layernorm" else x
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


@each_half
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm_type", NORMS)
def test_statistics_of_norms(norm_type, scale, dtype):
    config = tiny_config(norm_type=norm_type, norm_eps=1e-12)
    norm = NORMS[norm_type](config, 512).to(dtype)
    x = randn(64, 512, dtype=dtype, scale=SCALES[scale]).requires_grad_()
    # Those of LayerNorm are differences of numbers as large as the mean square.
    slack = 1e-5 if norm_type == "layernorm" else 0.0
    assert_rounded_once(norm(x), exact_norm(norm_type, x.double(), 1e-12), dtype, slack)


@each_half
def test_statistics_of_norms_have_exact_gradients(dtype):
    norm = NORMS["rmsnorm"](tiny_config(), 512).to(dtype)
    x, coefficients = randn(64, 512, dtype=dtype).requires_grad_(), randn(64, 512, dtype=dtype, seed=1)
    found = torch.autograd.grad(norm(x), x, coefficients)[0]
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(exact_norm("rmsnorm", wide, 1e-6), wide, coefficients.double())[0]
    assert_rounded_once(found, exact, dtype, slack=1e-5)


@each_half
def test_rmsnorm_rounds_where_llamas_does(dtype):
    ours, theirs = (kind.to(dtype) for kind in (NORMS["rmsnorm"](tiny_config(), 64), LlamaRMSNorm(64, 1e-6)))
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(1 + randn(64, scale=0.3, seed=1))
    x = randn(100, 64, dtype=dtype, scale=5.0)
    assert torch.equal(ours(x), theirs(x))


@each_half
def test_directions_of_rows_that_are_written(dtype):
    """Of a head with normalised rows: for a checkpoint of another family, and for new tokens."""
    rows = randn(20, 512, dtype=dtype, scale=3.0)
    unit = rows.double() / rows.double().norm(dim=-1, keepdim=True)
    assert_rounded_once(_normalise_rows((rows,), None)[0], unit, dtype)
    table = torch.cat((rows, rows.new_zeros(1, 512)))
    fill_rows(table, {20: [3, 5, 8]}, num_old=20, by_direction=True)
    assert_rounded_once(table[20], unit[[3, 5, 8]].mean(0), dtype, slack=1e-7)
    assert torch.equal(table[:20], rows)


ROPES = {
    "plain": {},
    "interleaved": {"rope_interleaved": True},
    "two axes": {"rope_2d": True},
    "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    "ntk": {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 4.0}},
    "scaled cosines": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def exact_rotation(config, frequencies, factor):
    """Cosines and sines of one axis at the positions of `FAR`, and their angles, in float64."""
    angles = torch.tensor(FAR, dtype=torch.float64)[:, None] * torch.as_tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if config.rope_interleaved:
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), angles.repeat_interleave(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), torch.cat((angles, angles), -1)


def assert_exact_rotation(rotary, config, frequencies, factor, dtype):
    positions = torch.tensor([FAR])
    axes = (positions, positions) if config.rope_2d else (positions,)
    found = rotary(torch.zeros(1, len(FAR), 32, dtype=dtype), *axes)
    *exact, angles = (part.repeat(1, len(axes)) for part in exact_rotation(config, frequencies, factor))
    for own, true in zip(found, exact, strict=True):
        # A float32 angle is off by its last place, and its frequency by two.
        assert_rounded_once(own[0], true, dtype, slack=factor * 3e-7 * angles + 1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rope", ROPES)
def test_angles_of_far_positions(rope, dtype, autocast):
    config = tiny_config(**{"head_dim": 16, **ROPES[rope]})
    dim = int(16 * config.rope_parameters.get("partial_rotary_factor", 1)) // (2 if config.rope_2d else 1)
    expected = rope_frequencies(config.rope_parameters, dim, config.max_position_embeddings, 1)
    rotary = MiniLLMRotaryEmbedding(config)
    assert rotary.inv_freq.dtype == torch.float32
    torch.testing.assert_close(rotary.inv_freq.double(), torch.tensor(expected[0]).double(), rtol=3e-7, atol=0)
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype, enabled=autocast):
        assert_exact_rotation(rotary, config, *expected, dtype)


@each_half
@pytest.mark.parametrize("way", ["to", "by name"])
def test_a_cast_leaves_the_frequencies_alone(way, dtype):
    config = tiny_config(head_dim=16)
    model = loud_model(config)
    before = {name: table.clone() for name, table in model.model.rotary_emb.named_buffers()}
    by_name = model.half if dtype == torch.float16 else model.bfloat16
    rotary = (model.to(dtype) if way == "to" else by_name()).model.rotary_emb
    for name, table in rotary.named_buffers():
        assert table.dtype == torch.float32 and torch.equal(table, before[name])
    assert_exact_rotation(rotary, config, rotary.inv_freq.double(), 1.0, dtype)
    assert all(table.device.type == "meta" for table in rotary.to("meta").buffers())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models of each scheme whose scores depend on distances alone."""
    root = tmp_path_factory.mktemp("models")
    for name, fields in RELATIVE.items():
        loud_model(tiny_config(**fields)).save_pretrained(root / name)
    return root


RELATIVE = {
    "rope": {},
    "rope_interleaved": {"rope_interleaved": True, "num_key_value_heads": 2},
    "rope_2d": {"rope_2d": True},
    "alibi": {"position_embedding_type": "alibi"},
    "sandwich": {"position_embedding_type": "sandwich", "sandwich_dim": 6},
}


@pytest.mark.parametrize("way", ["loaded", "autocast"])
@each_half
@pytest.mark.parametrize("scheme", RELATIVE)
def test_far_away_a_model_says_what_it_says_at_the_start(scheme, dtype, way, saved):
    """Of relative positions only distances count, which are the same 100,000 tokens later."""
    model = AutoModelForCausalLM.from_pretrained(saved / scheme, dtype=torch.float32 if way == "autocast" else dtype)
    if scheme.startswith("rope"):
        kept, fresh = model.model.rotary_emb.inv_freq, MiniLLMRotaryEmbedding(model.config).inv_freq
        assert kept.dtype == torch.float32 and torch.equal(kept, fresh)
    ids, near = batch(model.config, "plain")["input_ids"], torch.arange(10)[None]
    axes = ("position_ids", "block_position_ids") if model.config.rope_2d else ("position_ids",)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=way == "autocast"):
        runs = [
            model(ids, torch.ones_like(ids), **dict.fromkeys(axes, near + start)).logits.double()
            for start in (0, 100_000)
        ]
    # Of a few layers in half precision; a wrong angle moves all of it.
    assert (runs[0] - runs[1]).norm() <= 8 * torch.finfo(dtype).eps * runs[0].norm()


@pytest.mark.parametrize("size", [24, 5])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bfloat16", "float16", "float32"])
def test_sinusoids_of_far_positions(dtype, size):
    """Of an odd size, too, the last channel of which is a sine."""
    found = sinusoidal_embedding(torch.tensor([FAR]), size, dtype)[0]
    channels = torch.arange(size, dtype=torch.float64)
    angles = torch.tensor(FAR).double()[:, None] * 10000.0 ** -((channels - channels % 2) / size)
    exact = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    assert_rounded_once(found, exact, dtype, slack=5e-7 * angles + 1e-6)


def test_a_model_adds_sinusoids_in_its_own_dtype():
    model = loud_model(tiny_config(position_embedding_type="sinusoidal", num_hidden_layers=1)).bfloat16()
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    positions = torch.tensor([FAR])
    ids = torch.arange(len(FAR))[None]
    model(ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    table = torch.tensor([sinusoid(position, 32) for position in FAR], dtype=torch.float64)
    exact = model.model.embed_tokens(ids)[0].double() + table
    assert seen[0].dtype == torch.bfloat16
    # Twice rounded, and the angles of 131,071 positions to two hundredths.
    assert (seen[0][0].double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max() + 0.04


BIASES = {
    "alibi": {"position_embedding_type": "alibi"},
    # Their slopes are no powers of two.
    "alibi of twelve heads": {
        "position_embedding_type": "alibi",
        "num_attention_heads": 12,
        "hidden_size": 48,
        "alibi_scale": 0.7,
    },
    "sandwich": {"position_embedding_type": "sandwich", "sandwich_dim": 12},
}


@each_half
@pytest.mark.parametrize("scheme", BIASES)
def test_biases_of_far_positions(scheme, dtype):
    config = tiny_config(**BIASES[scheme])
    queries, keys = [1_000_000, 1_000_003, 1_048_577], [0, 999_000, 999_999, 1_000_000, 1_000_003]
    positions = torch.tensor([queries]), torch.tensor([keys])
    bias = POSITION_BIASES[config.position_embedding_type](config, *positions, dtype)
    found = bias.dense()[0]
    slopes = [slope * config.alibi_scale for slope in alibi_slopes(config.num_attention_heads)]

    def exact(head, query, key):
        return sandwich_bias(config, head, query, key) if scheme == "sandwich" else -slopes[head] * abs(query - key)

    for head in range(config.num_attention_heads):
        expected = [[exact(head, query, key) for key in keys] for query in queries]
        torch.testing.assert_close(found[head].double(), torch.tensor(expected).double(), rtol=3e-7, atol=2e-6)
        # One by one the angles are of a float32 distance.
        for at, query in enumerate(queries):
            slack = 2e-6 + 2e-7 * (query - keys[3])
            assert bias[0, head, at, 3].item() == pytest.approx(expected[at][3], rel=3e-7, abs=slack)
