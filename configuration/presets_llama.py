"""Presets in LLaMA's shape (RMSNorm, RoPE, SwiGLU, no biases): LLaMA 1 to 3.2, its vocabulary extensions, Baichuan,
Mixtral."""

from typing import Any

from minillm.configuration.preset import Preset, size

_13B, _33B, _65B = size(5120, 40, 40), size(6656, 60, 52), size(8192, 80, 64)

_LLAMA_SOURCE = "arXiv 2302.13971, table 2; the released config"

_LLAMA_2 = {"max_position_embeddings": 4096, "norm_eps": 1e-5}
_GROUPED_70B = {**_65B, "num_key_value_heads": 8, "intermediate_size": 28672}
_LLAMA_2_SOURCE = "arXiv 2307.09288, table 1; the released config"

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_SOURCE = "arXiv 2407.21783, table 3; the released config"
_LLAMA_32_SOURCE = "the released config"


def _stretched(factor: float) -> dict[str, Any]:
    """Llama 3's fields with the RoPE of 3.1 and 3.2, for 131072 tokens."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {**_LLAMA_3, "max_position_embeddings": 131072, "rope_parameters": rope}


_CODE_LLAMA = {
    "max_position_embeddings": 16384,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
_CODE_LLAMA_SOURCE = "arXiv 2308.12950; the released config"

_CHINESE_SOURCE = "arXiv 2304.08177"

_BAICHUAN = {"vocab_size": 64000, "max_position_embeddings": 4096, "pad_token_id": 0}
_BAICHUAN_13B = {**_BAICHUAN, **_13B, "intermediate_size": 13696, "position_embedding_type": "alibi"}
_BAICHUAN_2 = {"vocab_size": 125696, "norm_head": True}
_BAICHUAN_SOURCE = "the released config"
_BAICHUAN_2_SOURCE = "arXiv 2309.10305; the released config"

_MIXTRAL = {
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "mlp_type": "moe",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

LLAMA_PRESETS: dict[str, Preset] = {
    "llama-7b": Preset("LLaMA 7B", _LLAMA_SOURCE, {}, "llama"),
    "llama-13b": Preset("LLaMA 13B", _LLAMA_SOURCE, _13B, "llama"),
    "llama-33b": Preset("LLaMA 33B, whose files are named 30B", _LLAMA_SOURCE, _33B, "llama"),
    "llama-65b": Preset("LLaMA 65B", _LLAMA_SOURCE, {**_65B, "norm_eps": 1e-5}, "llama"),
    "llama-2-7b": Preset("Llama 2 7B: 4096 tokens", _LLAMA_2_SOURCE, _LLAMA_2, "llama"),
    "llama-2-13b": Preset("Llama 2 13B", _LLAMA_2_SOURCE, {**_LLAMA_2, **_13B}, "llama"),
    "llama-2-70b": Preset(
        "Llama 2 70B: grouped-query attention", _LLAMA_2_SOURCE, {**_LLAMA_2, **_GROUPED_70B}, "llama"
    ),
    "llama-3-8b": Preset(
        "Llama 3 8B: grouped-query attention, RoPE base 500000",
        _LLAMA_3_SOURCE,
        {**_LLAMA_3, "intermediate_size": 14336},
        "llama",
    ),
    "llama-3-70b": Preset("Llama 3 70B", _LLAMA_3_SOURCE, {**_LLAMA_3, **_GROUPED_70B}, "llama"),
    "llama-3.1-8b": Preset(
        "Llama 3.1 8B: RoPE stretched to 131072 tokens",
        _LLAMA_3_SOURCE,
        {**_stretched(8.0), "intermediate_size": 14336},
        "llama",
    ),
    "llama-3.1-70b": Preset("Llama 3.1 70B", _LLAMA_3_SOURCE, {**_stretched(8.0), **_GROUPED_70B}, "llama"),
    "llama-3.1-405b": Preset(
        "Llama 3.1 405B",
        _LLAMA_3_SOURCE,
        {**_stretched(8.0), **size(16384, 126, 128), "intermediate_size": 53248},
        "llama",
    ),
    "llama-3.2-1b": Preset(
        "Llama 3.2 1B: tied head",
        _LLAMA_32_SOURCE,
        {**_stretched(32.0), **size(2048, 16, 32), "intermediate_size": 8192, "tie_word_embeddings": True},
        "llama",
    ),
    "llama-3.2-3b": Preset(
        "Llama 3.2 3B: tied head",
        _LLAMA_32_SOURCE,
        {**_stretched(32.0), **size(3072, 28, 24), "intermediate_size": 8192, "tie_word_embeddings": True},
        "llama",
    ),
    "codellama-7b": Preset(
        "Code Llama 7B: RoPE base 1000000, tokens for infilling",
        _CODE_LLAMA_SOURCE,
        {**_CODE_LLAMA, "vocab_size": 32016},
        "llama",
    ),
    "codellama-13b": Preset(
        "Code Llama 13B", _CODE_LLAMA_SOURCE, {**_CODE_LLAMA, **_13B, "vocab_size": 32016}, "llama"
    ),
    "codellama-34b": Preset(
        "Code Llama 34B: grouped-query attention, no tokens for infilling",
        _CODE_LLAMA_SOURCE,
        {**_CODE_LLAMA, **size(8192, 48, 64), "num_key_value_heads": 8},
        "llama",
    ),
    "codellama-70b": Preset(
        "Code Llama 70B", _CODE_LLAMA_SOURCE, {**_CODE_LLAMA, **_GROUPED_70B, "vocab_size": 32016}, "llama"
    ),
    "chinese-llama-7b": Preset("LLaMA 7B with 17953 Chinese tokens", _CHINESE_SOURCE, {"vocab_size": 49953}, "llama"),
    "chinese-llama-13b": Preset("LLaMA 13B, likewise", _CHINESE_SOURCE, {**_13B, "vocab_size": 49953}, "llama"),
    "chinese-llama-33b": Preset("LLaMA 33B, likewise", _CHINESE_SOURCE, {**_33B, "vocab_size": 49953}, "llama"),
    "chinese-alpaca-7b": Preset(
        "Chinese-LLaMA 7B tuned on instructions: one padding token more",
        _CHINESE_SOURCE,
        {"vocab_size": 49954},
        "llama",
    ),
    "chinese-alpaca-13b": Preset(
        "Chinese-LLaMA 13B, likewise", _CHINESE_SOURCE, {**_13B, "vocab_size": 49954}, "llama"
    ),
    "chinese-alpaca-33b": Preset(
        "Chinese-LLaMA 33B, likewise", _CHINESE_SOURCE, {**_33B, "vocab_size": 49954}, "llama"
    ),
    "ziya-llama-13b": Preset(
        "Ziya 13B: LLaMA with Chinese tokens",
        "the released config",
        {**_13B, "vocab_size": 39424, "pad_token_id": 0},
        "llama",
    ),
    "baichuan-7b": Preset("Baichuan 7B: RoPE", _BAICHUAN_SOURCE, _BAICHUAN, "baichuan"),
    "baichuan-13b": Preset("Baichuan 13B: ALiBi", _BAICHUAN_SOURCE, _BAICHUAN_13B, "baichuan"),
    "baichuan2-7b": Preset(
        "Baichuan 2 7B: RoPE, normalised head", _BAICHUAN_2_SOURCE, {**_BAICHUAN, **_BAICHUAN_2}, "baichuan2"
    ),
    "baichuan2-13b": Preset(
        "Baichuan 2 13B: ALiBi, normalised head", _BAICHUAN_2_SOURCE, {**_BAICHUAN_13B, **_BAICHUAN_2}, "baichuan2"
    ),
    "mixtral-8x7b": Preset(
        "Mixtral 8x7B: a mixture of eight experts, two for each token",
        "arXiv 2401.04088, table 1; the released config",
        {**_MIXTRAL, "intermediate_size": 14336, "max_position_embeddings": 32768, "router_aux_loss_coef": 0.02},
        "mixtral",
    ),
    "mixtral-8x22b": Preset(
        "Mixtral 8x22B; its Instruct release has 32768 tokens",
        "the released config",
        {
            **_MIXTRAL,
            **size(6144, 56, 48),
            "intermediate_size": 16384,
            "max_position_embeddings": 65536,
            "router_aux_loss_coef": 0.001,
        },
        "mixtral",
    ),
}
