"""What the fields of the feed-forward mean together: defaults of a mixture of experts, contradictions, plans."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers.activations import ACT2FN

GATED_MLPS = ("glu", "moe")
GATED_ACTS = ("gtu", "bilinear")

MOE_DEFAULTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
"""What these fields are with `mlp_type="moe"` if left out. Elsewhere they are 0: other libraries tell by them whether
a model has experts, and whether its loss has a part for the router."""

FEED_FORWARD_OWNERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "mlp_bias": ("mlp_type", ("glu", "mlp")),
    **dict.fromkeys((*MOE_DEFAULTS, "router_jitter_noise", "output_router_logits"), ("mlp_type", ("moe",))),
}

MLP_PLANS = {
    "mlp": {"up_proj": "colwise", "down_proj": "rowwise"},
    "glu": {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"},
    # Each rank has a part of every expert, and the whole router, as Mixtral's have.
    "moe": {"experts.gate_up_proj": "packed_colwise", "experts.down_proj": "rowwise", "experts": "moe_tp_experts"},
}
"""How the modules of each feed-forward are cut over the ranks of tensor parallelism."""


def _intermediate_size(fields: dict[str, Any]) -> int:
    gated_size = -(-8 * fields["hidden_size"] // (3 * 256)) * 256
    return gated_size if fields["mlp_type"] in GATED_MLPS else 4 * fields["hidden_size"]


def _of_experts(value: float) -> Callable[[dict[str, Any]], float]:
    return lambda fields: value if fields["mlp_type"] == "moe" else 0


FEED_FORWARD_RULES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Any]]] = {
    "intermediate_size": (("hidden_size", "mlp_type"), _intermediate_size),
    **{name: (("mlp_type",), _of_experts(value)) for name, value in MOE_DEFAULTS.items()},
}
"""Derived fields of the feed-forward: the fields that decide each, and its value from a config's fields by name."""


def feed_forward_conflicts(config: SimpleNamespace) -> list[tuple[bool, str]]:
    """Pairs of (is it so, what is wrong and the way out), from a config's fields."""
    gated_act = config.hidden_act in GATED_ACTS
    return [
        (
            config.hidden_act not in ACT2FN and not gated_act,
            f"`hidden_act={config.hidden_act!r}` is unknown: use a name in transformers' ACT2FN, "
            f"or, with `mlp_type='glu'` or 'moe', one of {GATED_ACTS}",
        ),
        (
            gated_act and config.mlp_type not in GATED_MLPS,
            f"`hidden_act={config.hidden_act!r}` is a gate and `mlp_type={config.mlp_type!r}` has none: "
            "set `mlp_type='glu'` or 'moe', or another `hidden_act`",
        ),
        (
            config.mlp_type == "moe" and not 1 <= config.num_experts_per_tok <= config.num_local_experts,
            f"`num_experts_per_tok={config.num_experts_per_tok}` must lie between 1 and "
            f"`num_local_experts={config.num_local_experts}`: a token goes through some of the experts",
        ),
        (
            not 0 <= config.router_aux_loss_coef < math.inf,
            f"`router_aux_loss_coef={config.router_aux_loss_coef}` must be finite and not negative",
        ),
    ]
