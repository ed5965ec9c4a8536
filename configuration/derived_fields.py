"""Fields that follow from others unless someone sets them.

A config and its file hold concrete values, since other libraries read them there. Beside them `derived_fields` holds
what was filled in, by name: a field that still has the value written there goes on following its owners, any other was
set and stays. A changed owner therefore never leaves behind a value that belonged to the old one, whoever changes it:
an assignment, an override at loading, or an edit of the saved dictionary.
"""

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Optional, TypeVar

from minillm.configuration.feed_forward_fields import FEED_FORWARD_RULES, MLP_PLANS

FieldT = TypeVar("FieldT")

if TYPE_CHECKING:

    class Derived(Generic[FieldT]):
        """The type of a field that may be left out, and has a value in every config."""

        def __get__(self, config: object, owner: type | None = None) -> FieldT: ...

        def __set__(self, config: object, value: FieldT | None) -> None: ...

else:
    Derived = Optional

LEFT_OUT: Any = None

Fields = dict[str, Any]
"""All attributes of a config by name, as `vars(config)` gives them."""

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Rule(NamedTuple):
    """The fields that decide a derived one, and its value from a config's fields: None where it has none."""

    owners: tuple[str, ...]
    value: Callable[[Fields], Any]


def _head_dim(fields: Fields) -> int | None:
    # None where it does not divide: an owner may be assigned before the other, and building a model asks again.
    hidden_size, heads = fields["hidden_size"], fields["num_attention_heads"]
    return hidden_size // heads if heads > 0 and hidden_size % heads == 0 else None


def _position_table_size(fields: Fields) -> int | None:
    length, kind = fields["max_position_embeddings"], fields["position_embedding_type"]
    return {"learned": length, "glm_2d": length + 1}.get(kind)


def _deepnorm(factor: int, exponent: float) -> Callable[[Fields], float | None]:
    def value(fields: Fields) -> float | None:
        is_deepnorm = fields["norm_placement"] == "deepnorm" and fields["num_hidden_layers"] > 0
        return (factor * fields["num_hidden_layers"]) ** exponent if is_deepnorm else None

    return value


DERIVED: dict[str, Rule] = {
    "num_key_value_heads": Rule(("num_attention_heads",), lambda fields: fields["num_attention_heads"]),
    "head_dim": Rule(("hidden_size", "num_attention_heads"), _head_dim),
    **{name: Rule(*rule) for name, rule in FEED_FORWARD_RULES.items()},
    "position_table_size": Rule(("max_position_embeddings", "position_embedding_type"), _position_table_size),
    "rope_parameters": Rule(
        ("position_embedding_type",),
        lambda fields: dict(DEFAULT_ROPE) if fields["position_embedding_type"] == "rope" else None,
    ),
    "norm_bias": Rule(("norm_type",), lambda fields: fields["norm_type"] == "layernorm"),
    "final_norm": Rule(("norm_placement",), lambda fields: fields["norm_placement"] in ("pre", "sandwich")),
    "deepnorm_alpha": Rule(("norm_placement", "num_hidden_layers"), _deepnorm(2, 0.25)),
    "deepnorm_beta": Rule(("norm_placement", "num_hidden_layers"), _deepnorm(8, -0.25)),
    "use_cache": Rule(("attention_type",), lambda fields: fields["attention_type"] != "bidirectional"),
}
"""The derived fields. No rule reads a derived field, so their order says nothing. A rule that changes is a change of
what saved files mean: it needs a new `SCHEMA_VERSION`."""

FOLLOWED = frozenset(DERIVED) | {owner for rule in DERIVED.values() for owner in rule.owners} | {"qk_norm"}
"""Fields whose assignment is followed by a look at the derived ones; `qk_norm` decides the tensor-parallel plan."""


def _same(value: Any, other: Any) -> bool:
    # A power may differ in its last digit on the machine that wrote a file.
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other)
    return value == other


def recognised(fields: Fields) -> Fields:
    """What a config that does not say so has presumably derived, i.e. every value that is as its rule has it. Files
    of versions before `derived_fields` are read so: each field keeps its value, and what differs counts as set."""
    return {
        name: fields[name]
        for name, rule in DERIVED.items()
        if fields.get(name) is not None and _same(fields[name], rule.value(fields))
    }


def derive(fields: Fields, derived: Fields) -> Fields:
    """Fills in each derived field that is None or still has its value in `derived`.

    Args:
        fields: `vars(config)`, changed in place.
        derived: what was filled in before; not changed, since copies of a config share it.

    Returns:
        What is filled in now, by name.
    """
    found = {}
    for name, rule in DERIVED.items():
        value = fields.get(name)
        if value is not None and (name not in derived or derived[name] != value):
            continue
        follows = rule.value(fields)
        if not _same(value, follows):
            fields[name] = follows
        if follows is not None:
            found[name] = copy.copy(fields[name])
    return found


def tensor_parallel_plan(mlp_type: str, qk_norm: bool) -> dict[str, str]:
    """How each projection is cut over ranks, by module name."""
    plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v")}
    plan |= {"layers.*.self_attn.o_proj": "rowwise"}
    plan |= {f"layers.*.mlp.{name}": style for name, style in MLP_PLANS[mlp_type].items()}
    if qk_norm:
        # One weight for all heads: a rank's gradient comes from its own heads only.
        plan |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
    return plan


OWN_PLANS = [tensor_parallel_plan(mlp_type, qk_norm) for mlp_type in MLP_PLANS for qk_norm in (True, False)]


def followed_plan(plan: dict[str, str] | None, fields: Fields) -> dict[str, str] | None:
    """The plan of these fields in the place of one made here; one of the user's own stays, or none."""
    if not isinstance(plan, dict):
        return plan
    # transformers 5.17 adds the embedding of tied models to it.
    added = {name: style for name, style in plan.items() if name == "embed_tokens"}
    if {name: style for name, style in plan.items() if name not in added} not in OWN_PLANS:
        return plan
    return tensor_parallel_plan(fields["mlp_type"], fields["qk_norm"]) | added
