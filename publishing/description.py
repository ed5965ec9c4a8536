"""A model's variant in words and in drawings, for model cards, `minillm info` and the documentation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minillm.checks import GivenTokens
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.geometry import read_geometry
from minillm.masks import dense_mask
from minillm.token_facts import read_tokens

POSITIONS = {
    "rope": "rotary position embedding (RoPE)",
    "alibi": "ALiBi (a bias by distance)",
    "sandwich": "Sandwich bias",
    "learned": "learned positions",
    "sinusoidal": "sinusoidal positions",
    "glm_2d": "GLM's two learned position axes",
    "none": "no position information",
}
MASKS = {
    "causal": "causal: each token sees itself and what stands before it",
    "prefix": "prefix: tokens of the prompt see one another in both directions, the rest is causal",
    "bidirectional": "bidirectional: all tokens see one another",
}
PLACEMENTS = {
    "pre": "before each sub-layer (pre-norm)",
    "post": "after each sub-layer (post-norm)",
    "deepnorm": "after each sub-layer, with DeepNorm's scaled residual",
    "sandwich": "before and after each sub-layer (sandwich)",
}

FEED_FORWARDS = {
    "glu": "gated (GLU)",
    "mlp": "plain (MLP)",
    "moe": "mixture of {num_local_experts} gated experts, {num_experts_per_tok} for each token",
}


def describe(config: MiniLLMConfig) -> dict[str, str]:
    """What a config is, as pairs of a topic and a phrase."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    sharing = "multi-query" if shared == 1 < heads else "grouped-query" if shared < heads else "multi-head"
    mask = MASKS[config.attention_type]
    if config.sliding_window is not None:
        mask += f", within a window of {config.sliding_window} tokens"
    positions = POSITIONS[config.position_embedding_type]
    if config.position_embedding_type == "rope":
        rope = vars(config)["rope_parameters"]
        layout = "interleaved" if config.rope_interleaved else "half"
        details = [f"type {rope['rope_type']}", f"base {rope['rope_theta']:g}", f"{layout} layout"]
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            details.append(f"on {rope['partial_rotary_factor']:g} of each head")
        if config.rope_2d:
            details.append("on two axes")
        positions += f": {', '.join(details)}"
    norms = f"{config.norm_type}, {PLACEMENTS[config.norm_placement]}"
    if config.parallel_residual:
        norms = f"{config.norm_type}, attention and feed-forward in parallel"
    feed_forward = FEED_FORWARDS[config.mlp_type].format_map(vars(config))
    return {
        "attention": mask,
        "positions": positions,
        "heads": f"{heads} query heads on {shared} key/value heads of width {config.head_dim} ({sharing})",
        "norms": norms,
        "feed-forward": f"{feed_forward}, {config.hidden_act}, inner width {config.intermediate_size}",
        "size": f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.vocab_size} tokens",
        "length": f"made for {config.max_position_embeddings} tokens",
    }


UNMERGEABLE = frozenset(
    "ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING SHADOW".split()
)
"""Kinds of adapters that add to the input, the cache or the layers instead of changing weights."""


def adapter_kind(adapter: Mapping[str, Any]) -> str:
    """The kind of a PEFT adapter as its file spells it, such as `"LORA"`."""
    kind = adapter.get("peft_type")
    return str(getattr(kind, "value", kind))


def is_mergeable(adapter: Mapping[str, Any]) -> bool:
    """Whether an adapter can be added to the weights of its base model, by the values of its config."""
    # The first acts on some tokens only, the second adds layers.
    elsewhere = adapter.get("alora_invocation_tokens") or adapter.get("layer_replication")
    return adapter_kind(adapter) not in UNMERGEABLE and not elsewhere


def describe_adapter(adapter: Mapping[str, Any]) -> dict[str, str]:
    """What a PEFT adapter is, by the values of its config, as pairs of a topic and a phrase."""
    kind = adapter_kind(adapter)
    words = {"kind": f"{kind} adapter: changes to a base model, no model of its own"}
    if kind == "LORA":
        words["rank"] = f"{adapter['r']} (alpha {adapter['lora_alpha']}, dropout {adapter['lora_dropout']})"
    for topic, key in (
        ("changed modules", "target_modules"),
        ("modules trained whole", "modules_to_save"),
        ("tokens whose rows are trained", "trainable_token_indices"),
        ("virtual tokens", "num_virtual_tokens"),
    ):
        if found := adapter.get(key):
            if isinstance(found, Mapping):
                # Of each table.
                found = [f"{len(rows)} of {table}" for table, rows in found.items()]
            words[topic] = str(found) if isinstance(found, (str, int)) else ", ".join(sorted(map(str, found)))
    return words


def draw_mask(
    config: MiniLLMConfig,
    length: int = 8,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    prefix_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> str:
    """Draws who sees whom in one row of tokens: a line per token, `■` where it looks and `·` where it does not.

    Args:
        config: the variant.
        length: number of tokens.
        attention_mask, position_ids, prefix_mask, document_ids: [1, length], as for the model's forward.

    Raises:
        ValueError: what the forward would refuse.
    """
    geometry = read_geometry(config, torch.empty(1, length, 0), None)
    tokens = read_tokens(config, geometry, GivenTokens(attention_mask, position_ids, prefix_mask, document_ids))
    mask = dense_mask(geometry, tokens)[0, 0].tolist()
    return "\n".join(" ".join("■" if seen else "·" for seen in line) for line in mask)


def draw_positions(tokens: Sequence[str], position_ids: Sequence[int], block_position_ids: Sequence[int]) -> str:
    """Draws where the tokens of a row stand on both position axes: three lines, a column for each token.

    Args:
        tokens: a word for each token.
        position_ids, block_position_ids: a number for each token, on the first axis and on the second.
    """
    columns = list(zip(tokens, map(str, position_ids), map(str, block_position_ids), strict=True))
    columns.insert(0, ("", "position_ids", "block_position_ids"))
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)
