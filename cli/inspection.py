"""`minillm presets` and `minillm info`: what models are, without loading weights."""

import difflib
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table
from transformers import AutoConfig

from minillm.capabilities import DIRECTIONS, KINDS, features_of, refusal
from minillm.cli.console import console, say
from minillm.cli.loading import adapter_config, is_missing, load_pretrained, merge_command
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.configuration.presets import PRESETS
from minillm.experiments.cost import read_cost
from minillm.experiments.reporting import amount, number
from minillm.folded_alibi import is_foldable
from minillm.fused_loss import find_liger
from minillm.position_schemes import POSITION_BIASES
from minillm.publishing.description import describe, describe_adapter, is_mergeable
from minillm.tuning import tuning


def print_presets(family: str | None = None) -> None:
    """Prints a table for each family: parameters, shape, and where the numbers come from.

    Args:
        family: only this one; all, if left out.

    Raises:
        ValueError: if no preset is of this family (the message lists them all).
    """
    families = list(dict.fromkeys(preset.family for preset in PRESETS.values()))
    if family is not None and family not in families:
        close = difflib.get_close_matches(family, families, 1)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown family {family!r};{hint} available: {', '.join(families)}")
    for chosen in families if family is None else [family]:
        figures = [Column(head, no_wrap=True) for head in ("preset", "parameters", "layers x width")]
        table = Table(*figures, "what it is (source)", title=chosen, title_justify="left")
        for name, preset in PRESETS.items():
            if preset.family == chosen:
                config = MiniLLMConfig.from_preset(name)
                shape = f"{config.num_hidden_layers} x {config.hidden_size}"
                words = f"{preset.description} ({preset.source})"
                table.add_row(name, f"{read_cost(config).parameters:,}", shape, escape(words))
        console.print(table)


def find_config(name: str) -> MiniLLMConfig:
    """The config of a preset, a config file, a folder or a repository.

    Raises:
        ValueError: another model's config, or a name that is neither a preset nor a place.
    """
    if name in PRESETS:
        return MiniLLMConfig.from_preset(name)
    if not Path(name).exists() and "/" not in name:
        return MiniLLMConfig.from_preset(name)
    config = load_pretrained(AutoConfig, name, "config")
    if not isinstance(config, MiniLLMConfig):
        raise ValueError(f"{name} holds a {config.model_type!r} model; only MiniLLM's are described")
    return config


def cost_words(config: MiniLLMConfig) -> dict[str, str]:
    """Sizes and costs, topic by topic."""
    cost = read_cost(config)
    if cost.cache_bytes:
        # What a Trainer switches off while it trains says nothing about the model.
        cached = f"yes: {cost.cache_bytes:,} bytes a token in 16 bits"
        cached += "" if config.use_cache else "; ask for it, as in `generate(use_cache=True)`: the config has it off"
    else:
        cached = "no: a bidirectional model does not generate"
    weights, training = amount(2 * cost.parameters, "B"), amount(cost.training_bytes, "B")
    token, key = (f"{number(flops / 1e6)} million" for flops in (cost.forward_flops(), cost.attention_flops))
    return {
        "parameters": f"{cost.parameters:,}, {cost.embeddings:,} of them in tables of embeddings",
        "memory": f"{weights} of weights in 16 bits; training with AdamW in 32 bits: {training} and activations",
        "operations": f"{token} a token forward, and {key} for each token it looks at; in training three times that",
        "cache": cached,
    }


