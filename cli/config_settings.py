"""What `--set` and a config file as `--preset` say of a model's config."""

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from minillm.cli.field_values import as_text, read_pairs, read_value, words_of
from minillm.cli.options_file import read_mapping
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.configuration.presets import PRESETS

STAMPS = ("minillm_version", "schema_version")
BOOKKEEPING = (*STAMPS, "architectures", "auto_map", "derived_fields", "dtype", "model_type", "transformers_version")
"""Keys of a saved config that are no choice of an architecture."""

OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")

OPEN_TO_A_MODEL = frozenset(
    "attention_dropout hidden_dropout embedding_dropout embedding_gradient_scale router_aux_loss_coef "
    "router_jitter_noise output_router_logits use_cache skip_logits prompt_is_prefix answer_start_token_id "
    "turn_token_ids bos_token_id eos_token_id pad_token_id mask_token_id gmask_token_id smask_token_id "
    "sop_token_id".split()
)
"""Fields that leave the shapes and the meaning of trained weights alone."""


def config_hints() -> dict[str, Any]:
    """The type of each field of a config that may be set."""
    hints = typing.get_type_hints(MiniLLMConfig, localns={"torch": torch})
    return {field.name: hints[field.name] for field in dataclasses.fields(MiniLLMConfig) if field.name not in STAMPS}


def read_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Fields of the config from FIELD=VALUE pairs.

    Raises:
        ValueError: as `read_pairs`.
    """
    return read_pairs(pairs, "--set", config_hints(), "MiniLLMConfig")


def require_open(settings: Iterable[str]) -> None:
    """Refuses, by their names, fields that would make other weights of those of a trained model."""
    if closed := sorted(set(settings) - OPEN_TO_A_MODEL):
        raise ValueError(
            f"--set {', '.join(closed)}: with --model the weights are there, and this would change their shapes or "
            "what they mean; leave it out, or start from scratch with --preset. Allowed: "
            f"{', '.join(sorted(OPEN_TO_A_MODEL))}"
        )


def is_file(preset: str) -> bool:
    """Whether a `--preset` is a config file rather than a name."""
    return preset not in PRESETS and (Path(preset).exists() or preset.endswith((".json", ".yaml", ".yml")))


def fields_of_file(file: Path) -> dict[str, Any]:
    """The architecture in a config file: a saved `config.json`, or YAML or JSON with some fields.

    The vocabulary and the special tokens are those of the tokenizer, as with a named preset; what a saved config had
    derived is derived anew.

    Raises:
        ValueError: it cannot be read, or is of another kind of model.
    """
    values = read_mapping(file)
    if values.get("model_type", MiniLLMConfig.model_type) != MiniLLMConfig.model_type:
        raise ValueError(
            f"{file} holds the config of a {values['model_type']!r} model: convert that with `minillm convert`"
        )
    derived = values.get("derived_fields")
    left_out = {*BOOKKEEPING, *OF_THE_TOKENIZER, *(derived if isinstance(derived, dict) else ())}
    hints, fields = config_hints(), {}
    for name, value in values.items():
        if name in left_out:
            continue
        fields[name] = value
        if name in hints:
            try:
                # YAML takes 1e-5 for a string.
                fields[name] = read_value(as_text(value), hints[name])
            except ValueError:
                raise ValueError(f"{file}: {name} is {value!r}; it must be {words_of(hints[name])}") from None
    return fields
