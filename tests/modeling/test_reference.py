"""The naive twin checked by hand, and against stock models of transformers where a setting equals one of them."""

import math

import pytest
import torch
from reference import (
    alibi_bias,
    alibi_slopes,
    describe_rows,
    feed_forward,
    initial_std,
    norm,
    reference_greedy,
    reference_logits,
    restarts,
    rope_frequencies,
    rotate,
    sandwich_bias,
    sinusoid,
    visible,
)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minillm.configuration.configuration_minillm import MiniLLMConfig

SIZES = {
    "vocab_size": 17,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


def tiny_config(**fields):
    return MiniLLMConfig(**{**SIZES, **fields})


def drawing(attention_type, window, **row):
    """The mask as text, one line a query: x where it sees the key."""
    length = len(next(iter(row.values())))
    tensors = {name: torch.tensor([values]) for name, values in row.items()}
    (described,) = describe_rows((1, length), **tensors)
    return [
        "".join("x" if visible(attention_type, window, described, query, key) else "." for key in range(length))
        for query in range(length)
    ]


def test_mask_causal():
    assert drawing("causal", None, attention_mask=[1, 1, 1]) == ["x..", "xx.", "xxx"]


def test_mask_causal_window():
    assert drawing("causal", 2, attention_mask=[1, 1, 1, 1]) == ["x...", "xx..", ".xx.", "..xx"]


def test_mask_bidirectional_window():
    assert drawing("bidirectional", 2, attention_mask=[1, 1, 1, 1]) == ["xx..", "xxx.", ".xxx", "..xx"]


def test_mask_prefix():
    assert drawing("prefix", None, prefix_mask=[1, 1, 1, 0, 0]) == ["xxx..", "xxx..", "xxx..", "xxxx.", "xxxxx"]


def test_mask_prefix_reaches_past_the_window():
    assert drawing("prefix", 1, prefix_mask=[1, 1, 0, 0]) == ["xx..", "xx..", "..x.", "...x"]


def test_mask_left_padding_with_prefix():
    lines = drawing("prefix", None, attention_mask=[0, 1, 1, 1], prefix_mask=[0, 1, 1, 0])
    assert lines[1:] == [".xx.", ".xx.", ".xxx"]


def test_mask_hole_inside_and_after_the_prefix_keeps_one_block():
    lines = drawing("prefix", None, attention_mask=[1, 0, 1, 0, 1], prefix_mask=[1, 0, 1, 0, 0])
    assert [lines[0], lines[2], lines[4]] == ["x.x..", "x.x..", "x.x.x"]


def test_mask_documents_with_touching_prefixes():
    lines = drawing("prefix", None, document_ids=[5, 5, 7, 7, 7], prefix_mask=[1, 1, 1, 1, 0])
    assert lines == ["xx...", "xx...", "..xx.", "..xx.", "..xxx"]


def test_mask_second_prompt_is_a_second_block():
    lines = drawing("prefix", None, prefix_mask=[1, 1, 0, 1, 1])
    assert lines == ["xx...", "xx...", "xxx..", "xxxxx", "xxxxx"]


def test_positions_count_real_tokens_of_the_document():
    (row,) = describe_rows(
        (1, 7), torch.tensor([[0, 1, 1, 0, 1, 1, 1]]), document_ids=torch.tensor([[9, 0, 0, 9, 0, 1, 1]])
    )
    assert [row.position[slot] for slot in (1, 2, 4, 5, 6)] == [0, 1, 2, 0, 1]


def test_packing_is_seen_in_positions_that_restart_at_zero():
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    assert restarts(positions[0].tolist()) == [0, 0, 1, 1, 1]
    assert describe_rows((1, 5), position_ids=positions)[0].document == [0, 0, 1, 1, 1]
    mask, blocks = torch.ones(1, 5), torch.zeros(1, 5, dtype=torch.long)
    assert describe_rows((1, 5), mask, positions)[0].document == [0] * 5
    assert describe_rows((1, 5), position_ids=positions, block_position_ids=blocks)[0].document == [0] * 5


def test_alibi_slopes_by_hand():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(4) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(2, bias_max=4.0) == [2.0**-2, 2.0**-4]


def test_alibi_is_relative_and_symmetric():
    config = tiny_config(position_embedding_type="alibi", alibi_scale=0.5)
    assert alibi_bias(config, 0, 7, 3) == alibi_bias(config, 0, 3, 7) == -0.5 * 0.25 * 4


def test_alibi_falcon_rounds_to_bfloat16_in_a_float32_model():
    config = tiny_config(position_embedding_type="alibi", alibi_rounding="falcon")
    assert alibi_bias(config, 0, 0, 1025) == 0.25 * 1024


def test_alibi_bloom_rounds_to_the_dtype_of_the_model():
    config = tiny_config(position_embedding_type="alibi", alibi_rounding="bloom")
    assert alibi_bias(config, 0, 0, 1025) == 0.25 * 1025
    assert alibi_bias(config, 0, 0, 1025, torch.bfloat16) == 0.25 * 1024


def test_sandwich_by_hand():
    config = tiny_config(position_embedding_type="sandwich", sandwich_dim=2)
    assert sandwich_bias(config, 0, 5, 2) == pytest.approx(math.cos(3) / 2)
    assert sandwich_bias(config, 3, 2, 5) == pytest.approx(math.cos(3) / 8)
    wide = tiny_config(position_embedding_type="sandwich", sandwich_dim=4)
    assert sandwich_bias(wide, 1, 4, 0) == pytest.approx((math.cos(4) + math.cos(4 / 100)) / 4)


def test_sinusoid_by_hand():
    assert sinusoid(3, 4) == pytest.approx([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)])