def fast_paths(config: MiniLLMConfig) -> dict[str, str]:
    """What is done otherwise than step by step where it pays off, with the same results, and how to switch it off."""
    asked = "in training without holding logits (off: skip_logits=False)"
    held = "from all logits (without holding them: skip_logits=True, and in `minillm train`)"
    liger = find_liger()
    kernel = "by Liger's kernel, unless compiled (off: model.tuning.use_liger = False)"
    on_cuda = f"by torch, not by Liger's kernel: {liger}" if isinstance(liger, str) else kernel
    masked = config.attention_type != "bidirectional" or config.sliding_window is not None
    hides = masked or config.position_embedding_type in POSITION_BIASES
    plain = f", up to {tuning.plain_blocks_up_to:,} unless packed or padded"
    length = f"beyond {tuning.blocks_from} tokens{plain if features_of(config) <= {'any', 'dropout'} else ''}"
    attention = f"sdpa on cpu in blocks of queries, {length} (off: attn_implementation='eager')"
    limits = tuning.longest_fold.items()
    longest = " or ".join(f"{str(dtype).removeprefix('torch.')} up to {length:,}" for dtype, length in limits)
    folded = (
        f"sdpa with ALiBi folded into queries and keys: {longest} tokens, unless packed, padded or with a prefix "
        "(off: model.tuning.folding_devices = ())"
    )
    generates = config.attention_type != "bidirectional"
    tokens = -(-tuning.growing_elements // (config.num_key_value_heads * config.head_dim))
    grows = (
        f"with room for tokens to come, from {tokens:,} tokens a batch on, in an empty DynamicCache "
        "(off: model.tuning.growing_elements = 2**62)"
    )
    return {
        "loss": asked if config.skip_logits else held,
        "loss without logits on cuda": on_cuda,
        "attention in training": attention if hides else "whole",
        **({"attention on cuda": folded} if is_foldable(config) else {}),
        **({"growth of the cache": grows} if generates and config.sliding_window is None else {}),
    }


def served(config: MiniLLMConfig, implementation: str, device: str) -> str:
    """What a back end does for a variant on a device: everything, some directions, or nothing."""
    able = [direction for direction in DIRECTIONS if refusal(config, implementation, device, direction) is None]
    return "yes" if len(able) == len(DIRECTIONS) else f"{', '.join(able)} only" if able else "refused"


def refusal_reasons(config: MiniLLMConfig, implementation: str) -> list[str]:
    """Why a back end refuses some or all of a variant, each reason once."""
    found = [refusal(config, implementation, device, way) for device in ("cpu", "cuda") for way in DIRECTIONS]
    return list(dict.fromkeys(reason for reason in found if reason))


def back_ends(config: MiniLLMConfig) -> list[tuple[list[str], tuple[str, str, str]]]:
    """Back ends that serve a variant alike: their names, what they do on CPU and on CUDA, and why not more."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for implementation in (*KINDS, "others"):
        cpu, cuda = (served(config, implementation, device) for device in ("cpu", "cuda"))
        alike.setdefault((cpu, cuda, "; ".join(refusal_reasons(config, implementation))), []).append(implementation)
    return [(names, row) for row, names in alike.items()]


def find_adapter(name: str) -> dict[str, Any] | None:
    """The config of the adapter in a folder or repository; None for a model, a config file or a preset."""
    if Path(name).is_file() or ("/" not in name and not Path(name).exists()):
        return None
    return adapter_config(name)


def adapter_words(name: str, adapter: dict[str, Any]) -> dict[str, str]:
    """What an adapter is, topic by topic."""
    base = adapter.get("base_model_name_or_path")
    kind, *others = describe_adapter(adapter).items()
    place = f"{base}, which is missing" if is_missing(base) else base or "not named"
    words = dict([kind, ("base model", place), *others])
    return words | ({"to merge it": merge_command(name, adapter)} if is_mergeable(adapter) else {})


def print_words(name: str, words: dict[str, str]) -> None:
    table = Table("", "", show_header=False, title=escape(name))
    for topic, phrase in words.items():
        table.add_row(topic, escape(phrase))
    console.print(table)


def print_info(name: str) -> None:
    """Prints a config in words: mask, positions, norms, sizes, cache and back ends; of an adapter, what it changes."""
    if (adapter := find_adapter(name)) is not None:
        print_words(name, adapter_words(name, adapter))
        return
    config = find_config(name)
    words = describe(config)
    first = {topic: words.pop(topic) for topic in ("size", "length")}
    print_words(name, {**first, **cost_words(config), **words, **fast_paths(config)})
    table = Table("attention back end", "cpu", "cuda", "why not")
    for names, row in back_ends(config):
        table.add_row(", ".join(names), *row)
    console.print(table)
    say("chosen by default: sdpa")
