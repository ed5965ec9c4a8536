"""Named sets of `MiniLLMConfig` fields. Data only: a name, where the numbers come from, and the fields.

`MiniLLMConfig.from_preset(name, **overrides)` builds a config from one of them; overrides win over the preset.
"""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """One named architecture: a sentence on it, the source of its numbers, and the config fields that differ from
    the defaults."""

    description: str
    source: str
    fields: dict[str, Any]


_MINI = {
    "vocab_size": 16384,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}

_OWN = "chosen to train on a laptop"

PRESETS: dict[str, Preset] = {
    "minillm-causal-10m": Preset("causal decoder with RoPE, RMSNorm and SwiGLU", _OWN, _MINI),
    "minillm-prefix-10m": Preset(
        "the same with a bidirectional prefix (prefix LM)", _OWN, {**_MINI, "attention_type": "prefix"}
    ),
    "minillm-alibi-10m": Preset(
        "the same with ALiBi in place of RoPE", _OWN, {**_MINI, "position_embedding_type": "alibi"}
    ),
    "llama-7b": Preset("LLaMA 7B", "arXiv 2302.13971, table 2", {}),
    "llama-3-8b": Preset(
        "Llama 3 8B: grouped-query attention, RoPE base 500000",
        "arXiv 2407.21783, table 3; the released config",
        {
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "gpt2": Preset(
        "GPT-2 small: learned positions, LayerNorm, GELU, biases",
        "the released config",
        {
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 1024,
            "position_embedding_type": "learned",
            "norm_type": "layernorm",
            "norm_eps": 1e-5,
            "mlp_type": "mlp",
            "hidden_act": "gelu_new",
            "attention_qkv_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            "scale_residual_init": True,
            "attention_dropout": 0.1,
            "hidden_dropout": 0.1,
            "embedding_dropout": 0.1,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
    ),
    "bloom-560m": Preset(
        "BLOOM 560M: ALiBi, LayerNorm after the embedding",
        "arXiv 2211.05100, table 3; the released config",
        {
            "vocab_size": 250880,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "position_embedding_type": "alibi",
            "norm_type": "layernorm",
            "norm_eps": 1e-5,
            "embedding_norm": True,
            "mlp_type": "mlp",
            "hidden_act": "gelu_pytorch_tanh",
            "attention_qkv_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "pad_token_id": 3,
        },
    ),
}
