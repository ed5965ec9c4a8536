"""Which attention back end can honour which variant, where: one table, consulted by every way of choosing one.

A combination that is not refused here equals the naive reference in outputs and gradients; everything else raises.
"""

from typing import NamedTuple

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.rotary import follows_length

DIRECTIONS = ("forward", "backward", "generate")

FLEX_CPU_REASON = (
    "flex attention on CPU is forward-only: torch has no CPU backward for it, and one-token steps do not compile; "
    "use 'sdpa' or 'eager', or a CUDA device"
)
FLASH_REASON = "flash attention kernels take lengths, not masks or biases; use 'sdpa', 'flex_attention' or 'eager'"
OTHER_REASON = "a back end that MiniLLM does not know computes plain causal attention only; use 'sdpa' or 'eager'"
ENGINE_REASON = (
    "an engine that runs many requests in one row over a paged cache (vLLM, SGLang, continuous batching) computes "
    "plain causal attention only; use `generate()` with 'sdpa' or 'eager', or `transformers serve` without "
    "`--continuous-batching`"
)
ENGINE_LENGTH_REASON = (
    "in an engine that runs many requests in one row over a paged cache (vLLM, SGLang, continuous batching) RoPE "
    "cannot follow the length of each text; use `generate()` with 'sdpa' or 'eager'"
)
FLASH_CPU_REASON = "flash attention kernels need a CUDA device"
FLEX_DROPOUT_REASON = (
    "flex attention has no dropout on probabilities; set `attention_dropout=0.0` or use 'sdpa' or 'eager'"
)


class Refusal(NamedTuple):
    """One row: the feature of a variant, the kind of back end, the device type and the direction ('*' is any)."""

    feature: str
    kind: str
    device: str
    direction: str
    reason: str


REFUSALS = (
    *(Refusal(feature, "flash", "*", "*", FLASH_REASON) for feature in ("prefix", "bias", "documents")),
    *(
        Refusal(feature, "other", "*", "*", OTHER_REASON)
        for feature in ("prefix", "bidirectional", "bias", "window", "documents")
    ),
    *(
        Refusal(feature, "engine", "*", "*", ENGINE_REASON)
        for feature in ("prefix", "bidirectional", "bias", "window", "documents")
    ),
    Refusal("rope_by_length", "engine", "*", "*", ENGINE_LENGTH_REASON),
    Refusal("any", "flash", "cpu", "*", FLASH_CPU_REASON),
    Refusal("any", "flex", "cpu", "backward", FLEX_CPU_REASON),
    Refusal("any", "flex", "cpu", "generate", FLEX_CPU_REASON),
    Refusal("dropout", "flex", "*", "backward", FLEX_DROPOUT_REASON),
)

BLOCKS = "minillm_blocks"
"""The name of attention in blocks for any model; MiniLLM itself has blocks under "sdpa" too."""

REFUSED_KINDS = frozenset(row.kind for row in REFUSALS)

KINDS = {
    "eager": "eager",
    "sdpa": "sdpa",
    BLOCKS: "sdpa",
    "flex_attention": "flex",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "flash_attention_4": "flash",
    "vllm": "engine",
    "sglang": "engine",
    "paged": "engine",
}


def kind_of(implementation: str | None) -> str:
    """The kind of a back end by its name: eager, sdpa, flex, flash, other, or engine.

    An engine keeps the requests that it lays in one row apart by itself: restarting positions are no packing there.
    transformers' continuous batching calls its back ends `paged|eager` and the like.
    """
    return KINDS.get((implementation or "sdpa").split("|")[0], "other")


def features_of(config: MiniLLMConfig) -> frozenset[str]:
    """What a variant asks of a back end beyond plain causal attention."""
    # Not read by name from the config itself, which takes transformers three function calls for each, in each forward.
    fields = vars(config)
    wanted = {
        "any": True,
        "prefix": fields["attention_type"] == "prefix",
        "bidirectional": fields["attention_type"] == "bidirectional",
        "bias": fields["position_embedding_type"] in ("alibi", "sandwich"),
        "window": fields["sliding_window"] is not None,
        "dropout": fields["attention_dropout"] > 0,
        "rope_by_length": follows_length(config),
    }
    return frozenset(name for name, on in wanted.items() if on)


def refusal(
    config: MiniLLMConfig,
    implementation: str | None,
    device: str = "*",
    direction: str = "*",
    extra_features: tuple[str, ...] = (),
) -> str | None:
    """Why a back end cannot honour a variant, or None if it can.

    Args:
        config: the variant.
        implementation: name of the back end, e.g. `"sdpa"`; None is the default, `"sdpa"`.
        device: device type such as `"cpu"` or `"cuda"`; `"*"` asks for refusals that hold on every device.
        direction: `"forward"`, `"backward"`, `"generate"` or `"*"` for refusals that hold in every direction.
        extra_features: features of the call rather than of the config, e.g. `("documents",)`.
    """
    kind = kind_of(implementation)
    if kind not in REFUSED_KINDS:
        return None
    features = features_of(config).union(extra_features)
    for row in REFUSALS:
        applies = row.kind == kind and row.device in ("*", device) and row.direction in ("*", direction)
        if applies and row.feature in features:
            return row.reason
    return None


def check(
    config: MiniLLMConfig,
    implementation: str | None,
    device: str = "*",
    direction: str = "*",
    extra_features: tuple[str, ...] = (),
) -> None:
    """Raises ValueError, with the reason and the way out, where `refusal` finds one."""
    reason = refusal(config, implementation, device, direction, extra_features)
    if reason is not None:
        features = sorted(features_of(config).union(extra_features) - {"any"}) or ["plain causal"]
        raise ValueError(
            f"attn_implementation={implementation!r} cannot serve this model ({', '.join(features)}"
            f"{'' if device == '*' else f', on {device}'}{'' if direction == '*' else f', {direction}'}): {reason}"
        )
