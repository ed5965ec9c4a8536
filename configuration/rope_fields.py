"""What may stand in `rope_parameters`, and its old spellings.

transformers warns of a key that a RoPE type does not read, such as a misspelt base, and goes on with the base 10000;
here a key that no type knows is refused where somebody types it, and every value that is read is checked by name.
"""

import copy
import difflib
from collections.abc import Iterable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)

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

REQUIRED_ROPE_KEYS = {
    "default": (),
    **dict.fromkeys(("linear", "dynamic", "ntk", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""Those of them that have no default; `original_max_position_embeddings` is `max_position_embeddings` if left out."""

COMMON_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
ALL_ROPE_KEYS = list(dict.fromkeys([*COMMON_ROPE_KEYS, *" ".join(ROPE_KEYS.values()).split()]))
LIST_KEYS = ("short_factor", "long_factor")
MAY_BE_NONE = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
"""Keys by type for which None is the same as leaving them out."""

LEAST, MOST = 1e-10, 1e30
"""The numbers between which every formula stays finite in float32."""
MOST_STRETCHED = 1e6
"""`factor`'s largest value: `dynamic` subtracts it from a product with it, which leaves nothing beyond."""

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
    old = {key: kwargs[key] for key in OLD_SPELLINGS if kwargs.get(key) is not None}
    if position_embedding_type != "rope" and (rope_parameters or old):
        raise ValueError(
            f"`{next(iter(old), 'rope_parameters')}` is set, but "
            f"`position_embedding_type={position_embedding_type!r}` has no rotary embedding: leave it out or "
            "set `position_embedding_type='rope'`"
        )
    scaling = old.pop("rope_scaling", None)
    if scaling is not None and not isinstance(scaling, dict):
        raise ValueError(f"`rope_scaling={scaling!r}` must be a dictionary: give `rope_parameters` instead")
    if scaling and rope_parameters and scaling != rope_parameters:
        raise ValueError(
            f"`rope_scaling={scaling}` and `rope_parameters={rope_parameters}` are two spellings of one thing: "
            "give `rope_parameters` alone"
        )
    if scaling:
        kwargs["rope_scaling"] = dict(scaling)
    given = scaling or rope_parameters or {}
    for key, value in old.items():
        if key in given and given[key] != value:
            raise ValueError(
                f"`{key}={value}` and `rope_parameters[{key!r}]={given[key]}` contradict each other: "
                "give the one in `rope_parameters` alone"
            )
    return None if rope_parameters is None else dict(rope_parameters)


def refuse_unknown_rope_keys(rope: dict[Any, Any]) -> None:
    """Raises ValueError for a key that no RoPE type reads."""
    for key in rope:
        if key not in ALL_ROPE_KEYS:
            near = difflib.get_close_matches(str(key), ALL_ROPE_KEYS, 1, 0.8)
            meant = FOREIGN_ROPE_KEYS.get(key) or next(iter(near), None)
            hint = f"did you mean `{meant}`?" if meant else f"leave it out; known are {', '.join(ALL_ROPE_KEYS)}"
            raise ValueError(f"`rope_parameters[{key!r}]` is not read by any `rope_type`: {hint}")


def assigned_rope(rope: dict[Any, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of what is assigned to `rope_parameters` in the place of `before`.

    Without a base it gets the default one, unless `before` had another: which of the two is meant is for the caller to
    say, and `check_rope` asks.

    Raises:
        ValueError: for a key that no RoPE type reads.
    """
    refuse_unknown_rope_keys(rope)
    rope, default = dict(rope), RotaryEmbeddingConfigMixin.default_theta
    if (before or {}).get("rope_theta", default) == default:
        rope.setdefault("rope_theta", default)
    return rope


def check_rope(config: PreTrainedConfig) -> None:
    """Raises ValueError, naming the key and the way out, for `rope_parameters` that `config` cannot honour, and warns
    once of keys that its type does not read."""
    rope = config.rope_parameters
    rope_type = rope.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise ValueError(f"`rope_parameters['rope_type']={rope_type!r}` is unknown; allowed: {sorted(ROPE_KEYS)}")
    if rope.get("type", rope_type) != rope_type:
        raise ValueError(
            f"`rope_parameters['type']={rope['type']!r}` and `rope_parameters['rope_type']={rope_type!r}` contradict "
            "each other: give `rope_type` alone"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        # Assigned to a config that was already made, where transformers reads it no more.
        stray = vars(config).get(key)
        if stray is not None and key in rope and rope[key] is not stray and rope[key] != stray:
            raise ValueError(f"`{key}={stray}` is not read: set `rope_parameters[{key!r}]`, now {rope[key]}")
    read = [*COMMON_ROPE_KEYS, *ROPE_KEYS[rope_type].split()]
    _warn_of_unread(rope, rope_type, read)
    for key in read:
        is_left_out = key not in rope or (rope[key] is None and key in MAY_BE_NONE.get(rope_type, ()))
        if key == "rope_theta" or not (is_left_out or key in ("rope_type", "type")):
            _check_value(key, rope.get(key))
    _check_pairs(rope, rope_type)
    _check_channels(config, rope, rope_type)
    missing = [key for key in REQUIRED_ROPE_KEYS[rope_type] if key not in rope]
    if missing:
        listed = " and ".join(f"`rope_parameters[{key!r}]`" for key in missing)
        raise ValueError(f"no {listed} with `rope_type={rope_type!r}`: add them or set another `rope_type`")
    stock = copy.copy(config)
    # What is not read has been warned of once, which transformers would do at every look.
    vars(stock)["rope_parameters"] = {key: rope[key] for key in rope if key in read}
    # Typed for configs of transformers only.
    RotaryEmbeddingConfigMixin.validate_rope(stock)  # pyright: ignore[reportAttributeAccessIssue]


def _warn_of_unread(rope: dict[Any, Any], rope_type: str, read: Iterable[str]) -> None:
    unread = sorted(str(key) for key in rope if key not in read)
    if unread:
        near = {key: difflib.get_close_matches(key, read, 1, 0.8) for key in unread}
        hints = [f" Did you mean {found[0]!r} by {key!r}?" for key, found in near.items() if found]
        logger.warning_once(
            f"`rope_parameters` keeps the keys {unread} as they are: `rope_type={rope_type!r}` does not read them."
            + "".join(hints)
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST <= value <= MOST


def _check_value(key: str, value: Any) -> None:
    """Raises ValueError for a value that no config could have under this key."""
    if key == "truncate":
        fits, wanted = isinstance(value, bool), "True or False"
    elif key == "original_max_position_embeddings":
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63
        wanted = "a positive whole number"
    elif key in LIST_KEYS:
        fits, wanted = isinstance(value, list) and all(map(_is_number, value)), "a list of positive numbers"
    elif key == "factor":
        fits = _is_number(value) and value <= MOST_STRETCHED
        wanted = f"a positive number of at most {MOST_STRETCHED:g}"
    else:
        fits, wanted = _is_number(value), f"a positive number between {LEAST:g} and {MOST:g}"
    if not fits:
        raise ValueError(f"`rope_parameters[{key!r}]={value!r}` must be {wanted}")


def _check_pairs(rope: dict[str, Any], rope_type: str) -> None:
    """Raises ValueError for values that divide by zero, or are passed over, because of each other."""
    if rope_type == "llama3" and rope.get("high_freq_factor", 2.0) <= rope.get("low_freq_factor", 1.0):
        raise ValueError(
            f"`rope_parameters['high_freq_factor']={rope.get('high_freq_factor')}` must be greater than "
            f"`rope_parameters['low_freq_factor']={rope.get('low_freq_factor')}`"
        )
    if rope_type == "yarn" and rope["rope_theta"] == 1:
        raise ValueError("`rope_parameters['rope_theta']=1` with `rope_type='yarn'`: all wavelengths are one")
    if rope_type == "yarn" and (rope.get("mscale") is None) != (rope.get("mscale_all_dim") is None):
        raise ValueError(
            f"`rope_parameters['mscale']={rope.get('mscale')}` and `rope_parameters['mscale_all_dim']="
            f"{rope.get('mscale_all_dim')}`: one is read only beside the other; give both or neither"
        )
    if rope_type == "longrope" and rope["original_max_position_embeddings"] == 1:
        raise ValueError(
            "`rope_parameters['original_max_position_embeddings']=1` with `rope_type='longrope'`: its logarithm is a "
            "divisor; give 2 or more"
        )


def _check_channels(config: PreTrainedConfig, rope: dict[str, Any], rope_type: str) -> None:
    fraction = rope.get("partial_rotary_factor", 1.0)
    rotary_dim = int(config.head_dim * fraction)
    axis_dim = 4 if config.rope_2d else 2
    if not 0 < rotary_dim <= config.head_dim or rotary_dim % axis_dim != 0:
        raise ValueError(
            f"`head_dim={config.head_dim}` with `rope_parameters['partial_rotary_factor']={fraction}` gives "
            f"{rotary_dim} rotary channels; they must be a multiple of {axis_dim} (`rope_2d={config.rope_2d}`) and at "
            "most `head_dim`"
        )
    if rope_type in ("dynamic", "ntk") and rotary_dim == axis_dim:
        raise ValueError(
            f"`rope_type={rope_type!r}` with {rotary_dim} rotary channels (`rope_2d={config.rope_2d}`): a single "
            "frequency has no base to stretch; rotate more channels or set another `rope_type`"
        )
    if config.rope_2d and fraction != 1.0:
        raise ValueError("`rope_2d=True` rotates all channels: leave `partial_rotary_factor` out of `rope_parameters`")
    if config.rope_2d and rope_type not in ("default", "linear", "ntk"):
        raise ValueError(
            f"`rope_2d=True` and `rope_type={rope_type!r}`: two axes are stretched by 'linear' or 'ntk' only"
        )
    for key in LIST_KEYS if rope_type == "longrope" else ():
        if len(rope.get(key, [0] * (rotary_dim // 2))) != rotary_dim // 2:
            raise ValueError(
                f"`rope_parameters[{key!r}]={rope[key]}` must be a list of {rotary_dim // 2} numbers, one for each "
                f"pair of rotary channels (`head_dim={config.head_dim}`)"
            )
