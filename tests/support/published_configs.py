"""What the released config.json files say of their models' architecture, in their own words.

Keys that the files leave out, or that do not change the model, are left out here too.
"""


def _gpt2(width, layers, heads):
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 50257}


def _bloom(width, layers, heads):
    return {
        "model_type": "bloom",
        "hidden_size": width,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 250880,
        "seq_length": 2048,  # by the paper: the files leave it out, or say 4096
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def _falcon(width, layers, heads, vocabulary, **keys):
    return {
        "model_type": "falcon",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "alibi": False,
        "bias": False,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bos_token_id": 11,
        "eos_token_id": 11,
        **keys,
    }


_FALCON_GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 8}
_FALCON_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
_FALCON_RW |= {"bos_token_id": 1, "eos_token_id": 2}


def _mpt(width, layers, heads, length):
    return {
        "model_type": "mpt",
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "max_seq_len": length,
        "expansion_ratio": 4,
        "vocab_size": 50432,
        "no_bias": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "qk_ln": False, "prefix_lm": False},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _llama(width, layers, heads, inner, **keys):
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **keys,
    }


_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_CODE = {"max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 1000000}
_LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _llama_31(factor):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    return {**_LLAMA_3, "max_position_embeddings": 131072, "rope_scaling": scaling}


def _mixtral(width, layers, heads, inner, length, auxiliary):
    keys = {
        "num_key_value_heads": 8,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": auxiliary,
        "output_router_logits": False,
    }
    return _llama(width, layers, heads, inner, **keys) | {"model_type": "mixtral"}


def _baichuan(width, layers, heads, inner, vocabulary, **keys):
    return {
        "model_type": "baichuan",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "model_max_length": 4096,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **keys,
    }


def _glm(width, layers, heads, vocabulary, length):
    return {
        "model_type": "glm",
        "hidden_size": width,
        "num_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_sequence_length": length,
        "block_position_encoding": True,
        "embedding_dropout_prob": 0.1,
        "attention_dropout_prob": 0.1,
        "output_dropout_prob": 0.1,
    }


_CHATGLM_2 = {
    "model_type": "chatglm",
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def _glm_4(rope_ratio, length, key_heads):
    return {
        **_CHATGLM_2,
        "num_layers": 40,
        "multi_query_group_num": key_heads,
        "padded_vocab_size": 151552,
        "seq_length": length,
        "rope_ratio": rope_ratio,
        "layernorm_epsilon": 1.5625e-07,
        "pad_token_id": 151329,
        "eos_token_id": [151329, 151336, 151338],
    }


SHIPPED = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bloom-560m": _bloom(1024, 24, 16),
    "bloom-1b1": _bloom(1536, 24, 16),
    "bloom-1b7": _bloom(2048, 24, 16),
    "bloom-3b": _bloom(2560, 30, 32),
    "bloom-7b1": _bloom(4096, 30, 32),
    "bloom-176b": _bloom(14336, 70, 112),
    "falcon-7b": _falcon(4544, 32, 71, 65024),
    "falcon-40b": _falcon(8192, 60, 128, 65024, **_FALCON_GROUPED),
    "falcon-180b": _falcon(14848, 80, 232, 65024, **_FALCON_GROUPED),
    "falcon-rw-1b": _falcon(2048, 24, 32, 50304, **_FALCON_RW),
    "falcon-rw-7b": _falcon(4096, 36, 64, 65024, **_FALCON_RW),
    "mpt-7b": _mpt(4096, 32, 32, 2048),
    "mpt-30b": _mpt(7168, 48, 64, 8192),
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 13824),
    "llama-33b": _llama(6656, 60, 52, 17920),
    "llama-65b": _llama(8192, 80, 64, 22016, rms_norm_eps=1e-5),
    "llama-2-7b": _llama(4096, 32, 32, 11008, **_LLAMA_2),
    "llama-2-13b": _llama(5120, 40, 40, 13824, **_LLAMA_2),
    "llama-2-70b": _llama(8192, 80, 64, 28672, **_LLAMA_2, num_key_value_heads=8),
    "llama-3-8b": _llama(4096, 32, 32, 14336, **_LLAMA_3),
    "llama-3-70b": _llama(8192, 80, 64, 28672, **_LLAMA_3),
    "llama-3.1-8b": _llama(4096, 32, 32, 14336, **_llama_31(8.0)),
    "llama-3.1-70b": _llama(8192, 80, 64, 28672, **_llama_31(8.0)),
    "llama-3.1-405b": _llama(16384, 126, 128, 53248, **_llama_31(8.0)),
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, **{**_llama_31(32.0), "head_dim": 64, "tie_word_embeddings": True}),
    "llama-3.2-3b": _llama(3072, 28, 24, 8192, **{**_llama_31(32.0), "head_dim": 128, "tie_word_embeddings": True}),
    "codellama-7b": _llama(4096, 32, 32, 11008, **_CODE, vocab_size=32016),
    "codellama-13b": _llama(5120, 40, 40, 13824, **_CODE, vocab_size=32016),
    "codellama-34b": _llama(8192, 48, 64, 22016, **_CODE, num_key_value_heads=8),
    "codellama-70b": _llama(8192, 80, 64, 28672, **_CODE, num_key_value_heads=8, vocab_size=32016),
    "chinese-llama-7b": _llama(4096, 32, 32, 11008, vocab_size=49953),
    "chinese-llama-13b": _llama(5120, 40, 40, 13824, vocab_size=49953),
    "chinese-llama-33b": _llama(6656, 60, 52, 17920, vocab_size=49953),
    "chinese-alpaca-7b": _llama(4096, 32, 32, 11008, vocab_size=49954),
    "chinese-alpaca-13b": _llama(5120, 40, 40, 13824, vocab_size=49954),
    "chinese-alpaca-33b": _llama(6656, 60, 52, 17920, vocab_size=49954),
    "ziya-llama-13b": _llama(5120, 40, 40, 13824, vocab_size=39424, pad_token_id=0),
    "mixtral-8x7b": _mixtral(4096, 32, 32, 14336, 32768, 0.02),
    "mixtral-8x22b": _mixtral(6144, 56, 48, 16384, 65536, 0.001),
}
"""Of families that transformers has classes for."""

