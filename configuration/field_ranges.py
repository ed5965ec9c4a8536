"""Ranges of single fields, and fields that say nothing without a certain value of another."""

import math
from typing import Any

from minillm.configuration.attention_fields import ATTENTION_OWNERS
from minillm.configuration.feed_forward_fields import FEED_FORWARD_OWNERS, MOE_DEFAULTS
from minillm.configuration.norm_fields import NORM_OWNERS

FIELD_OWNERS = {**ATTENTION_OWNERS, **NORM_OWNERS, **FEED_FORWARD_OWNERS}
"""Fields that say something only under certain values of another field: set anywhere else they are refused."""

POSITIVE_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "max_position_embeddings sliding_window position_table_size sandwich_dim norm_eps deepnorm_alpha "
    "deepnorm_beta alibi_scale alibi_bias_max initializer_range"
).split()
MOST_LAYERS = 10_000
"""Ten times the deepest Transformers that were trained (DeepNet, arXiv 2203.00555): to build more takes minutes."""
TABLES = (
    ("vocab_size", "hidden_size"),
    ("position_table_size", "hidden_size"),
    ("hidden_size", "intermediate_size", "num_local_experts"),
    ("hidden_size", "num_attention_heads", "head_dim"),
)
"""The sides of the weights."""
MOST_ELEMENTS = 2**59

UNIT_INTERVAL_FIELDS = (
    "attention_dropout hidden_dropout embedding_dropout embedding_gradient_scale router_jitter_noise".split()
)


def check_ranges(fields: dict[str, Any]) -> None:
    """Raises ValueError for a number out of its range."""
    for name in POSITIVE_FIELDS:
        value = fields[name]
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}={value}` must be positive and finite")
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"`{name}={value}` is no 64-bit number: give a smaller one or leave it out")
    if fields["num_hidden_layers"] > MOST_LAYERS:
        raise ValueError(f"`num_hidden_layers={fields['num_hidden_layers']}` must be at most {MOST_LAYERS:,}")
    for names in TABLES:
        if math.prod(fields[name] or 1 for name in names) > MOST_ELEMENTS:
            sides = ", ".join(f"`{name}={fields[name]}`" for name in names)
            raise ValueError(f"{sides}: no computer holds a weight with these sides")
    for name in UNIT_INTERVAL_FIELDS:
        if not 0 <= fields[name] <= 1:
            raise ValueError(f"`{name}={fields[name]}` must lie between 0 and 1")


def check_owners(fields: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises ValueError for a field that is set where its owner gives it no meaning."""
    for name, (owner, values) in FIELD_OWNERS.items():
        nothing = (defaults[name].default, *((0,) if name in MOE_DEFAULTS else ()))
        if fields[name] not in nothing and fields[owner] not in values:
            raise ValueError(
                f"`{name}={fields[name]!r}` has no meaning with `{owner}={fields[owner]!r}`: "
                f"leave `{name}` out or set `{owner}` to {' or '.join(repr(value) for value in values)}"
            )
