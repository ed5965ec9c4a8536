"""What may stand in `rope_parameters`, and its old spellings.

transformers warns of a key that a RoPE type does not read, such as a misspelt base, and goes on with the base 10000;
here nothing of that dictionary is left unread.
"""

import difflib
import math
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

ROPE_KEYS = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "ntk": "factor",
    "yarn": "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
    "truncate",
    "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor",
    "longrope": "factor original_max_position_embeddings attention_factor short_factor long_factor",
}
"""The types, and what each reads beside the common keys."""

COMMON_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
OLD_SPELLINGS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
FOREIGN_ROPE_KEYS = {
    "base": "rope_theta",
    "theta": "rope_theta",
    "rope_base": "rope_theta",
    "rotary_base": "rope_theta",
    "scaling_factor": "factor",
    "rotary_pct": "partial_rotary_factor",
}


def take_old_spellings(
    position_embedding_type: str, rope_parameters: dict | None, kwargs: dict[str, Any]
) -> dict | None:
    """Copies of `rope_parameters` and, in place, of `rope_scaling` in `kwargs`: transformers fills them, and the
    caller's dictionaries stay as they are.

    Raises:
        ValueError: if there is no RoPE, or if two spellings differ. transformers would let `rope_scaling` replace
            `rope_parameters`, base and all, and the dictionary's base win over `rope_theta`.
    """
    old = {key: kwargs[key] for key in OLD_SPELLINGS if kwargs.get(key)}
    if position_embedding_type != "rope" and (rope_parameters or old):
        raise ValueError(
            f"`{next(iter(old), 'rope_parameters')}` is set, but "
            f"`position_embedding_type={position_embedding_type!r}` has no rotary embedding: leave it out or "
            "set `position_embedding_type='rope'`"
        )
    scaling = old.pop("rope_scaling", None)
    if scaling and rope_parameters and scaling != rope_parameters:
        raise ValueError(
            f"`rope_scaling={scaling}` and `rope_parameters={rope_parameters}` are two spellings of one thing: "
            "give `rope_parameters` alone"
        )
    if scaling:
        kwargs["rope_scaling"] = dict(scaling)
    given = scaling or rope_parameters or {}
    for key, value in old.items():
        if given.get(key, value) != value:
            raise ValueError(
                f"`{key}={value}` and `rope_parameters[{key!r}]={given[key]}` contradict each other: "
                "give the one in `rope_parameters` alone"
            )
    return None if rope_parameters is None else dict(rope_parameters)


def check_rope(config: PreTrainedConfig) -> None:
    """Raises ValueError, naming the key and the way out, for `rope_parameters` that `config` cannot honour."""
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_KEYS:
        raise ValueError(f"`rope_parameters['rope_type']={rope_type!r}` is unknown; allowed: {sorted(ROPE_KEYS)}")
    keys = [*COMMON_ROPE_KEYS, *ROPE_KEYS[rope_type].split()]
    for key in rope:
        if key not in keys:
            meant = FOREIGN_ROPE_KEYS.get(key) or next(iter(difflib.get_close_matches(key, keys, 1, 0.8)), None)
            hint = f"did you mean `{meant}`?" if meant else f"leave it out; it reads {', '.join(keys)}"
            raise ValueError(f"`rope_parameters[{key!r}]` is not read by `rope_type={rope_type!r}`: {hint}")
    for key in ("rope_theta", "partial_rotary_factor"):
        # Assigned to a config that was already made, where transformers reads it no more.
        stray = vars(config).get(key)
        if stray is not None and stray != rope.get(key, stray):
            raise ValueError(f"`{key}={stray}` is not read: set `rope_parameters[{key!r}]`, now {rope[key]}")
    for key in ("rope_theta", "factor", "partial_rotary_factor"):
        value = rope.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (key in rope or key == "rope_theta") and not (is_number and 0 < value < math.inf):
            raise ValueError(f"`rope_parameters[{key!r}]={value!r}` must be a positive number")
    _check_channels(config, rope, rope_type)
    try:
        config.validate_rope()
    except KeyError as error:
        raise ValueError(f"{error.args[0]}; add them or set another `rope_type`") from None


def _check_channels(config: PreTrainedConfig, rope: dict[str, Any], rope_type: str) -> None:
    fraction = rope.get("partial_rotary_factor", 1.0)
    rotary_dim = int(config.head_dim * fraction)
    axis_dim = 4 if config.rope_2d else 2
    if not 0 < rotary_dim <= config.head_dim or rotary_dim % axis_dim != 0:
        raise ValueError(
            f"`head_dim={config.head_dim}` with `partial_rotary_factor={fraction}` gives {rotary_dim} rotary "
            f"channels; they must be a multiple of {axis_dim} (`rope_2d={config.rope_2d}`) and at most `head_dim`"
        )
    if rope_type == "dynamic" and rotary_dim == 2:
        raise ValueError(
            "`rope_type='dynamic'` with 2 rotary channels: a single frequency has no base to stretch; rotate more "
            "channels or set another `rope_type`"
        )
    if config.rope_2d and fraction != 1.0:
        raise ValueError("`rope_2d=True` rotates all channels: leave `partial_rotary_factor` out of `rope_parameters`")
    if config.rope_2d and rope_type not in ("default", "linear", "ntk"):
        raise ValueError(
            f"`rope_2d=True` and `rope_type={rope_type!r}`: two axes are stretched by 'linear' or 'ntk' only"
        )
    for key in ("short_factor", "long_factor"):
        if key in rope and (not isinstance(rope[key], list) or len(rope[key]) != rotary_dim // 2):
            raise ValueError(
                f"`rope_parameters[{key!r}]={rope[key]}` must be a list of {rotary_dim // 2} numbers, one for each "
                f"pair of rotary channels (`head_dim={config.head_dim}`)"
            )