def test_rope_turns_the_planes_of_its_layout():
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    frequencies, _ = rope_frequencies({"rope_theta": 100.0}, 4, 16, 1)
    assert frequencies == pytest.approx([1.0, 0.1])
    assert rotate(x, [2], frequencies, 1.0, False)[0].tolist() == pytest.approx([math.cos(2), 0, math.sin(2), 0])
    assert rotate(x, [2], frequencies, 1.0, True)[0].tolist() == pytest.approx([math.cos(2), math.sin(2), 0, 0])


def test_rope_frequencies_of_linear_and_ntk():
    linear = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    assert rope_frequencies(linear, 4, 16, 1)[0] == pytest.approx([0.25, 0.025])
    ntk = {"rope_type": "ntk", "rope_theta": 100.0, "factor": 4.0}
    # theta * 4 ** (4 / 2) = 1600: the fastest plane keeps its speed, the slowest is stretched by the whole factor.
    assert rope_frequencies(ntk, 4, 16, 1)[0] == pytest.approx([1.0, 1 / 40])


def test_norms_by_hand():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    weights = {"n.weight": torch.tensor([1.0, 2.0]), "n.bias": torch.tensor([0.0, 1.0])}
    rms = math.sqrt(12.5)
    config = tiny_config(norm_eps=1e-12)
    assert norm(config, {"n.weight": weights["n.weight"]}, "n", x).tolist() == pytest.approx([3 / rms, 8 / rms])
    layernorm = tiny_config(norm_type="layernorm", norm_eps=1e-12)
    assert norm(layernorm, weights, "n", x).tolist() == pytest.approx([-1, 3])


@pytest.mark.parametrize(
    ("mlp_type", "hidden_act", "expected"),
    [
        ("glu", "gtu", math.tanh(3.0) / (1 + math.exp(-2.0))),
        ("glu", "bilinear", 6.0),
        ("glu", "relu", 6.0),
        ("glu", "silu", 6.0 / (1 + math.exp(-2.0))),
        ("mlp", "relu", 3.0),
    ],
)
def test_feed_forwards_by_hand(mlp_type, hidden_act, expected):
    config = tiny_config(mlp_type=mlp_type, hidden_act=hidden_act)
    names = {"gate_proj": 2.0, "up_proj": 3.0, "down_proj": 1.0}
    weights = {f"mlp.{name}.weight": torch.tensor([[value]], dtype=torch.float64) for name, value in names.items()}
    assert feed_forward(config, weights, torch.ones(1, dtype=torch.float64)).item() == pytest.approx(expected)


def test_head_normalisation_divides_rows_by_their_length():
    config = tiny_config(norm_head=True, num_hidden_layers=1, position_embedding_type="none")
    weights = llama_weights(config)
    scaled = {**weights, "lm_head.weight": 7.0 * weights["lm_head.weight"]}
    tokens = torch.tensor([[3, 1, 4]])
    plain = reference_logits(config, weights, tokens)
    assert torch.allclose(plain, reference_logits(config, scaled, tokens), atol=1e-12)
    unit = tiny_config(num_hidden_layers=1, position_embedding_type="none")
    rows = weights["lm_head.weight"]
    weights = {**weights, "lm_head.weight": rows / rows.pow(2).sum(-1, keepdim=True).sqrt()}
    assert torch.allclose(plain, reference_logits(unit, weights, tokens), atol=1e-12)


