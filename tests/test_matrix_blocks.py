"""Norms, placements, feed-forwards, stabilisers and RoPE's stretches against the twin: one at a time, then in pairs.

The pairwise sample is drawn anew each run from a printed seed; `MINILLM_PAIRWISE_SEED` repeats one.
"""

import itertools
import os
import random

import pytest
import torch
from matrix_cases import (
    assert_same_run,
    batch,
    double_weights,
    layouts_of,
    loud_model,
    model_run,
    reference_run,
    tiny_config,
)

BACK_ENDS = ("eager", "sdpa")
ROPE = {"rope_theta": 100.0}
LONG = {"factor": 2.0, "original_max_position_embeddings": 4}
MOE = {"mlp_type": "moe", "num_local_experts": 4}
ONE_AT_A_TIME = {
    "layernorm": {"norm_type": "layernorm"},
    "layernorm_without_bias": {"norm_type": "layernorm", "norm_bias": False},
    "norm_eps": {"norm_eps": 0.1},
    "post": {"norm_placement": "post"},
    "post_final_norm": {"norm_placement": "post", "final_norm": True},
    "pre_no_final_norm": {"final_norm": False},
    "deepnorm": {"norm_placement": "deepnorm"},
    "deepnorm_alpha": {"norm_placement": "deepnorm", "deepnorm_alpha": 2.5, "deepnorm_beta": 0.3},
    "sandwich": {"norm_placement": "sandwich"},
    "sandwich_layernorm": {"norm_placement": "sandwich", "norm_type": "layernorm"},
    "parallel_one_norm": {"parallel_residual": True},
    "parallel_two_norms": {"parallel_residual": True, "num_parallel_norms": 2},
    "geglu": {"hidden_act": "gelu"},
    "reglu": {"hidden_act": "relu"},
    "gtu": {"hidden_act": "gtu"},
    "bilinear": {"hidden_act": "bilinear"},
    "glu_sigmoid": {"hidden_act": "sigmoid"},
    "mlp_gelu": {"mlp_type": "mlp", "hidden_act": "gelu"},
    "mlp_relu_squared": {"mlp_type": "mlp", "hidden_act": "relu2", "mlp_bias": True},
    "glu_bias": {"mlp_bias": True},
    "moe": MOE,
    "moe_top1": {**MOE, "num_experts_per_tok": 1},
    "moe_all_experts": {**MOE, "num_experts_per_tok": 4},
    "moe_gtu": {**MOE, "hidden_act": "gtu"},
    "moe_bilinear": {**MOE, "hidden_act": "bilinear"},
    "moe_parallel": {**MOE, "parallel_residual": True},
    "qkv_bias": {"attention_qkv_bias": True},
    "out_bias": {"attention_out_bias": True},
    "qk_norm": {"qk_norm": True},
    "qk_layernorm": {"qk_norm": True, "norm_type": "layernorm"},
    "head_dim": {"head_dim": 12},
    "embedding_norm": {"embedding_norm": True},
    "embedding_norm_learned": {"embedding_norm": True, "position_embedding_type": "learned"},
    "norm_head": {"norm_head": True},
    "tied": {"tie_word_embeddings": True},
    "six_heads_alibi_bias_max": {
        "position_embedding_type": "alibi",
        "num_attention_heads": 6,
        "hidden_size": 36,
        "alibi_bias_max": 4.0,
    },
    "six_heads_alibi": {"position_embedding_type": "alibi", "num_attention_heads": 6, "hidden_size": 36},
    "rope_linear": {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
    "rope_ntk": {"rope_parameters": {**ROPE, "rope_type": "ntk", "factor": 2.0}},
    "rope_dynamic": {
        "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 4,
    },
    "rope_yarn": {"rope_parameters": {**ROPE, **LONG, "rope_type": "yarn"}, "max_position_embeddings": 8},
    "rope_llama3": {
        "rope_parameters": {**ROPE, **LONG, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "rope_longrope": {
        "rope_parameters": {
            **ROPE,
            **LONG,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 2.5, 3.0],
        }
    },
    "rope_partial_linear": {
        "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    },
    "rope_2d_linear": {"rope_2d": True, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
    "rope_2d_ntk": {"rope_2d": True, "rope_parameters": {**ROPE, "rope_type": "ntk", "factor": 2.0}},
    "rope_2d_interleaved": {"rope_2d": True, "rope_interleaved": True},
    "one_layer": {"num_hidden_layers": 1},
}


def check(fields, layouts, training=False):
    config = tiny_config(**fields)
    for layout in layouts:
        model = loud_model(config).train(training)
        weights = double_weights(model)
        inputs = batch(config, layout)
        if layout not in layouts_of(config):
            with pytest.raises(ValueError, match="sliding_window"):
                model(**inputs)
            continue
        expected = reference_run(config, weights, inputs, training=training)
        for back_end in BACK_ENDS:
            model.set_attn_implementation(back_end)
            assert_same_run(model_run(model, inputs), expected, inputs, f"{fields}, {layout}, {back_end}")


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_one_at_a_time(name):
    check(ONE_AT_A_TIME[name], ["plain", "left_padding"])


@pytest.mark.parametrize("name", ["rope_dynamic", "rope_longrope"])
def test_rope_follows_the_length_of_each_document(name):
    check(ONE_AT_A_TIME[name], ["right_padding", "hole", "packing", "packing_by_positions", "packing_prefix_padding"])


@pytest.mark.parametrize("fields", [{}, {"position_embedding_type": "learned", "embedding_norm": True}], ids=str)
def test_embedding_gradient_scale(fields):
    check({"embedding_gradient_scale": 0.1, **fields}, ["left_padding"], training=True)
    check({"embedding_gradient_scale": 0.1, **fields}, ["left_padding"])


def test_embedding_gradient_scale_leaves_values_bit_equal():
    config = tiny_config(embedding_gradient_scale=0.1)
    model = loud_model(config)
    tokens = batch(config, "plain")["input_ids"]
    with torch.no_grad():
        expected = model(tokens).logits
    model.train()
    assert torch.equal(model(tokens).logits, expected)


FACTORS = {
    "attention_type": ["causal", "prefix", "bidirectional"],
    "positions": [
        {},
        {"rope_interleaved": True, "rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_2d": True},
        {"position_embedding_type": "alibi"},
        {"position_embedding_type": "sandwich", "sandwich_dim": 4},
        {"position_embedding_type": "learned"},
        {"position_embedding_type": "sinusoidal"},
        {"position_embedding_type": "glm_2d"},
        {"position_embedding_type": "none"},
        {"rope_parameters": {**ROPE, "rope_type": "ntk", "factor": 2.0}},
    ],
    "num_key_value_heads": [4, 2, 1],
    "sliding_window": [None, 3],
    "qk_norm": [False, True],
    "biases": [
        {},
        {"attention_qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    ],
    "norm_type": ["rmsnorm", "layernorm"],
    "wiring": [
        {"norm_placement": "pre"},
        {"norm_placement": "post"},
        {"norm_placement": "deepnorm"},
        {"norm_placement": "sandwich"},
        {"parallel_residual": True},
        {"parallel_residual": True, "num_parallel_norms": 2},
    ],
    "feed_forward": [
        {"hidden_act": "silu"},
        {"hidden_act": "gelu"},
        {"hidden_act": "gtu"},
        {"hidden_act": "bilinear"},
        {"mlp_type": "mlp", "hidden_act": "gelu_pytorch_tanh"},
        MOE,
    ],
    "head": [{}, {"norm_head": True}, {"tie_word_embeddings": True}],
    "embedding": [{}, {"embedding_norm": True}, {"embedding_gradient_scale": 0.1}],
    "final_norm": [None, True, False],
    "layout": ["left_padding", "hole", "packing", "packing_prefix_padding", "positions_of_choice"],
}


def pairs_of(case):
    return set(itertools.combinations(sorted(case.items()), 2))


def pairwise(seed):
    """Cases (factor -> index of its value) in which every pair of values of two factors occurs: greedy, seeded."""
    rng = random.Random(seed)
    names = sorted(FACTORS)
    missing = {
        ((first, i), (second, j))
        for first, second in itertools.combinations(names, 2)
        for i in range(len(FACTORS[first]))
        for j in range(len(FACTORS[second]))
    }
    cases = []
    while missing:
        candidates = []
        start = dict(rng.choice(sorted(missing)))
        for _ in range(20):
            candidates.append({name: start.get(name, rng.randrange(len(FACTORS[name]))) for name in names})
        best = max(candidates, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


def fields_of(case):
    fields = {}
    for name, index in case.items():
        value = FACTORS[name][index]
        if name != "layout":
            fields.update(value if isinstance(value, dict) else {name: value})
    if fields.get("mlp_type") == "moe":
        fields.pop("mlp_bias", None)  # experts have none
    return fields


def test_every_pair_of_choices():
    seed = int(os.environ.get("MINILLM_PAIRWISE_SEED", random.randrange(2**31)))
    cases = pairwise(seed)
    print(f"MINILLM_PAIRWISE_SEED={seed}: {len(cases)} cases")
    for case in cases:
        fields = fields_of(case)
        training = "embedding_gradient_scale" in fields
        check(fields, [FACTORS["layout"][case["layout"]]], training=training)
