"""Fresh weights per variant, and weights and buffers that survive the meta device."""

import math

import pytest
import torch
from matrix_cases import tiny_config
from reference import initial_std, rope_frequencies
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from variants import MOE, variants

from minillm import (
    MiniLLMForCausalLM,
    MiniLLMForQuestionAnswering,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
    MiniLLMModel,
)

VARIANTS = variants(
    "rope rope_interleaved_partial rope_2d rope_linear rope_ntk rope_dynamic rope_yarn rope_llama3 "
    "rope_longrope alibi alibi_falcon sandwich learned sinusoidal prefix-glm_2d none layernorm-post "
    "deepnorm-layernorm-mlp_bias deepnorm-mlp deepnorm-geglu-embedding_shrink deepnorm_beta sandwich_norm "
    "parallel_two_norms scale_residual_init scale_residual_init-mlp_relu initializer_range "
    "qkv_bias-out_bias-mlp_bias embedding_norm-qk_norm norm_head tied gqa moe deepnorm-moe "
    "scale_residual_init-moe"
)
each_variant = pytest.mark.parametrize("variant", VARIANTS)
HEADS = (
    MiniLLMModel,
    MiniLLMForCausalLM,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
    MiniLLMForQuestionAnswering,
)


def state_of(model):
    """All parameters and all buffers, those that are not saved too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_bit_equal(model, other):
    got, expected = state_of(model), state_of(other)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype, name


def noisy(model):
    """Other values than any initialisation gives, so that a tensor that was not loaded shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@each_variant
def test_deviation_of_every_parameter(variant):
    config = tiny_config(**{**VARIANTS[variant], "num_hidden_layers": 3, "vocab_size": 64})
    torch.manual_seed(0)
    model = MiniLLMForCausalLM(config)
    for name, parameter in model.named_parameters():
        std = initial_std(config, name, parameter.shape)
        if std == 0.0:
            constant = 1.0 if name.endswith(".weight") else 0.0
            assert (parameter == constant).all(), name
            continue
        # Four standard errors of a standard deviation of a normal sample.
        assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel())), name
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name
        assert parameter.abs().max() > 2 * std, f"{name} is not normal"


def test_deepnorm_gains_by_hand():
    """Four layers: beta is 32 ** -0.25 = 0.42; a square map of width 256 has Xavier's deviation 1 / 16."""
    config = tiny_config(norm_placement="deepnorm", num_hidden_layers=4, hidden_size=256, intermediate_size=256)
    torch.manual_seed(0)
    layer = MiniLLMModel(config).layers[3]
    beta = 32**-0.25
    for name, gain in {"q": 1.0, "k": 1.0, "v": beta, "o": beta}.items():
        weight = getattr(layer.self_attn, f"{name}_proj").weight
        assert weight.std().item() == pytest.approx(gain / 16, rel=0.02), name
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert getattr(layer.mlp, name).weight.std().item() == pytest.approx(beta / 16, rel=0.02), name


def test_deepnorm_gains_of_experts_by_hand():
    """Two layers: beta is 0.5; a map between 256 and 128 channels has Xavier's deviation (2 / 384) ** 0.5 = 0.072."""
    config = tiny_config(**MOE, norm_placement="deepnorm", hidden_size=256, intermediate_size=128)
    torch.manual_seed(0)
    experts = MiniLLMModel(config).layers[1].mlp.experts
    for projection in (*experts.gate_up_proj, *experts.down_proj):
        assert projection.std().item() == pytest.approx(0.0361, rel=0.02)