def test_shrink_changes_gradients_and_no_values():
    config = tiny_config(embedding_gradient_scale=0.25, num_hidden_layers=1)
    weights = llama_weights(config)
    table = weights["model.embed_tokens.weight"].requires_grad_()
    tokens = torch.tensor([[3, 1, 4]])
    plain, shrunk = (reference_logits(config, weights, tokens, training=training) for training in (False, True))
    assert torch.allclose(plain, shrunk, atol=1e-12)
    gradients = [torch.autograd.grad(logits.sin().sum(), table)[0] for logits in (plain, shrunk)]
    assert torch.allclose(0.25 * gradients[0], gradients[1], atol=1e-10)


def test_initial_deviations():
    deepnorm = tiny_config(norm_placement="deepnorm")
    assert initial_std(deepnorm, "model.layers.0.self_attn.q_proj.weight", (32, 32)) == pytest.approx(
        math.sqrt(2 / 64)
    )
    assert initial_std(deepnorm, "model.layers.1.mlp.up_proj.weight", (48, 32)) == pytest.approx(
        0.5 * math.sqrt(2 / 80)
    )
    residual = tiny_config(scale_residual_init=True)
    assert initial_std(residual, "model.layers.1.mlp.down_proj.weight", (32, 48)) == pytest.approx(0.01)
    assert initial_std(residual, "model.layers.1.mlp.up_proj.weight", (48, 32)) == 0.02
    assert initial_std(residual, "lm_head.weight", (17, 32)) == 0.02


