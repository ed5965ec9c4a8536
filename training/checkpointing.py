"""Which results of a checkpointed layer are kept, in place of being computed anew in the backward pass."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
MATRIX_PRODUCTS = ("mm", "addmm", "bmm")
KEPT = {"attention": ATTENTION, "matmul": (*ATTENTION, *MATRIX_PRODUCTS)}


def _policy(operators: tuple[str, ...], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.__name__.split(".")[0] if hasattr(operator, "__name__") else str(operator)
    return CheckpointPolicy.MUST_SAVE if name in operators else CheckpointPolicy.PREFER_RECOMPUTE


def selective_checkpointing(keep: str = "attention") -> dict[str, Any]:
    """`gradient_checkpointing_kwargs` that keep some results of each layer, for `model.gradient_checkpointing_enable`
    and `TrainingArguments`; transformers 5.24 calls all three `activation_checkpointing...`.

    Args:
        keep: `"attention"`, what attention returns: of all that a layer computes the dearest to make anew for its size
            (arXiv 2205.05198, section 4). `"matmul"`, the results of all matrix products too, so that only cheap
            elementwise work is done twice.

    Raises:
        ValueError: for another `keep`.
    """
    if keep not in KEPT:
        raise ValueError(f"`keep={keep!r}`: choose {' or '.join(map(repr, KEPT))}")
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, KEPT[keep]))
    return {"use_reentrant": False, "context_fn": contexts}
