"""The families that transformers ships itself, each a table (see `minillm.conversion.family`).

References: the classes of these names in transformers, and the papers named in `minillm.configuration.presets`.
"""

from typing import Any

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.conversion.family import GENERIC_KEYS, ConversionError, Family, TensorRule
from minillm.conversion.transforms import EXPERTS, EXPERTS_GATE_UP, GATE_UP, QKV_BY_GROUP, QKV_STACKED, TRANSPOSED

QKV = tuple(f"model.layers.{{i}}.self_attn.{name}_proj.{{p}}" for name in "qkv")
GATE_AND_UP = tuple(f"model.layers.{{i}}.mlp.{name}_proj.{{p}}" for name in ("gate", "up"))
HEAD = TensorRule("lm_head.weight", "lm_head.weight")
BLOCK = "model.layers.{i}."

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
LLAMA_KEYS = {
    **SIZES,
    "intermediate_size": "intermediate_size",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "rope_parameters": "rope_parameters",
    "attention_dropout": "attention_dropout",
}
LLAMA_ATTENTION = (
    TensorRule("model.embed_tokens.weight", "model.embed_tokens.weight"),
    TensorRule("model.norm.weight", "model.norm.weight"),
    TensorRule(f"{BLOCK}input_layernorm.weight", f"{BLOCK}input_layernorm.weight"),
    TensorRule(f"{BLOCK}post_attention_layernorm.weight", f"{BLOCK}post_attention_layernorm.weight"),
    *(TensorRule(f"{BLOCK}self_attn.{name}_proj.{{p}}", f"{BLOCK}self_attn.{name}_proj.{{p}}") for name in "qkvo"),
    HEAD,
)
LLAMA_MLP = tuple(
    TensorRule(f"{BLOCK}mlp.{name}_proj.{{p}}", f"{BLOCK}mlp.{name}_proj.{{p}}") for name in ("gate", "up", "down")
)
LAYERNORM_MLP = {"norm_type": "layernorm", "mlp_type": "mlp"}
ALL_BIASES = {"attention_qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}


def four_times(fields: dict[str, Any]) -> int:
    return 4 * fields["hidden_size"]


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={**LLAMA_KEYS, "attention_bias": ("attention_qkv_bias", "attention_out_bias"), "mlp_bias": "mlp_bias"},
    tensors=(*LLAMA_ATTENTION, *LLAMA_MLP),
    # Written into the first LLaMA checkpoints, read by nothing.
    ignored=frozenset({"max_sequence_length"}),
)


def read_gpt2(values: dict[str, Any]) -> dict[str, Any]:
    return {"intermediate_size": values["n_inner"] or 4 * values["n_embd"]}


GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        **{key: name for key, name in SIZES.items() if key == name and not key.startswith(("hidden", "num"))},
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "norm_eps",
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": "embedding_dropout",
        "attn_pdrop": "attention_dropout",
    },
    fixed={"position_embedding_type": "learned", "scale_residual_init": True, **LAYERNORM_MLP, **ALL_BIASES},
    required={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    # `n_ctx` repeats `n_positions`; the summary is that of another head, and upcasting a matter of rounding.
    ignored=frozenset(
        "n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
        "reorder_and_upcast_attn".split()
    ),
    read=read_gpt2,
    write=lambda config: {"n_inner": config.intermediate_size},
    base_prefix="transformer.",
    ignored_tensors=(".attn.bias", ".attn.masked_bias"),
    tensors=(
        TensorRule("transformer.wte.weight", "model.embed_tokens.weight"),
        TensorRule("transformer.wpe.weight", "model.embed_positions.weight"),
        TensorRule("transformer.ln_f.{p}", "model.norm.{p}"),
        TensorRule("transformer.h.{i}.ln_1.{p}", f"{BLOCK}input_layernorm.{{p}}"),
        TensorRule("transformer.h.{i}.ln_2.{p}", f"{BLOCK}post_attention_layernorm.{{p}}"),
        TensorRule("transformer.h.{i}.attn.c_attn.{p}", QKV, QKV_STACKED.after(TRANSPOSED)),
        TensorRule("transformer.h.{i}.attn.c_proj.{p}", f"{BLOCK}self_attn.o_proj.{{p}}", TRANSPOSED),
        TensorRule("transformer.h.{i}.mlp.c_fc.{p}", f"{BLOCK}mlp.up_proj.{{p}}", TRANSPOSED),
        TensorRule("transformer.h.{i}.mlp.c_proj.{p}", f"{BLOCK}mlp.down_proj.{{p}}", TRANSPOSED),
        HEAD,
    ),
)

