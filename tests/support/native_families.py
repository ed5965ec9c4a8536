"""Tiny configs of the families that transformers ships, with the settings in which their checkpoints differ."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 64
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FALCON = {key: value for key, value in LLAMA.items() if key != "intermediate_size"} | {"num_attention_heads": 6}
ROPE = {"rope_theta": 1000.0}
ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 2.5, 3.0],
    },
}
OLD_GPT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = OLD_GPT | {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BLOOM = OLD_GPT | {"hidden_size": 48, "n_layer": 2, "n_head": 6}
MPT = OLD_GPT | {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}

CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied_relu": ("gpt2", GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40}),
    "bloom_odd_heads": ("bloom", BLOOM),
    "bloom_untied_eight_heads": ("bloom", BLOOM | {"n_head": 8, "tie_word_embeddings": False}),
    "llama": ("llama", LLAMA),
    "llama_gqa_tied": ("llama", LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_mqa_biases": ("llama", LLAMA | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", LLAMA | {"head_dim": 16, "rms_norm_eps": 1e-5, "hidden_act": "gelu"}),
    **{
        f"llama_{name}": ("llama", LLAMA | {"rope_parameters": {"rope_type": name, **ROPE, **more}})
        for name, more in ROPE_TYPES.items()
    },
    "falcon_7b": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon_40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_one_norm": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_rw": ("falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    # Slopes that are no powers of two: those of the others survive Falcon's rounding to bfloat16.
    "falcon_alibi_twelve_heads": ("falcon", FALCON | {"alibi": True, "num_attention_heads": 12, "bias": True}),
    "falcon_alibi_parallel": ("falcon", FALCON | {"alibi": True, "tie_word_embeddings": False, "bias": True}),
    "mpt_odd_heads": ("mpt", MPT),
    "mpt_untied_eight_heads": ("mpt", MPT | {"n_heads": 8, "tie_word_embeddings": False}),
    "glm": ("glm", LLAMA | {"head_dim": 8, "num_key_value_heads": 2}),
    "glm_whole_head": (
        "glm",
        LLAMA
        | {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", **ROPE, "partial_rotary_factor": 1.0}},
    ),
    "mixtral": ("mixtral", LLAMA | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "mixtral_top_1_window": (
        "mixtral",
        LLAMA | {"num_key_value_heads": 6, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
}


def native_model(case, dtype=torch.float32):
    """The native model of a case, with weights large enough for differences to show, the same in each dtype."""
    model_type, fields = CASES[case]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**fields)
    # With transformers' default back end: its eager Falcon adds ALiBi twice, to the scores and to the mask.
    model = AutoModelForCausalLM.from_config(config)
    return fill_loudly(model, 0.15).to(dtype)


def fill_loudly(model, scale=0.2):
    """Large weights that depend on names and shapes alone, so that models of one shape get the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()
