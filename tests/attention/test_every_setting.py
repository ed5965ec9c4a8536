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
from variants import variants

BACK_ENDS = ("eager", "sdpa")
ONE_AT_A_TIME = variants(
    "layernorm layernorm_without_bias norm_eps post post_final_norm no_final_norm deepnorm deepnorm_alpha "
    "sandwich_norm sandwich_norm-layernorm parallel parallel_two_norms geglu reglu gtu bilinear glu_sigmoid "
    "mlp mlp_relu_squared-mlp_bias mlp_bias moe moe_top1 moe_all_experts moe-gtu moe-bilinear moe-parallel "
    "qkv_bias out_bias qk_norm qk_norm-layernorm head_dim embedding_norm embedding_norm-learned norm_head tied "
    "six_heads-alibi_scaled six_heads-alibi rope_linear rope_ntk rope_dynamic rope_yarn rope_llama3 "
    "rope_longrope rope_partial_linear rope_2d_linear rope_2d_ntk rope_2d_interleaved one_layer"
)


def check(fields, layouts, training=False, tolerance=1e-5):
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
            assert_same_run(model_run(model, inputs), expected, inputs, f"{fields}, {layout}, {back_end}", tolerance)


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
    "positions": list(
        variants(
            "rope rope_interleaved_partial rope_2d alibi sandwich learned sinusoidal glm_2d none rope_ntk"
        ).values()
    ),
    "num_key_value_heads": [4, 2, 1],
    "sliding_window": [None, 3],
    "qk_norm": [False, True],
    "biases": list(variants("causal qkv_bias-out_bias-mlp_bias").values()),
    "norm_type": ["rmsnorm", "layernorm"],
    "wiring": list(variants("pre post deepnorm sandwich_norm parallel parallel_two_norms").values()),
    "feed_forward": list(variants("swiglu geglu gtu bilinear mlp_tanh moe").values()),
    "head": list(variants("causal norm_head tied").values()),
    "embedding": list(variants("causal embedding_norm embedding_shrink").values()),
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
        # The largest error of some thousand tensors, in cases drawn anew each time, is above 1e-5 now and then.
        check(fields, [FACTORS["layout"][case["layout"]]], training, tolerance=2e-5)