FUSED_BLOCK = (
    TensorRule("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
    TensorRule("transformer.ln_f.{p}", "model.norm.{p}"),
    TensorRule("transformer.h.{i}.self_attention.query_key_value.{p}", QKV, QKV_BY_GROUP),
    TensorRule("transformer.h.{i}.self_attention.dense.{p}", f"{BLOCK}self_attn.o_proj.{{p}}"),
    TensorRule("transformer.h.{i}.mlp.dense_h_to_4h.{p}", f"{BLOCK}mlp.up_proj.{{p}}"),
    TensorRule("transformer.h.{i}.mlp.dense_4h_to_h.{p}", f"{BLOCK}mlp.down_proj.{{p}}"),
    HEAD,
)


def read_bloom(values: dict[str, Any]) -> dict[str, Any]:
    """transformers' class leaves out two biases of each block where it adds the slices one by one."""
    if values["slow_but_exact"] and values["pretraining_tp"] > 1:
        raise ConversionError(
            f"`slow_but_exact=True` with `pretraining_tp={values['pretraining_tp']}`: transformers then leaves out "
            "the biases of `dense` and `dense_4h_to_h`, which MiniLLM adds; name `slow_but_exact` in `ignore_keys` to "
            "have them added"
        )
    return {}


BLOOM = Family(
    name="bloom",
    model_type="bloom",
    architecture="BloomForCausalLM",
    keys={
        **{key: name for key, name in SIZES.items() if not key.startswith("num")},
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "layer_norm_epsilon": "norm_eps",
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        # Not a field of BloomConfig, which has no length; the published configs carry it.
        "seq_length": "max_position_embeddings",
    },
    fixed={
        "position_embedding_type": "alibi",
        "alibi_rounding": "bloom",
        "embedding_norm": True,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": four_times,
        **LAYERNORM_MLP,
        **ALL_BIASES,
    },
    required={"apply_residual_connection_post_layernorm": (False,)},
    read=read_bloom,
    # Settings of the training framework.
    ignored=frozenset(
        "attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion skip_bias_add "
        "skip_bias_add_qkv offset_alibi n_embed n_inner num_attention_heads".split()
    ),
    base_prefix="transformer.",
    tensors=(
        *FUSED_BLOCK,
        TensorRule("transformer.word_embeddings_layernorm.{p}", "model.embed_layernorm.{p}"),
        TensorRule("transformer.h.{i}.input_layernorm.{p}", f"{BLOCK}input_layernorm.{{p}}"),
        TensorRule("transformer.h.{i}.post_attention_layernorm.{p}", f"{BLOCK}post_attention_layernorm.{{p}}"),
    ),
)


def read_falcon(values: dict[str, Any]) -> dict[str, Any]:
    """Falcon 40B is the new architecture; 7B and RW are the old one, with one key head or as many as query heads."""
    new, heads = values["new_decoder_architecture"], values["num_attention_heads"]
    head_dim = values["hidden_size"] // heads
    parallel = {"parallel_residual": bool(values["parallel_attn"])}
    if new:
        parallel |= {"num_parallel_norms": values["num_ln_in_parallel_attn"] or 2}
    keys = values["num_kv_heads"] if new else 1 if values["multi_query"] else heads
    positions = {"rope_parameters": values["rope_parameters"]}
    if values["alibi"]:
        positions = {
            "position_embedding_type": "alibi",
            "alibi_scale": head_dim**-0.5,
            "alibi_rounding": "falcon",
        }
    return {**parallel, "num_key_value_heads": keys, **positions}


def write_falcon(config: MiniLLMConfig) -> dict[str, Any]:
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    new = config.parallel_residual and (config.num_parallel_norms == 2 or keys not in (1, heads))
    alibi = config.position_embedding_type == "alibi"
    return {
        "new_decoder_architecture": new,
        "multi_query": keys == 1,
        "num_kv_heads": keys,
        "parallel_attn": config.parallel_residual,
        "num_ln_in_parallel_attn": config.num_parallel_norms if new else None,
        "alibi": alibi,
        **({} if alibi else {"rope_parameters": config.rope_parameters}),
    }


def has_two_norms(config: MiniLLMConfig) -> bool:
    return config.parallel_residual and config.num_parallel_norms == 2


FALCON = Family(
    name="falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    keys={
        **SIZES,
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_epsilon": "norm_eps",
        "bias": ("attention_qkv_bias", "attention_out_bias", "mlp_bias"),
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
    },
    fixed=LAYERNORM_MLP,
    # Falcon drops other things than the rest of the field: the sum of both sub-layers, or the attention's output.
    required={"hidden_dropout": (0.0,), "attention_dropout": (0.0,)},
    ignored=frozenset({"n_embed", "apply_residual_connection_post_layernorm"}),
    read=read_falcon,
    write=write_falcon,
    base_prefix="transformer.",
    tensors=(
        *FUSED_BLOCK,
        TensorRule(
            "transformer.h.{i}.input_layernorm.{p}",
            f"{BLOCK}input_layernorm.{{p}}",
            when=lambda config: not has_two_norms(config),
        ),
        TensorRule(
            "transformer.h.{i}.post_attention_layernorm.{p}",
            f"{BLOCK}post_attention_layernorm.{{p}}",
            when=lambda config: not has_two_norms(config),
        ),
        TensorRule("transformer.h.{i}.ln_attn.{p}", f"{BLOCK}input_layernorm.{{p}}", when=has_two_norms),
        TensorRule("transformer.h.{i}.ln_mlp.{p}", f"{BLOCK}post_attention_layernorm.{{p}}", when=has_two_norms),
    ),
)

