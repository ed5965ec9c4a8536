"""Tiny models of transformers' own families, and batches long enough for attention in blocks."""

import torch
from native_families import fill_loudly
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

VOCAB, LENGTH, WINDOW = 64, 150, 40
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
NO_GROUPS = {"num_key_value_heads": 4}
BERT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2 windows": ("qwen2", BOTH_KINDS | {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", BOTH_KINDS | {"query_pre_attn_scalar": 8}),
    "mistral window": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", MIXTURE),
    "mixtral window": ("mixtral", MIXTURE | {"sliding_window": WINDOW}),
    "glm4": ("glm4", {}),
    "phi": ("phi", NO_GROUPS | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3 window": ("phi3", {"sliding_window": WINDOW, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "cohere2": ("cohere2", BOTH_KINDS),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_inner": 48}),
    "gpt_neox": ("gpt_neox", {"hidden_dropout": 0.0}),
    "starcoder2": ("starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "llama4 chunks": (
        "llama4_text",
        MIXTURE
        | {"attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"]}
        | {"intermediate_size_mlp": 48, "num_experts_per_tok": 1, "no_rope_layers": [1, 0]},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        NO_GROUPS
        | {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        | {"moe_intermediate_size": 16, "n_shared_experts": 1},
    ),
    "bert": ("bert", BERT),
    "modernbert": ("modernbert", {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2}),
}
ENCODERS = ("bert", "modernbert")
# Layers of the two that need a mask for a plain text.
MASKED_LAYERS = {
    "qwen2 windows": 1,
    "gemma3": 1,
    "mistral window": 2,
    "mixtral window": 2,
    "phi3 window": 2,
    "cohere2": 1,
    "llama4 chunks": 1,
    "modernbert": 1,
}
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS)


def config_of(family, **fields):
    model_type, own = FAMILIES[family]
    return CONFIG_MAPPING[model_type](**{**TINY, **own, **fields})


def model_of(family, **fields):
    """A model with weights so large that every mask shows."""
    config = config_of(family, **fields)
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if family in DECODERS else AutoModel
    model = auto.from_config(config, attn_implementation="eager")
    return fill_loudly(model)


def tokens(batch=2, length=LENGTH):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))


def packed(lengths=(30, 65, 55)):
    """Documents by positions alone, and of other lengths in the second row."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in order]) for order in (lengths, lengths[::-1])])
    return {"input_ids": tokens(length=sum(lengths)), "position_ids": positions}


def padded(side, count=140):
    """A row whose `count` first or last tokens are padding, beside one without any."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


BATCHES = {
    "packed": packed,
    "padded right": lambda: padded("right"),
    "padded left": lambda: padded("left"),
    "plain": lambda: {"input_ids": tokens()},
}


def scored(inputs):
    """Labels of real tokens behind real ones."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    behind = torch.cat([real[:, :1], real[:, :-1]], dim=1)
    return inputs["input_ids"].masked_fill(~(real & behind), -100)


def loss_and_gradients(model, inputs):
    """Loss and gradients by name; of an encoder, of a sum over its real tokens."""
    model.zero_grad()
    if "labels" in inputs:
        loss = model(**inputs, use_cache=False).loss
    else:
        hidden = model(**inputs).last_hidden_state
        loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape))[real_tokens(inputs)].mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def real_tokens(inputs):
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def assert_close_to_eager(found, expected, tolerance=1e-5):
    """Losses to 1e-6, gradients to 1e-5 of the largest."""
    assert abs(found[0] - expected[0]) <= 1e-6 * max(1.0, abs(expected[0]))
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        difference = (gradient - expected[1][name]).abs().max()
        assert difference <= tolerance * largest, (name, float(difference / largest))
