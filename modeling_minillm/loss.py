"""Losses: cross-entropy without the full logits, and the load-balancing loss of a mixture of experts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.fused_loss import liger_cross_entropy, uses_liger
from minillm.head import NormHead, why_not_read
from minillm.tuning import tuning

RouterLogits = tuple[torch.Tensor, ...]


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    chunk: int,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The sum of cross-entropies, and its gradients by hidden states, weight and bias where `needed`, else None."""
    needs_hidden, needs_weight, needs_bias = needed
    of_hidden = torch.empty_like(hidden) if needs_hidden else None
    # Sums of many chunks in half precision would lose what each of them adds.
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    of_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if needs_bias else None
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk):
        rows, targets = hidden[start : start + chunk], target[start : start + chunk, None]
        logits = F.linear(rows, weight, bias).float()
        scored = targets != ignore_index
        targets = targets.where(scored, 0)
        normalizer = logits.logsumexp(-1, keepdim=True)
        total = total + ((normalizer - logits.gather(1, targets)) * scored).sum()
        if not any(needed):
            continue
        gradient = logits.sub_(normalizer).exp_()
        gradient.scatter_add_(1, targets, gradient.new_full((), -1.0).expand_as(targets))
        gradient.mul_(scored)
        if of_bias is not None:
            of_bias += gradient.sum(0)
        gradient = gradient.to(hidden.dtype)
        if of_hidden is not None:
            of_hidden[start : start + chunk] = gradient @ weight
        if of_weight is not None and of_weight.dtype == gradient.dtype:
            of_weight.addmm_(gradient.T, rows)
        elif of_weight is not None:
            of_weight += gradient.T @ rows
    return total, of_hidden, of_weight, of_bias


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T + bias`, whose gradients are made chunk by chunk in the forward
    pass: backward only scales them, and no logits outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        ignore_index: int,
        chunk: int | None,
    ) -> torch.Tensor:
        types = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            # Once here, and not once a chunk.
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        function = chunked_cross_entropy
        if chunk is None:
            alive = tuning.chunk_logits
            chunk = max(1, alive.get(hidden.device.type, alive["cuda"]) // weight.shape[0])
            function = liger_cross_entropy if uses_liger(hidden, weight) else function
        total, *gradients = function(hidden, weight, bias, target, ignore_index, chunk, ctx.needs_input_grad[:3])
        ctx.save_for_backward(
            *(None if each is None else each.to(dtype) for each, dtype in zip(gradients, types, strict=True))
        )
        return total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: torch's is typed for any number
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("gradients of gradients of a loss without logits: pass `skip_logits=False`")
        scaled = (None if saved is None else saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*scaled, None, None, None)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> torch.Tensor:
    """The sum over tokens of the cross-entropy of `hidden @ weight.T + bias`, with few logits alive at once.

    The arithmetic is that of the plain loss: nothing is computed twice. Gradients of gradients are refused. On CUDA it
    is done by Liger's kernel where that is installed (`minillm.fused_loss`).

    Args:
        hidden: [tokens, hidden].
        weight: [vocabulary, hidden]; `bias`: [vocabulary] or None.
        target: [tokens] token ids, `ignore_index` where nothing is predicted.
        chunk: tokens whose logits are alive at once, by torch alone; None: as many as suit the device.

    Returns:
        A float32 scalar.
    """
    if not torch.is_grad_enabled():
        # Else leaves would get gradients all the same, made in the forward pass and thrown away.
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return LinearCrossEntropy.apply(hidden, weight, bias, target, ignore_index, chunk)


def causal_lm_loss(
    hidden_states: torch.Tensor,
    head: nn.Linear | NormHead,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """What transformers' `ForCausalLMLoss` computes from logits, from the states [batch, Q, hidden] before the head.

    Args:
        labels: [batch, Q]; position t - 1 predicts `labels[t]`.
        num_items_in_batch: what the sum is divided by, in place of the number of labels in this batch.
        shift_labels: [batch, Q] labels that are shifted already, in place of `labels`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    target = shift_labels.reshape(-1).to(hidden_states.device)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    total = linear_cross_entropy(hidden, head.weight, target, head.bias, ignore_index)
    if num_items_in_batch is None:
        count = (target != ignore_index).sum()
        # With nothing to score the mean is no number, as a mean of losses; but its gradients are 0, and not NaN.
        return total / count.clamp(min=1) + torch.where(count > 0, 0.0, torch.nan)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def why_logits(model: PreTrainedModel) -> str | None:
    """Why the loss of this model has to be made from logits, or None if it need not."""
    if model.loss_function is not ForCausalLMLoss:
        return "the loss function was replaced by one that reads logits"
    return why_not_read(model.lm_head)


def skips_logits(
    model: PreTrainedModel, wanted: bool | None, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor
) -> bool:
    """Whether the loss is computed without logits: as `wanted`; if that is None, in training as the config wants.

    Raises:
        ValueError: if it was asked for and cannot be.
    """
    asked = "`skip_logits=True`"
    if not isinstance(wanted, bool | None):
        raise ValueError(f"`skip_logits={wanted!r}` must be True, False or None (as the config says)")
    if wanted is None:
        wanted = model.config.skip_logits and model.training and labels is not None
        asked += " in the config"
    if not wanted:
        return False
    reason = why_logits(model)
    if labels is None:
        reason = "without `labels` there is nothing else to compute"
    elif isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0:
        reason = "`logits_to_keep` asks for some"
    if reason is not None:
        raise ValueError(f"{asked}, but {reason}: set it to False")
    return True


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
