"""Presets of the GLM line: blank infilling (110M to 10B), GLM-130B, ChatGLM-6B, ChatGLM2 and 3, GLM-4."""

from typing import Any

from minillm.configuration.preset import Preset, size

_LAYERNORM = {
    "norm_type": "layernorm",
    "norm_eps": 1e-5,
    "attention_qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None}

# hidden_act is that of the released transformers-style code; the Megatron-style code has GELU's tanh form.
_GLM = {
    **_LAYERNORM,
    **_NO_IDS,
    "attention_type": "prefix",
    "position_embedding_type": "glm_2d",
    "mlp_type": "mlp",
    "hidden_act": "gelu",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "embedding_dropout": 0.1,
    "scale_residual_init": True,
    "tie_word_embeddings": True,
}
_LARGE, _10B = size(1024, 24, 16), size(4096, 48, 64)
_WORDPIECE = {"vocab_size": 30592, "max_position_embeddings": 512}
_BYTE_BPE = {"vocab_size": 50304, "max_position_embeddings": 1024}
_CHINESE = {"vocab_size": 50048, "max_position_embeddings": 1024}
_GLM_SOURCE = "arXiv 2103.10360; the released config"
# Sizes of which only the scripts were released: their vocabulary is that of GLM-Large, whose tokenizer they share.
_GLM_SCRIPTS = "arXiv 2103.10360; the released training scripts"


def _shifted(layers: int) -> dict[str, Any]:
    """`LN(h) * alpha + f(LN(h))`: DeepNorm with each norm moved to the block before, the first to the embedding."""
    return {
        **_LAYERNORM,
        "attention_type": "prefix",
        "embedding_norm": True,
        "norm_placement": "deepnorm",
        "final_norm": False,
        "deepnorm_alpha": (2 * layers) ** 0.5,
    }


_CHATGLM_2 = {
    **size(4096, 28, 32),
    "vocab_size": 65024,
    "num_key_value_heads": 2,
    "intermediate_size": 13696,
    "max_position_embeddings": 32768,
    "norm_eps": 1e-5,
    "attention_qkv_bias": True,
    "rope_interleaved": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "bos_token_id": None,
    "pad_token_id": 0,
}


def _glm_4(length: int, rope_theta: float, key_heads: int) -> dict[str, Any]:
    return {
        **size(4096, 40, 32),
        "vocab_size": 151552,
        "num_key_value_heads": key_heads,
        "intermediate_size": 13696,
        "max_position_embeddings": length,
        "norm_eps": 1.5625e-07,
        "attention_qkv_bias": True,
        "rope_interleaved": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "partial_rotary_factor": 0.5},
        "bos_token_id": None,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
    }


# The base of RoPE is 10000 times the `rope_ratio` of the released configs.
_GLM_4_SOURCE = "arXiv 2406.12793; the released config"

GLM_PRESETS: dict[str, Preset] = {
    "glm-base": Preset(
        "GLM 110M: blank infilling, prefix mask, learned positions on two axes",
        _GLM_SCRIPTS,
        {**_GLM, **size(768, 12, 12), **_WORDPIECE},
        "glm-infilling",
    ),
    "glm-large": Preset("GLM 335M", _GLM_SOURCE, {**_GLM, **_LARGE, **_WORDPIECE}, "glm-infilling"),
    "glm-large-chinese": Preset("GLM 335M, Chinese", _GLM_SOURCE, {**_GLM, **_LARGE, **_CHINESE}, "glm-infilling"),
    "glm-roberta-large": Preset(
        "GLM 335M on RoBERTa's data",
        _GLM_SOURCE,
        {**_GLM, **_LARGE, **_BYTE_BPE, "max_position_embeddings": 512},
        "glm-infilling",
    ),
    "glm-410m": Preset("GLM 410M", _GLM_SCRIPTS, {**_GLM, **size(1024, 30, 16), **_WORDPIECE}, "glm-infilling"),
    "glm-515m": Preset("GLM 515M", _GLM_SCRIPTS, {**_GLM, **size(1152, 30, 18), **_WORDPIECE}, "glm-infilling"),
    "glm-2b": Preset("GLM 2B", _GLM_SOURCE, {**_GLM, **size(2048, 36, 32), **_BYTE_BPE}, "glm-infilling"),
    "glm-10b": Preset("GLM 10B", _GLM_SOURCE, {**_GLM, **_10B, **_BYTE_BPE}, "glm-infilling"),
    "glm-10b-chinese": Preset("GLM 10B, Chinese", _GLM_SOURCE, {**_GLM, **_10B, **_CHINESE}, "glm-infilling"),
    "glm-130b": Preset(
        "GLM-130B: prefix mask, RoPE, DeepNorm, GeGLU, embedding gradient shrunk to a tenth",
        "arXiv 2210.02414; the released scripts",
        {
            **_shifted(70),
            **_NO_IDS,
            **size(12288, 70, 96),
            "vocab_size": 150528,
            "intermediate_size": 32768,
            "deepnorm_beta": 140**-0.5,
            "hidden_act": "gelu",
            "embedding_gradient_scale": 0.1,
            "tie_word_embeddings": True,
        },
        "glm-130b",
    ),
    # Its files hold the head beside the embedding, and the released code ties the two when it loads them: hence 6.2B,
    # a copy less than the parameters of a model with a head of its own.
    "chatglm-6b": Preset(
        "ChatGLM 6B: prefix mask, RoPE on two axes, DeepNorm; 6.2B without the head, a copy of the embedding",
        "the released config",
        {
            **_shifted(28),
            **size(4096, 28, 32),
            "vocab_size": 130528,
            "rope_2d": True,
            "mlp_type": "mlp",
            "hidden_act": "gelu_pytorch_tanh",
            "bos_token_id": 130004,
            "eos_token_id": 130005,
            "pad_token_id": 3,
            "mask_token_id": 130000,
            "gmask_token_id": 130001,
            "sop_token_id": 130004,
        },
        "chatglm",
    ),
    "chatglm2-6b": Preset(
        "ChatGLM2 6B: two key/value heads, RoPE on half of each head, RMSNorm, SwiGLU",
        "the released config",
        _CHATGLM_2,
        "chatglm2",
    ),
    "chatglm3-6b": Preset("ChatGLM3 6B, the same", "the released config", _CHATGLM_2, "chatglm2"),
    "glm-4-9b": Preset(
        "GLM-4 9B: two key/value heads, RoPE on half of each head", _GLM_4_SOURCE, _glm_4(8192, 10000.0, 2), "glm"
    ),
    "glm-4-9b-chat": Preset(
        "GLM-4 9B for 131072 tokens: RoPE base 5000000", _GLM_4_SOURCE, _glm_4(131072, 5000000.0, 2), "glm"
    ),
    "glm-4-9b-chat-1m": Preset(
        "GLM-4 9B for 1048576 tokens: four key/value heads", _GLM_4_SOURCE, _glm_4(1048576, 100000000.0, 4), "glm"
    ),
}
