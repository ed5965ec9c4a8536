"""The families that transformers does not ship: Baichuan, GLM, GLM-130B, ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B.

Their checkpoints come with code of their own; the key names here are those of their config.json and weight files.
"""

from typing import Any

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.conversion.families import ALL_BIASES, BLOCK, GATE_AND_UP, HEAD, LAYERNORM_MLP, LLAMA_MLP, QKV, four_times
from minillm.conversion.family import Family, TensorRule
from minillm.conversion.transforms import GATE_UP, NORMALISED_ROWS, QKV_BY_GROUP, QKV_STACKED, UP_GATE

TOKENS = {name: name for name in ("pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "initializer_range")}
CODE_KEYS = frozenset("gradient_checkpointing tokenizer_class z_loss_weight _from_model_config".split())


def read_baichuan(values: dict[str, Any]) -> dict[str, Any]:
    """7B has RoPE and says how long it is; 13B has ALiBi and leaves the length to its tokenizer."""
    if values["max_position_embeddings"] is not None:
        return {"max_position_embeddings": values["max_position_embeddings"]}
    return {"position_embedding_type": "alibi", "max_position_embeddings": values["model_max_length"]}


def write_baichuan(config: MiniLLMConfig) -> dict[str, Any]:
    length = config.max_position_embeddings
    if config.position_embedding_type == "alibi":
        return {"model_max_length": length}
    return {"max_position_embeddings": length, "model_max_length": length}


def is_second_baichuan(raw: dict[str, Any]) -> bool | None:
    """Baichuan 2 has other vocabularies and a key of its own; None where neither says."""
    if "z_loss_weight" in raw or raw.get("vocab_size") == 125696:
        return True
    if raw.get("vocab_size") == 64000:
        return False
    name = str(raw.get("_name_or_path", "")).lower()
    return True if "baichuan2" in name else False if "baichuan-" in name else None


def _baichuan(name: str, second: bool) -> Family:
    return Family(
        name=name,
        model_type="baichuan",
        architecture="BaichuanForCausalLM",
        keys={
            **TOKENS,
            **{
                key: key
                for key in "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
                "tie_word_embeddings".split()
            },
            "rms_norm_eps": "norm_eps",
        },
        fixed={"norm_head": second},
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "max_position_embeddings": None,
            "model_max_length": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ignored=CODE_KEYS,
        read=read_baichuan,
        write=write_baichuan,
        matches=lambda raw: is_second_baichuan(raw) is second,
        tensors=(
            TensorRule("model.embed_tokens.weight", "model.embed_tokens.weight"),
            TensorRule("model.norm.weight", "model.norm.weight"),
            TensorRule(f"{BLOCK}input_layernorm.weight", f"{BLOCK}input_layernorm.weight"),
            TensorRule(f"{BLOCK}post_attention_layernorm.weight", f"{BLOCK}post_attention_layernorm.weight"),
            TensorRule(f"{BLOCK}self_attn.W_pack.{{p}}", QKV, QKV_STACKED),
            TensorRule(f"{BLOCK}self_attn.o_proj.{{p}}", f"{BLOCK}self_attn.o_proj.{{p}}"),
            *LLAMA_MLP,
            TensorRule("lm_head.weight", "lm_head.weight", NORMALISED_ROWS) if second else HEAD,
        ),
    )


BAICHUAN = _baichuan("baichuan", second=False)
BAICHUAN2 = _baichuan("baichuan2", second=True)

GLM_INFILLING = Family(
    name="glm-infilling",
    model_type="glm",
    architecture="GLMForConditionalGeneration",
    keys={
        **TOKENS,
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "max_sequence_length": "max_position_embeddings",
        "embedding_dropout_prob": "embedding_dropout",
        "attention_dropout_prob": "attention_dropout",
        "output_dropout_prob": "hidden_dropout",
    },
    fixed={
        "attention_type": "prefix",
        "position_embedding_type": "glm_2d",
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "intermediate_size": four_times,
        "tie_word_embeddings": True,
        **LAYERNORM_MLP,
        **ALL_BIASES,
    },
    required={"block_position_encoding": (True,), "output_predict": (True,)},
    defaults={
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "embedding_dropout_prob": 0.1,
        "attention_dropout_prob": 0.1,
        "output_dropout_prob": 0.1,
    },
    # `attention_scale` only rearranges the arithmetic against overflow; the rest belongs to training and tokenizers.
    ignored=frozenset(
        "attention_scale checkpoint_activations checkpoint_num_layers parallel_output relative_encoding pool_token "
        "spell_length spell_func max_memory_length".split()
    ),
    matches=lambda raw: "block_position_encoding" in raw,
    tensors=(
        TensorRule("glm.word_embeddings.weight", "model.embed_tokens.weight"),
        TensorRule("glm.transformer.position_embeddings.weight", "model.embed_positions.weight"),
        TensorRule("glm.transformer.block_position_embeddings.weight", "model.embed_block_positions.weight"),
        TensorRule("glm.transformer.final_layernorm.{p}", "model.norm.{p}"),
        TensorRule("glm.transformer.layers.{i}.input_layernorm.{p}", f"{BLOCK}input_layernorm.{{p}}"),
        TensorRule(
            "glm.transformer.layers.{i}.post_attention_layernorm.{p}", f"{BLOCK}post_attention_layernorm.{{p}}"
        ),
        TensorRule("glm.transformer.layers.{i}.attention.query_key_value.{p}", QKV, QKV_STACKED),
        TensorRule("glm.transformer.layers.{i}.attention.dense.{p}", f"{BLOCK}self_attn.o_proj.{{p}}"),
        TensorRule("glm.transformer.layers.{i}.mlp.dense_h_to_4h.{p}", f"{BLOCK}mlp.up_proj.{{p}}"),
        TensorRule("glm.transformer.layers.{i}.mlp.dense_4h_to_h.{p}", f"{BLOCK}mlp.down_proj.{{p}}"),
    ),
)


def root_of_twice_the_layers(fields: dict[str, Any]) -> float:
    return (2 * fields["num_hidden_layers"]) ** 0.5


def its_inverse(fields: dict[str, Any]) -> float:
    return (2 * fields["num_hidden_layers"]) ** -0.5


# Their residual branch carries the normalised input, `LN(h) * alpha + f(LN(h))`: that is DeepNorm with every norm
# moved to the block before it, the first one to the embedding.
SHIFTED_NORMS = (
    TensorRule("transformer.layers.0.input_layernorm.{p}", "model.embed_layernorm.{p}"),
    TensorRule("transformer.layers.{i}.post_attention_layernorm.{p}", f"{BLOCK}input_layernorm.{{p}}"),
    TensorRule("transformer.layers.{next}.input_layernorm.{p}", f"{BLOCK}post_attention_layernorm.{{p}}"),
    TensorRule("transformer.final_layernorm.{p}", "model.layers.{last}.post_attention_layernorm.{p}"),
)
SHIFTED_FIELDS = {
    "attention_type": "prefix",
    "embedding_norm": True,
    "norm_type": "layernorm",
    "norm_placement": "deepnorm",
    "final_norm": False,
    "deepnorm_alpha": root_of_twice_the_layers,
    "deepnorm_beta": its_inverse,
    **ALL_BIASES,
}
SHIFTED_KEYS = {
    **TOKENS,
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "layernorm_epsilon": "norm_eps",
    "mask_token_id": "mask_token_id",
    "gmask_token_id": "gmask_token_id",
}
SHIFTED_ATTENTION = (
    *SHIFTED_NORMS,
    TensorRule("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
    TensorRule("transformer.layers.{i}.attention.query_key_value.{p}", QKV, QKV_BY_GROUP),
    TensorRule("transformer.layers.{i}.attention.dense.{p}", f"{BLOCK}self_attn.o_proj.{{p}}"),
    TensorRule("transformer.layers.{i}.mlp.dense_4h_to_h.{p}", f"{BLOCK}mlp.down_proj.{{p}}"),
)


def read_chatglm(values: dict[str, Any]) -> dict[str, Any]:
    """What fills a blank starts with the begin token."""
    has_blank = values["mask_token_id"] is not None or values["gmask_token_id"] is not None
    return {"sop_token_id": values["bos_token_id"] if has_blank else None}


CHATGLM = Family(
    name="chatglm",
    model_type="chatglm",
    architecture="ChatGLMModel",
    keys=SHIFTED_KEYS,
    fixed={**SHIFTED_FIELDS, "rope_2d": True, "mlp_type": "mlp", "hidden_act": "gelu_pytorch_tanh"},
    required={"position_encoding_2d": (True,), "pre_seq_len": (None,)},
    defaults={
        "layernorm_epsilon": 1e-5,
        "pad_token_id": None,
        "position_encoding_2d": True,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "quantization_bit": 0,
        "quantization_embeddings": False,
        "prefix_projection": False,
    },
    read=read_chatglm,
    matches=lambda raw: "inner_hidden_size" in raw,
    tensors=(
        *SHIFTED_ATTENTION,
        TensorRule("transformer.layers.{i}.mlp.dense_h_to_4h.{p}", f"{BLOCK}mlp.up_proj.{{p}}"),
        HEAD,
    ),
)

GLM_130B = Family(
    name="glm-130b",
    model_type="glm-130b",
    architecture="GLM130B",
    keys={**SHIFTED_KEYS, "sop_token_id": "sop_token_id"},
    fixed={
        **SHIFTED_FIELDS,
        "mlp_type": "glu",
        "hidden_act": "gelu",
        "embedding_gradient_scale": 0.1,
        "tie_word_embeddings": True,
    },
    # The released weights come without a config.json; these are the names of the arguments they are loaded with.
    defaults={
        "layernorm_epsilon": 1e-5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "mask_token_id": None,
        "gmask_token_id": None,
        "sop_token_id": None,
    },
    tensors=(
        *SHIFTED_ATTENTION,
        TensorRule("transformer.layers.{i}.mlp.dense_h_to_4h.{p}", GATE_AND_UP, UP_GATE),
    ),
)


def read_chatglm2(values: dict[str, Any]) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    return {
        "num_key_value_heads": values["multi_query_group_num"] if values["multi_query_attention"] else heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * values["rope_ratio"],
            "partial_rotary_factor": 0.5,
        },
    }


def write_chatglm2(config: MiniLLMConfig) -> dict[str, Any]:
    shared = config.num_key_value_heads < config.num_attention_heads
    return {
        "vocab_size": config.vocab_size,
        "multi_query_attention": shared,
        "multi_query_group_num": config.num_key_value_heads,
        "rope_ratio": (config.rope_parameters or {}).get("rope_theta", 10000.0) / 10000.0,
    }


CHATGLM2 = Family(
    name="chatglm2",
    model_type="chatglm",
    architecture="ChatGLMModel",
    keys={
        **TOKENS,
        "padded_vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "kv_channels": "head_dim",
        "ffn_hidden_size": "intermediate_size",
        "seq_length": "max_position_embeddings",
        "layernorm_epsilon": "norm_eps",
        "hidden_dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "add_qkv_bias": "attention_qkv_bias",
    },
    fixed={"rope_interleaved": True},
    required={
        "rmsnorm": (True,),
        "post_layer_norm": (True,),
        "add_bias_linear": (False,),
        "apply_residual_connection_post_layernorm": (False,),
        "original_rope": (True,),
        "pre_seq_len": (None,),
    },
    defaults={
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_qkv_bias": False,
        "multi_query_attention": False,
        "multi_query_group_num": 1,
        "rope_ratio": 1.0,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "quantization_bit": 0,
        "vocab_size": None,
    },
    # How the reference arranges its arithmetic; `vocab_size` is that of the tokenizer.
    ignored=frozenset(
        "apply_query_key_layer_scaling attention_softmax_in_fp32 fp32_residual_connection bias_dropout_fusion "
        "prefix_projection classifier_dropout interleaved_qkv".split()
    ),
    partial_rotary=True,
    read=read_chatglm2,
    write=write_chatglm2,
    matches=lambda raw: "inner_hidden_size" not in raw,
    ignored_tensors=("rotary_pos_emb.inv_freq",),
    tensors=(
        TensorRule("transformer.embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        TensorRule("transformer.encoder.final_layernorm.weight", "model.norm.weight"),
        TensorRule("transformer.encoder.layers.{i}.input_layernorm.weight", f"{BLOCK}input_layernorm.weight"),
        TensorRule(
            "transformer.encoder.layers.{i}.post_attention_layernorm.weight",
            f"{BLOCK}post_attention_layernorm.weight",
        ),
        TensorRule("transformer.encoder.layers.{i}.self_attention.query_key_value.{p}", QKV, QKV_STACKED),
        TensorRule("transformer.encoder.layers.{i}.self_attention.dense.{p}", f"{BLOCK}self_attn.o_proj.{{p}}"),
        TensorRule("transformer.encoder.layers.{i}.mlp.dense_h_to_4h.{p}", GATE_AND_UP, GATE_UP),
        TensorRule("transformer.encoder.layers.{i}.mlp.dense_4h_to_h.{p}", f"{BLOCK}mlp.down_proj.{{p}}"),
        TensorRule("transformer.output_layer.weight", "lm_head.weight"),
    ),
)
