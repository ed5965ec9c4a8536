"""The one table of what a model of the tests is made of.

A variant is named by what it sets, as `prefix-alibi-gqa`; `fields_of` gives the config fields. What is not named is
the default: causal, RoPE, pre-norm, SwiGLU, as many heads for keys as for queries.
"""

ROPE = {"rope_theta": 100.0}
LONG = {"factor": 2.0, "original_max_position_embeddings": 4}
MOE = {"mlp_type": "moe", "num_local_experts": 4}


def _rope(rope_type, **parameters):
    return {"rope_parameters": {"rope_type": rope_type, **ROPE, **parameters}}


SETTINGS = {
    # Attention: what sees what, and how many heads have keys of their own.
    "causal": {},
    "prefix": {"attention_type": "prefix"},
    "bidirectional": {"attention_type": "bidirectional"},
    "window": {"sliding_window": 3},
    "window30": {"sliding_window": 30},
    "window40": {"sliding_window": 40},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    # No power of two, which ALiBi's slopes ask for.
    "six_heads": {"num_attention_heads": 6, "hidden_size": 48},
    "head_dim": {"head_dim": 12},
    "heads_of_20": {"head_dim": 20},
    "wide_heads": {"head_dim": 24},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"attention_qkv_bias": True},
    "out_bias": {"attention_out_bias": True},
    # Positions.
    "rope": {},
    "rope_default": _rope("default"),
    "rope_interleaved_partial": {"rope_interleaved": True, **_rope("default", partial_rotary_factor=0.5)},
    "rope_2d": {"rope_2d": True, **_rope("default")},
    "rope_2d_interleaved": {"rope_2d": True, "rope_interleaved": True},
    "rope_2d_linear": {"rope_2d": True, **_rope("linear", factor=2.0)},
    "rope_2d_ntk": {"rope_2d": True, **_rope("ntk", factor=2.0)},
    "rope_linear": _rope("linear", factor=2.0),
    "rope_partial_linear": _rope("linear", factor=2.0, partial_rotary_factor=0.5),
    "rope_ntk": _rope("ntk", factor=2.0),
    # By the length: an input of more than five tokens is beyond what was trained.
    "rope_dynamic": {**_rope("dynamic", factor=2.0), "max_position_embeddings": 5},
    "rope_partial_dynamic": {
        **_rope("dynamic", factor=2.0, partial_rotary_factor=0.5),
        "max_position_embeddings": 5,
    },
    "rope_yarn": {**_rope("yarn", **LONG), "max_position_embeddings": 8},
    "rope_llama3": _rope("llama3", **LONG, low_freq_factor=1.0, high_freq_factor=4.0),
    "rope_longrope": {
        **_rope(
            "longrope",
            original_max_position_embeddings=5,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.5, 2.0, 2.5, 3.0],
        ),
        "max_position_embeddings": 10,
    },
    "alibi": {"position_embedding_type": "alibi"},
    "alibi_scaled": {"position_embedding_type": "alibi", "alibi_scale": 1.5, "alibi_bias_max": 4.0},
    "steep": {"alibi_bias_max": 1.0},
    "scaled_down": {"alibi_scale": 8**-0.5},
    "alibi_bloom": {"position_embedding_type": "alibi", "alibi_rounding": "bloom"},
    "alibi_falcon": {"position_embedding_type": "alibi", "alibi_rounding": "falcon", "alibi_scale": 8**-0.5},
    "sandwich": {"position_embedding_type": "sandwich", "sandwich_dim": 6},
    "learned": {"position_embedding_type": "learned"},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "glm_2d": {"position_embedding_type": "glm_2d"},
    # As many positions inside a blank as the tests write there.
    "table40": {"position_table_size": 40},
    "table65": {"position_table_size": 65},
    "none": {"position_embedding_type": "none"},
    # Norms and how a layer is wired.
    "layernorm": {"norm_type": "layernorm"},
    "layernorm_without_bias": {"norm_type": "layernorm", "norm_bias": False},
    "norm_eps": {"norm_eps": 0.1},
    "pre": {"norm_placement": "pre"},
    "post": {"norm_placement": "post"},
    "post_final_norm": {"norm_placement": "post", "final_norm": True},
    "no_final_norm": {"final_norm": False},
    "deepnorm": {"norm_placement": "deepnorm"},
    "deepnorm_alpha": {"norm_placement": "deepnorm", "deepnorm_alpha": 2.5, "deepnorm_beta": 0.3},
    "deepnorm_beta": {"norm_placement": "deepnorm", "deepnorm_beta": 0.3},
    "sandwich_norm": {"norm_placement": "sandwich"},
    "parallel": {"parallel_residual": True},
    "parallel_two_norms": {"parallel_residual": True, "num_parallel_norms": 2},
    "embedding_norm": {"embedding_norm": True},
    # Feed-forwards.
    "swiglu": {"hidden_act": "silu"},
    "geglu": {"hidden_act": "gelu"},
    "reglu": {"hidden_act": "relu"},
    "gtu": {"hidden_act": "gtu"},
    "bilinear": {"hidden_act": "bilinear"},
    "glu_sigmoid": {"hidden_act": "sigmoid"},
    "mlp": {"mlp_type": "mlp", "hidden_act": "gelu"},
    "mlp_tanh": {"mlp_type": "mlp", "hidden_act": "gelu_pytorch_tanh"},
    "mlp_relu": {"mlp_type": "mlp", "hidden_act": "relu"},
    "mlp_relu_squared": {"mlp_type": "mlp", "hidden_act": "relu2"},
    "mlp_bias": {"mlp_bias": True},
    "moe": MOE,
    "moe_top1": {**MOE, "num_experts_per_tok": 1},
    "moe_all_experts": {**MOE, "num_experts_per_tok": 4},
    "router_loss": {"output_router_logits": True},
    # Embeddings, head and initial weights.
    "tied": {"tie_word_embeddings": True},
    "norm_head": {"norm_head": True},
    "embedding_shrink": {"embedding_gradient_scale": 0.1},
    "scale_residual_init": {"scale_residual_init": True},
    "initializer_range": {"initializer_range": 0.1},
    "one_layer": {"num_hidden_layers": 1},
    # Whole families.
    "gpt2": {
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "mlp_type": "mlp",
        "hidden_act": "gelu_new",
        "attention_qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "scale_residual_init": True,
    },
}


def fields_of(variant: str) -> dict:
    """The config fields of a variant: those of its settings, `-` between them; later ones win."""
    return {name: value for setting in variant.split("-") for name, value in SETTINGS[setting].items()}


def variants(names: str) -> dict[str, dict]:
    """Config fields by variant, of names with blanks between them."""
    return {name: fields_of(name) for name in names.split()}
