"""What the fields of attention and positions mean together."""

from types import SimpleNamespace
from typing import Any

ATTENTION_OWNERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(
        (
            "prompt_is_prefix",
            "answer_start_token_id",
            "turn_token_ids",
            "mask_token_id",
            "gmask_token_id",
            "smask_token_id",
            "sop_token_id",
        ),
        ("attention_type", ("prefix",)),
    ),
    **dict.fromkeys(("rope_interleaved", "rope_2d"), ("position_embedding_type", ("rope",))),
    "position_table_size": ("position_embedding_type", ("learned", "glm_2d")),
    **dict.fromkeys(("alibi_scale", "alibi_bias_max", "alibi_rounding"), ("position_embedding_type", ("alibi",))),
    "sandwich_dim": ("position_embedding_type", ("sandwich",)),
}


def attention_conflicts(config: SimpleNamespace) -> list[tuple[bool, str]]:
    """Pairs of (is it so, what is wrong and the way out), from a config's fields."""
    return [
        (
            config.head_dim is None,
            f"`hidden_size={config.hidden_size}` is not a multiple of `num_attention_heads="
            f"{config.num_attention_heads}`: change one of them or set `head_dim`",
        ),
        (
            config.num_attention_heads % config.num_key_value_heads != 0,
            f"`num_attention_heads={config.num_attention_heads}` is not a multiple of "
            f"`num_key_value_heads={config.num_key_value_heads}`: each key head serves equally many query heads",
        ),
        (
            bool(config.use_cache) and config.attention_type == "bidirectional",
            "`use_cache=True` and `attention_type='bidirectional'`: cached tokens would have to see later ones; "
            "leave `use_cache` out",
        ),
        (
            config.sliding_window == 1,
            "`sliding_window=1`: a token would see itself alone; set it to 2 or more, or leave it out",
        ),
        (
            config.position_embedding_type != "rope" and bool(config.rope_parameters),
            f"`rope_parameters={config.rope_parameters}` is set, but `position_embedding_type="
            f"{config.position_embedding_type!r}` has no rotary embedding: leave it out or set "
            "`position_embedding_type='rope'`",
        ),
        (
            config.alibi_rounding != "none" and config.attention_type != "causal",
            f"`alibi_rounding={config.alibi_rounding!r}` and `attention_type={config.attention_type!r}`: this "
            "rounding is defined by key position alone, which only a causal mask allows; set `alibi_rounding='none'`",
        ),
        (
            config.sandwich_dim % 2 != 0,
            f"`sandwich_dim={config.sandwich_dim}` must be even: sines and cosines come in pairs",
        ),
    ]