OTHERS = {
    "baichuan-7b": _baichuan(4096, 32, 32, 11008, 64000, max_position_embeddings=4096),
    "baichuan-13b": _baichuan(5120, 40, 40, 13696, 64000),
    "baichuan2-7b": _baichuan(4096, 32, 32, 11008, 125696, max_position_embeddings=4096),
    "baichuan2-13b": _baichuan(5120, 40, 40, 13696, 125696, z_loss_weight=0),
    "glm-large-chinese": _glm(1024, 24, 16, 50048, 1024),
    "glm-roberta-large": _glm(1024, 24, 16, 50304, 512),
    "glm-2b": _glm(2048, 36, 32, 50304, 1024),
    "glm-10b": _glm(4096, 48, 64, 50304, 1024),
    "glm-10b-chinese": _glm(4096, 48, 64, 50048, 1024),
    # Arguments of the released script; there is no config.json.
    "glm-130b": {
        "model_type": "glm-130b",
        "hidden_size": 12288,
        "num_layers": 70,
        "num_attention_heads": 96,
        "inner_hidden_size": 32768,
        "vocab_size": 150528,
        "max_sequence_length": 2048,
    },
    "chatglm-6b": {
        "model_type": "chatglm",
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "inner_hidden_size": 16384,
        "vocab_size": 130528,
        "max_sequence_length": 2048,
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": True,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "pad_token_id": 3,
    },
    "chatglm2-6b": _CHATGLM_2,
    "chatglm3-6b": _CHATGLM_2,
    "glm-4-9b-chat": _glm_4(500, 131072, 2),
    "glm-4-9b-chat-1m": _glm_4(10000, 1048576, 4),
}
"""Of families that transformers has none for."""