def randomise(model, seed=0, dtype=torch.float64):
    """Weights large enough that every mask and bias shows in the logits; norm weights near one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else 0.2
        offset = parameter.data if parameter.ndim == 1 else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def stock_config(config_class, **fields):
    return config_class(**{**SIZES, "num_key_value_heads": 2, **fields})


def llama_weights(config):
    llama = stock_config(
        LlamaConfig, num_hidden_layers=config.num_hidden_layers, num_key_value_heads=config.num_key_value_heads
    )
    return {name: weight.detach() for name, weight in randomise(LlamaForCausalLM(llama)).state_dict().items()}


def assert_same(config, model, weights, **inputs):
    """Logits at real tokens equal in double precision; sized so that a wrong mask cannot hide."""
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 10), generator=torch.Generator().manual_seed(1))
    # Without a cache, since stock models look for packing only then.
    expected = model(tokens, use_cache=False, **inputs).logits
    got = reference_logits(config, weights, tokens, **inputs)
    real = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
    assert expected.std() > 0.3
    tolerance = 2e-6 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got[real], expected[real], atol=tolerance, rtol=0)


LEFT_PADDED = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 2.0,
    "original_max_position_embeddings": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "factor": 2.0,
    "original_max_position_embeddings": 8,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 2.5, 3.0],
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        YARN,
        LLAMA3,
        LONGROPE,
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_equals_llama(rope):
    # Eight positions: the sequence of ten runs past them, so the types that follow the length seen do stretch.
    sizes = {"max_position_embeddings": 8 if rope["rope_type"] == "dynamic" else 16, "num_key_value_heads": 2}
    model = randomise(LlamaForCausalLM(stock_config(LlamaConfig, rope_parameters=dict(rope), **sizes)))
    config = tiny_config(rope_parameters=dict(rope), **sizes)
    assert_same(config, model, model.state_dict())
    # Llama's lengths are those of the batch, so that both rows have one.
    mask = LEFT_PADDED[:1].expand_as(LEFT_PADDED) if rope["rope_type"] in ("dynamic", "longrope") else LEFT_PADDED
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert_same(config, model, model.state_dict(), attention_mask=mask, position_ids=positions)


def test_equals_llama_packed():
    model = randomise(LlamaForCausalLM(stock_config(LlamaConfig)))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1], list(range(10))])
    assert_same(tiny_config(num_key_value_heads=2), model, model.state_dict(), position_ids=positions)


def test_equals_mistral_window():
    model = randomise(MistralForCausalLM(stock_config(MistralConfig, sliding_window=3)))
    assert_same(tiny_config(num_key_value_heads=2, sliding_window=3), model, model.state_dict())


def test_equals_qwen3_qk_norm():
    model = randomise(Qwen3ForCausalLM(stock_config(Qwen3Config, head_dim=8)))
    assert_same(tiny_config(num_key_value_heads=2, qk_norm=True), model, model.state_dict())


def rename(state_dict, table):
    """New names by replacing parts of names, one pair after the other."""
    renamed = {}
    for name, weight in state_dict.items():
        for old, new in table:
            name = name.replace(old, new)
        renamed[name] = weight
    return renamed


def fuse_apart(weights, split):
    """Replaces each fused `query_key_value` by q, k and v; `split` cuts a weight or bias into the three."""
    apart = {}
    for name, weight in weights.items():
        if "query_key_value" not in name:
            apart[name] = weight
            continue
        for part, piece in zip("qkv", split(weight), strict=True):
            apart[name.replace("query_key_value", f"{part}_proj")] = piece
    return apart


LAYER_NORM_MLP = {"norm_type": "layernorm", "norm_eps": 1e-5, "mlp_type": "mlp", "mlp_bias": True}
BIASES = {"attention_qkv_bias": True, "attention_out_bias": True}


def test_equals_bloom():
    stock = BloomConfig(vocab_size=17, hidden_size=32, n_layer=2, n_head=4)
    # Bloom has the eager form only, which in double gives NaN where padding hides a whole row.
    model = randomise(BloomForCausalLM(stock), dtype=torch.float32)
    table = [
        ("transformer.word_embeddings_layernorm", "model.embed_layernorm"),
        ("transformer.word_embeddings", "model.embed_tokens"),
        ("transformer.h.", "model.layers."),
        ("transformer.ln_f", "model.norm"),
        ("self_attention", "self_attn"),
        ("self_attn.dense", "self_attn.o_proj"),
        ("dense_h_to_4h", "up_proj"),
        ("dense_4h_to_h", "down_proj"),
    ]
    weights = fuse_apart(
        rename(model.state_dict(), table),
        lambda fused: [part.flatten(0, 1) for part in fused.unflatten(0, (4, 3, 8)).unbind(1)],
    )
    # Bloom's own tanh form of GELU.
    bloom = {"hidden_act": "gelu_pytorch_tanh", "embedding_norm": True, "position_embedding_type": "alibi"}
    for rounding in ("none", "bloom"):
        config = tiny_config(
            **{**LAYER_NORM_MLP, **BIASES, **bloom, "intermediate_size": 128, "alibi_rounding": rounding}
        )
        assert_same(config, model, weights)
        assert_same(config, model, weights, attention_mask=LEFT_PADDED)


def test_equals_gpt2():
    stock = GPT2Config(vocab_size=17, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = randomise(GPT2LMHeadModel(stock))
    table = [
        ("transformer.wte", "model.embed_tokens"),
        ("transformer.wpe", "model.embed_positions"),
        ("transformer.h.", "model.layers."),
        ("transformer.ln_f", "model.norm"),
        ("ln_1", "input_layernorm"),
        ("ln_2", "post_attention_layernorm"),
        ("attn.c_attn", "self_attn.query_key_value"),
        ("attn.c_proj", "self_attn.o_proj"),
        ("mlp.c_fc", "mlp.up_proj"),
        ("mlp.c_proj", "mlp.down_proj"),
    ]
    renamed = rename(model.state_dict(), table)
    turned = {name: weight.T if "_proj.w" in name or "value.w" in name else weight for name, weight in renamed.items()}
    weights = fuse_apart(turned, lambda fused: fused.chunk(3))
    config = tiny_config(
        **LAYER_NORM_MLP,
        **BIASES,
        hidden_act="gelu_new",
        position_embedding_type="learned",
        intermediate_size=128,
        tie_word_embeddings=True,
    )
    assert_same(config, model, weights)


def test_equals_gptj_parallel_interleaved_partial():
    stock = GPTJConfig(
        vocab_size=17, n_embd=32, n_layer=2, n_head=4, n_positions=16, rotary_dim=4, attn_implementation="eager"
    )
    model = randomise(GPTJForCausalLM(stock))
    torch.nn.init.zeros_(model.lm_head.bias)
    table = [
        ("transformer.wte", "model.embed_tokens"),
        ("transformer.h.", "model.layers."),
        ("transformer.ln_f", "model.norm"),
        ("ln_1", "input_layernorm"),
        (".attn.", ".self_attn."),
        ("out_proj", "o_proj"),
        ("fc_in", "up_proj"),
        ("fc_out", "down_proj"),
    ]
    config = tiny_config(
        **LAYER_NORM_MLP,
        hidden_act="gelu_new",
        intermediate_size=128,
        parallel_residual=True,
        rope_interleaved=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    assert_same(config, model, rename(model.state_dict(), table))


def test_greedy_equals_llamas_generate():
    model = randomise(LlamaForCausalLM(stock_config(LlamaConfig)))
    tokens = torch.randint(3, 17, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    generated = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=99)
    answers = reference_greedy(
        tiny_config(num_key_value_heads=2), model.state_dict(), tokens, mask, max_new_tokens=6, eos_token_id=99
    )
    assert generated[:, 6:].tolist() == answers
