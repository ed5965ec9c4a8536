"""What the fields of normalisation and residual wiring mean together."""

from types import SimpleNamespace
from typing import Any

NORM_OWNERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("deepnorm_alpha", "deepnorm_beta"), ("norm_placement", ("deepnorm",))),
    "num_parallel_norms": ("parallel_residual", (True,)),
}


def norm_conflicts(config: SimpleNamespace) -> list[tuple[bool, str]]:
    """Pairs of (is it so, what is wrong and the way out), from a config's fields."""
    return [
        (
            config.norm_type == "rmsnorm" and bool(config.norm_bias),
            "`norm_bias=True` and `norm_type='rmsnorm'`: RMSNorm has no bias; set `norm_type='layernorm'` or "
            "leave `norm_bias` out",
        ),
        (
            config.norm_head and config.tie_word_embeddings,
            "`norm_head=True` and `tie_word_embeddings=True`: a head that is normalised cannot share the "
            "embedding; untie one of them",
        ),
        (
            config.parallel_residual and config.norm_placement != "pre",
            f"`parallel_residual=True` and `norm_placement={config.norm_placement!r}`: parallel blocks are "
            "pre-norm; set `norm_placement='pre'` or `parallel_residual=False`",
        ),
        (
            config.scale_residual_init and config.norm_placement == "deepnorm",
            "`scale_residual_init=True` and `norm_placement='deepnorm'`: DeepNorm initialises these weights "
            "itself; leave `scale_residual_init` out or set `deepnorm_beta`",
        ),
    ]