@pytest.mark.parametrize("rope", [name for name in VARIANTS if name.startswith("rope")])
def test_rotary_buffers(rope):
    config = tiny_config(**VARIANTS[rope])
    rotary = MiniLLMModel(config).rotary_emb
    parameters = config.rope_parameters
    dim = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0)) // (2 if config.rope_2d else 1)
    # Before any text, the types that follow its length stand at the original one.
    frequencies, factor = rope_frequencies(parameters, dim, config.max_position_embeddings, 1)
    for buffer in (rotary.inv_freq, rotary.original_inv_freq):
        assert buffer.tolist() == pytest.approx(frequencies, rel=1e-6)
    assert rotary.attention_scaling == pytest.approx(factor)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["plain", "device_map"])
@each_variant
def test_loading_leaves_every_buffer_right(variant, options, tmp_path, poisoned_memory):
    model = noisy(MiniLLMForCausalLM(tiny_config(**VARIANTS[variant])))
    model.save_pretrained(tmp_path)
    loaded, info = MiniLLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_bit_equal(loaded, model)
    tokens = torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("variant", ["rope", "alibi", "deepnorm-layernorm-mlp_bias"])
def test_loading_of_every_head(head, variant, tmp_path, poisoned_memory):
    model = noisy(head(tiny_config(**VARIANTS[variant], num_labels=3, pad_token_id=0)))
    model.save_pretrained(tmp_path)
    assert_bit_equal(head.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("head", HEADS[1:], ids=lambda head: head.__name__)
def test_a_head_on_a_base_model_is_initialised(head, tmp_path, poisoned_memory):
    base = noisy(MiniLLMModel(tiny_config(num_labels=3, pad_token_id=0)))
    base.save_pretrained(tmp_path)
    model = head.from_pretrained(tmp_path)
    assert_bit_equal(model.model, base)
    for name, tensor in state_of(model).items():
        assert torch.isfinite(tensor).all(), name
        if name.endswith(".weight") and not name.startswith("model."):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.4), name


@pytest.mark.parametrize("variant", ["deepnorm-mlp", "scale_residual_init"])
def test_a_missing_weight_gets_its_own_deviation(variant, tmp_path, poisoned_memory):
    config = tiny_config(**{**VARIANTS[variant], "hidden_act": "gelu"})
    model = noisy(MiniLLMForCausalLM(config))
    missing = "model.layers.1.self_attn.o_proj.weight"
    weights = {name: weight for name, weight in model.state_dict().items() if name != missing}
    model.save_pretrained(tmp_path, state_dict=weights)
    torch.manual_seed(0)
    loaded, info = MiniLLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    for name, tensor in state_of(loaded).items():
        if name != missing:
            assert torch.equal(tensor, state_of(model)[name]), name
    fresh = loaded.model.layers[1].self_attn.o_proj.weight
    assert fresh.std().item() == pytest.approx(initial_std(config, missing, fresh.shape), rel=0.1)


@each_variant
def test_meta_device_equals_construction(variant, poisoned_memory):
    """Meta, `to_empty`, `init_weights`; construction without weights, `init_weights`: the same draws, bit for bit."""
    config = tiny_config(**VARIANTS[variant])
    with torch.device("meta"), no_init_weights():
        empty = MiniLLMForCausalLM(config)
    assert all(tensor.is_meta for tensor in state_of(empty).values())
    empty.to_empty(device="cpu")
    with no_init_weights():
        built = MiniLLMForCausalLM(config)
    for model in (empty, built):
        # Both ways leave tying, like the weights, to be done afterwards.
        model.tie_weights()
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        for module in model.modules():
            module._is_hf_initialized = False
        torch.manual_seed(7)
        model.init_weights()
    assert_bit_equal(empty, built)
    tokens = torch.randint(0, 19, (1, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(empty.eval()(tokens).logits, built.eval()(tokens).logits)


def test_half_precision_loads_rotary_buffers_as_llama_does(tmp_path):
    config = tiny_config()
    MiniLLMForCausalLM(config).save_pretrained(tmp_path)
    loaded = MiniLLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in sizes}))
    llama.save_pretrained(tmp_path / "llama")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == stock.model.rotary_emb.inv_freq.dtype
    assert torch.equal(loaded.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
