"""The load-balancing loss of a mixture of experts, and how it joins the loss of the text."""

from typing import Any

import torch
from transformers.utils import ModelOutput

from minillm.configuration.configuration_minillm import MiniLLMConfig

RouterLogits = tuple[torch.Tensor, ...]


def load_balancing_loss(
    router_logits: RouterLogits, experts_per_token: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """How unevenly tokens are spread over experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6; the form
    for more than one expert a token, and over all layers at once, is that of transformers' Mixtral).

    Args:
        router_logits: one tensor [batch * Q, experts] a layer.
        experts_per_token: how many experts a token goes through.
        attention_mask: [batch, cached + Q], nonzero at the tokens that count; all of them count without it, or with a
            4D mask, which does not say what is padding.

    Returns:
        A float32 scalar: `experts_per_token` if all experts are used alike, more if not; 0 if no token counts.
    """
    rows, experts = router_logits[0].shape
    device = router_logits[0].device
    counts = torch.ones(rows, device=device)
    if attention_mask is not None and attention_mask.ndim == 2:
        new = rows // attention_mask.shape[0]
        counts = (attention_mask[:, -new:] != 0).to(device, torch.float32).reshape(rows)
    assigned = probability = torch.zeros(experts, device=device)
    for logits in router_logits:
        probabilities = logits.to(device).float().softmax(-1)
        chosen = probabilities.topk(experts_per_token, dim=-1).indices
        assigned = assigned.scatter_add(0, chosen.flatten(), counts.repeat_interleave(experts_per_token))
        probability = probability + (probabilities * counts[:, None]).sum(0)
    total = (len(router_logits) * counts.sum()).clamp(min=1)
    return experts * (assigned / total * (probability / total)).sum()


def join_router_loss(
    config: MiniLLMConfig,
    loss: torch.Tensor | None,
    outputs: ModelOutput,
    attention_mask: torch.Tensor | None,
    checkpointing: bool,
) -> dict[str, Any]:
    """The loss, and what a model with recorded router logits returns beside it.

    Args:
        config: says how many experts a token takes, and the weight of the load-balancing loss.
        loss: of the text, or None without labels.
        outputs: of the base model, with `router_logits` if they were asked for.
        attention_mask: as for `load_balancing_loss`.
        checkpointing: whether layers are computed anew in the backward pass.

    Raises:
        ValueError: if reentrant gradient checkpointing has cut the router off from its gradient.
    """
    router_logits = getattr(outputs, "router_logits", None)
    if router_logits is None:
        return {"loss": loss}
    auxiliary = load_balancing_loss(router_logits, config.num_experts_per_tok, attention_mask)
    if loss is not None:
        if checkpointing and loss.requires_grad and not auxiliary.requires_grad:
            raise ValueError(
                "`output_router_logits=True` with reentrant gradient checkpointing: the load-balancing loss has no "
                "gradient; set gradient_checkpointing_kwargs={'use_reentrant': False} or `output_router_logits=False`"
            )
        loss = loss + config.router_aux_loss_coef * auxiliary.to(loss.device)
    return {"loss": loss, "aux_loss": auxiliary, "router_logits": router_logits}


def refuse_router_logits(config: MiniLLMConfig, kwargs: dict[str, Any]) -> None:
    """For task heads, whose outputs have no place for router logits and whose loss has none for the router's."""
    if kwargs.get("output_router_logits", config.output_router_logits):
        raise ValueError(
            "`output_router_logits=True` in a task head, whose loss does not train the router: "
            "set `output_router_logits=False` or use MiniLLMForCausalLM"
        )
