"""Presets whose blocks have LayerNorm and an ungated feed-forward: GPT-2 and GPT-3, BLOOM, Falcon, MPT."""

from minillm.configuration.preset import Preset, size

_BIASES = {"attention_qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
_LAYERNORM_MLP = {"norm_type": "layernorm", "norm_eps": 1e-5, "mlp_type": "mlp"}

_GPT = {
    **_LAYERNORM_MLP,
    **_BIASES,
    "vocab_size": 50257,
    "position_embedding_type": "learned",
    "hidden_act": "gelu_new",
    "scale_residual_init": True,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_GPT2 = {
    **_GPT,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "embedding_dropout": 0.1,
}
_GPT2_SOURCE = "the released config"
# Length 2048 and GPT-2's vocabulary are the table's and the text's; the paper does not speak of dropout.
_GPT3 = {**_GPT, "max_position_embeddings": 2048}
_GPT3_SOURCE = "arXiv 2005.14165, table 2.1"

# Attention to a local band in every second block, which GPT-3 has, is no part of these shapes.
_GPT3_NOTE = "dense attention throughout, where GPT-3's is sparse in every second block"

_BLOOM = {
    **_LAYERNORM_MLP,
    **_BIASES,
    "vocab_size": 250880,
    "position_embedding_type": "alibi",
    "alibi_rounding": "bloom",
    "embedding_norm": True,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 3,
}
_BLOOM_SOURCE = "arXiv 2211.05100, table 3; the released config"

_FALCON = {
    **_LAYERNORM_MLP,
    "vocab_size": 65024,
    "parallel_residual": True,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
    "bos_token_id": 11,
    "eos_token_id": 11,
}
_FALCON_GROUPED = {**_FALCON, "num_key_value_heads": 8, "num_parallel_norms": 2}
_FALCON_RW = {
    **_LAYERNORM_MLP,
    **_BIASES,
    "position_embedding_type": "alibi",
    "alibi_scale": 64**-0.5,
    "alibi_rounding": "falcon",
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
}
_FALCON_SOURCE = "arXiv 2311.16867; the released config"
_FALCON_RW_SOURCE = "arXiv 2306.01116; the released config"

_MPT = {
    **_LAYERNORM_MLP,
    "vocab_size": 50432,
    "position_embedding_type": "alibi",
    "norm_bias": False,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MPT_SOURCE = "the released config; GPT-NeoX's token ids"

GPT_PRESETS: dict[str, Preset] = {
    "gpt2": Preset(
        "GPT-2 small: learned positions, LayerNorm, GELU, biases", _GPT2_SOURCE, {**_GPT2, **size(768, 12, 12)}, "gpt2"
    ),
    "gpt2-medium": Preset("GPT-2 medium", _GPT2_SOURCE, {**_GPT2, **size(1024, 24, 16)}, "gpt2"),
    "gpt2-large": Preset("GPT-2 large", _GPT2_SOURCE, {**_GPT2, **size(1280, 36, 20)}, "gpt2"),
    "gpt2-xl": Preset("GPT-2 XL", _GPT2_SOURCE, {**_GPT2, **size(1600, 48, 25)}, "gpt2"),
    "gpt-3-125m": Preset(f"GPT-3 small: {_GPT3_NOTE}", _GPT3_SOURCE, {**_GPT3, **size(768, 12, 12)}, "gpt2"),
    "gpt-3-350m": Preset("GPT-3 medium, likewise dense", _GPT3_SOURCE, {**_GPT3, **size(1024, 24, 16)}, "gpt2"),
    "gpt-3-760m": Preset("GPT-3 large, likewise dense", _GPT3_SOURCE, {**_GPT3, **size(1536, 24, 16)}, "gpt2"),
    # The table's 24 heads of 128 fit neither its width nor its total of 1.3B: 16 of them do.
    "gpt-3-1.3b": Preset(
        "GPT-3 XL, likewise dense; 16 heads, since the table's 24 do not fit its width",
        _GPT3_SOURCE,
        {**_GPT3, **size(2048, 24, 16)},
        "gpt2",
    ),
    "gpt-3-2.7b": Preset("GPT-3 2.7B, likewise dense", _GPT3_SOURCE, {**_GPT3, **size(2560, 32, 32)}, "gpt2"),
    "gpt-3-6.7b": Preset("GPT-3 6.7B, likewise dense", _GPT3_SOURCE, {**_GPT3, **size(4096, 32, 32)}, "gpt2"),
    # 40 heads of 128 are 5120 channels; the table's width is 5140.
    "gpt-3-13b": Preset(
        "GPT-3 13B, likewise dense", _GPT3_SOURCE, {**_GPT3, **size(5140, 40, 40), "head_dim": 128}, "gpt2"
    ),
    "gpt-3-175b": Preset("GPT-3 175B, likewise dense", _GPT3_SOURCE, {**_GPT3, **size(12288, 96, 96)}, "gpt2"),
    "bloom-560m": Preset(
        "BLOOM 560M: ALiBi, LayerNorm after the embedding", _BLOOM_SOURCE, {**_BLOOM, **size(1024, 24, 16)}, "bloom"
    ),
    "bloom-1b1": Preset("BLOOM 1.1B", _BLOOM_SOURCE, {**_BLOOM, **size(1536, 24, 16)}, "bloom"),
    "bloom-1b7": Preset("BLOOM 1.7B", _BLOOM_SOURCE, {**_BLOOM, **size(2048, 24, 16)}, "bloom"),
    "bloom-3b": Preset("BLOOM 3B", _BLOOM_SOURCE, {**_BLOOM, **size(2560, 30, 32)}, "bloom"),
    "bloom-7b1": Preset("BLOOM 7.1B", _BLOOM_SOURCE, {**_BLOOM, **size(4096, 30, 32)}, "bloom"),
    "bloom-176b": Preset("BLOOM 176B", _BLOOM_SOURCE, {**_BLOOM, **size(14336, 70, 112)}, "bloom"),
    "falcon-7b": Preset(
        "Falcon 7B: multi-query attention beside the feed-forward, RoPE",
        _FALCON_SOURCE,
        {**_FALCON, **size(4544, 32, 71), "num_key_value_heads": 1},
        "falcon",
    ),
    "falcon-40b": Preset(
        "Falcon 40B: grouped-query attention, a norm for each parallel branch",
        _FALCON_SOURCE,
        {**_FALCON_GROUPED, **size(8192, 60, 128)},
        "falcon",
    ),
    "falcon-180b": Preset(
        "Falcon 180B, likewise", _FALCON_SOURCE, {**_FALCON_GROUPED, **size(14848, 80, 232)}, "falcon"
    ),
    "falcon-rw-1b": Preset(
        "Falcon RW 1B: ALiBi, one sub-layer after the other",
        _FALCON_RW_SOURCE,
        {**_FALCON_RW, **size(2048, 24, 32), "vocab_size": 50304},
        "falcon",
    ),
    "falcon-rw-7b": Preset(
        "Falcon RW 7B, likewise",
        _FALCON_RW_SOURCE,
        {**_FALCON_RW, **size(4096, 36, 64), "vocab_size": 65024},
        "falcon",
    ),
    "mpt-7b": Preset("MPT 7B: ALiBi, LayerNorm, no biases", _MPT_SOURCE, {**_MPT, **size(4096, 32, 32)}, "mpt"),
    "mpt-30b": Preset(
        "MPT 30B, made for 8192 tokens",
        _MPT_SOURCE,
        {**_MPT, **size(7168, 48, 64), "max_position_embeddings": 8192},
        "mpt",
    ),
}