MPT_ATTENTION = {
    "attn_type": "multihead_attention",
    "attn_pdrop": 0,
    "clip_qkv": None,
    "softmax_scale": None,
    "prefix_lm": False,
    "qk_ln": False,
    "alibi": True,
    # transformers' class reads nothing else, whatever stands there.
    "alibi_bias_max": 8,
}


def read_mpt(values: dict[str, Any]) -> dict[str, Any]:
    attention = values["attn_config"]
    known = {*MPT_ATTENTION, "attn_impl", "attn_uses_sequence_id", *GENERIC_KEYS}
    if unknown := sorted(set(attention) - known):
        raise ConversionError(
            f"`attn_config[{unknown[0]!r}]={attention[unknown[0]]!r}`: what it means is unknown; take it out of "
            "`attn_config` if it does not change what the model computes"
        )
    for key, allowed in MPT_ATTENTION.items():
        if attention.get(key, allowed) != allowed:
            raise ConversionError(f"`attn_config[{key!r}]={attention[key]!r}`: only {allowed!r} can be converted")
    return {}


MPT = Family(
    name="mpt",
    model_type="mpt",
    architecture="MptForCausalLM",
    keys={
        **{key: name for key, name in SIZES.items() if key == name and not key.startswith(("hidden", "num"))},
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
        "layer_norm_epsilon": "norm_eps",
        "embedding_fraction": "embedding_gradient_scale",
    },
    fixed={
        "position_embedding_type": "alibi",
        "hidden_act": "gelu",
        "norm_bias": False,
        "intermediate_size": four_times,
        **LAYERNORM_MLP,
    },
    required={"no_bias": (True,), "logit_scale": (None,), "expansion_ratio": (4,)},
    # Without effect in transformers' class, or of the training framework.
    ignored=frozenset(
        "resid_pdrop emb_pdrop learned_pos_emb init_device init_config norm_type tokenizer_name verbose "
        "attn_config".split()
    ),
    read=read_mpt,
    write=lambda config: {"attn_config": {**MPT_ATTENTION, "attn_impl": "torch"}},
    base_prefix="transformer.",
    tensors=(
        TensorRule("transformer.wte.weight", "model.embed_tokens.weight"),
        TensorRule("transformer.norm_f.weight", "model.norm.weight"),
        TensorRule("transformer.blocks.{i}.norm_1.weight", f"{BLOCK}input_layernorm.weight"),
        TensorRule("transformer.blocks.{i}.norm_2.weight", f"{BLOCK}post_attention_layernorm.weight"),
        TensorRule("transformer.blocks.{i}.attn.Wqkv.{p}", QKV, QKV_STACKED),
        TensorRule("transformer.blocks.{i}.attn.out_proj.weight", f"{BLOCK}self_attn.o_proj.weight"),
        TensorRule("transformer.blocks.{i}.ffn.up_proj.weight", f"{BLOCK}mlp.up_proj.weight"),
        TensorRule("transformer.blocks.{i}.ffn.down_proj.weight", f"{BLOCK}mlp.down_proj.weight"),
        HEAD,
    ),
)

GLM = Family(
    name="glm",
    model_type="glm",
    architecture="GlmForCausalLM",
    keys={**LLAMA_KEYS, "attention_bias": "attention_qkv_bias"},
    fixed={"rope_interleaved": True},
    partial_rotary=True,
    matches=lambda raw: "block_position_encoding" not in raw,
    tensors=(
        *LLAMA_ATTENTION,
        TensorRule(f"{BLOCK}mlp.gate_up_proj.{{p}}", GATE_AND_UP, GATE_UP),
        TensorRule(f"{BLOCK}mlp.down_proj.{{p}}", f"{BLOCK}mlp.down_proj.{{p}}"),
    ),
)

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys={
        **LLAMA_KEYS,
        "sliding_window": "sliding_window",
        "num_experts_per_tok": "num_experts_per_tok",
        "num_local_experts": "num_local_experts",
        "output_router_logits": "output_router_logits",
        "router_aux_loss_coef": "router_aux_loss_coef",
        "router_jitter_noise": "router_jitter_noise",
    },
    fixed={"mlp_type": "moe"},
    tensors=(
        *LLAMA_ATTENTION,
        TensorRule(f"{BLOCK}block_sparse_moe.gate.weight", f"{BLOCK}mlp.gate.weight"),
        TensorRule(
            tuple(f"{BLOCK}block_sparse_moe.experts.{{e}}.{name}.weight" for name in ("w1", "w3")),
            f"{BLOCK}mlp.experts.gate_up_proj",
            EXPERTS_GATE_UP,
        ),
        TensorRule(f"{BLOCK}block_sparse_moe.experts.{{e}}.w2.weight", f"{BLOCK}mlp.experts.down_proj", EXPERTS),
    ),
)
