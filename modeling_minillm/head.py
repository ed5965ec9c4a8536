"""The output head: a Linear, or one whose rows are normalised (Baichuan 2), and what others may do to that one; and
which positions a head reads."""

import sys
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel

from minillm.checks import check_logits_to_keep
from minillm.configuration.configuration_minillm import MiniLLMConfig

# Who asks a module for its `weight` to get the parameter itself: to shard, move, load or replace it.
PARAMETER_READERS = ("torch.nn.modules.module", "torch.distributed", "transformers.core_model_loading", "accelerate")


class NormHead(nn.Module):
    """Output head whose rows are divided by their length: `h @ normalize(rows).T`, floor 1e-12 (Baichuan 2, `NormHead`
    in its modeling_baichuan.py).

    Parameters, state dict and files hold the rows as they are trained, under the name `weight`. The attribute `weight`
    is what the head computes with, made anew at each reading, so that `h @ head.weight.T` is what the head returns and
    its gradient reaches the rows as trained. Assigning an `nn.Parameter` to it replaces those. Writing into what it
    returned changes nothing: write into `raw_weight`, and freeze by `head.requires_grad_(False)`.

    It is no `nn.Linear`: an adapter or quantiser that takes a Linear for its weight would make another model of it.

    Args:
        in_features: width of the hidden states.
        out_features: number of rows, one a token.
    """

    bias = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # `register_parameter` would find the property in its way.
        self._parameters["weight"] = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight)

    @property
    def raw_weight(self) -> nn.Parameter:
        """The rows [out_features, in_features] as they are trained and saved."""
        return self._parameters["weight"]  # pyright: ignore[reportReturnType]

    @property
    def weight(self) -> torch.Tensor:
        """The rows [out_features, in_features] divided by their lengths, in the dtype of `raw_weight`."""
        # FSDP would train, and save, what it reads here in place of the rows, and nothing but its name tells it apart.
        if not torch.compiler.is_compiling() and is_read_as_parameter(sys._getframe(1)):
            return self.raw_weight
        # In float16 the floor of float32 would be 0, and a row of zeros not a number.
        floor = max(1e-12, torch.finfo(self.raw_weight.dtype).tiny)
        return nn.functional.normalize(self.raw_weight, dim=-1, eps=floor)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight)

    def extra_repr(self) -> str:
        # PEFT quotes it where it refuses an adapter on the head.
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, norm_head=True: `model.fold_norm_head()` makes it a Linear"


def is_read_as_parameter(caller: FrameType) -> bool:
    return caller.f_globals.get("__name__", "").startswith(PARAMETER_READERS)


def build_head(config: MiniLLMConfig) -> nn.Linear | NormHead:
    if config.norm_head:
        return NormHead(config.hidden_size, config.vocab_size)
    return nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def why_not_read(head: nn.Module) -> str | None:
    """Why `hidden_states @ head.weight.T` need not be what this head returns, or None if it is."""
    if type(head) not in (nn.Linear, NormHead):
        return f"the head is a {type(head).__name__}, whose weight is not all that it computes with"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return "the head has hooks"
    if isinstance(head._parameters["weight"], DTensor):
        return "the weight of the head is sharded"
    return None


ModelT = TypeVar("ModelT", bound="MiniLLMHeadMixin")


class MiniLLMHeadMixin(PreTrainedModel):
    """What a language model does about a `NormHead` as its `lm_head`; before `MiniLLMPreTrainedModel` among its
    bases."""

    config: MiniLLMConfig

    def __setattr__(self, name: str, value: Any) -> None:
        # However PEFT makes an adapter, by this it comes into the model.
        if name == "lm_head" and isinstance(value, nn.Module):
            refuse_adapter(value)
        super().__setattr__(name, value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As in transformers.

        Raises:
            ValueError: for a Linear in the place of a `NormHead`.
        """
        if isinstance(self.lm_head, NormHead) and isinstance(new_embeddings, nn.Linear):
            raise ValueError(
                "a Linear as output embeddings of a model with `norm_head=True`, which would be saved as a head that "
                "normalises: call `model.fold_norm_head()` first, or assign the rows, an nn.Parameter, to "
                "`model.lm_head.weight`"
            )
        super().set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        head = self.lm_head
        if not isinstance(head, NormHead):
            return super().resize_token_embeddings(*args, **kwargs)
        # transformers resizes a Linear, from its `weight`: for that time, one that holds the rows as trained.
        self.lm_head = linear_of(head.raw_weight)
        try:
            embeddings = super().resize_token_embeddings(*args, **kwargs)
            head.weight = self.lm_head.weight
            head.out_features = self.lm_head.out_features
        finally:
            self.lm_head = head
        return embeddings

    @torch.no_grad()
    def fold_norm_head(self: ModelT) -> ModelT:
        """Makes the normalised head a plain one: `lm_head` becomes an `nn.Linear` whose weight is the normalised rows,
        and `config.norm_head` False.

        Logits stay exactly as they are. From then on nothing keeps the rows at length 1 in training, and adapters on
        `lm_head` train, merge and reload as on any Linear. A model whose head is plain is left alone.

        Call it before making an optimizer, which would go on with the old rows, and before adding adapters.

        Returns:
            The model itself.

        Raises:
            ValueError: if the head is wrapped, has hooks or is sharded. The model is unchanged then.
        """
        if not self.config.norm_head:
            return self
        reason = why_not_read(self.lm_head)
        if reason is not None:
            raise ValueError(f"`fold_norm_head()`, but {reason}: call it on the model as loaded, on one device")
        head: Any = self.lm_head
        rows = nn.Parameter(head.weight, requires_grad=head.raw_weight.requires_grad)
        self.lm_head = linear_of(rows).train(head.training)
        self.config.norm_head = False
        return self


def linear_of(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def refuse_adapter(head: nn.Module) -> None:
    """Refuses what PEFT builds around a `NormHead` but for a whole copy (`modules_to_save`)."""
    for module in head.modules():
        if isinstance(getattr(module, "base_layer", None), NormHead):
            raise ValueError(
                f"an adapter, {type(module).__name__}, on `lm_head` of a model with `norm_head=True`, which divides "
                "its rows by their lengths: merging would make another model of it. Leave `lm_head` out of the "
                "adapter, train it whole by `modules_to_save=['lm_head']`, or call `model.fold_norm_head()` first"
            )


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states [batch, length, hidden] that `logits_to_keep` names, as transformers understands it."""
    check_logits_to_keep(logits_to_keep, *hidden_states.shape[:2])
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None), :]
    if logits_to_keep.dtype == torch.bool and logits_to_keep.ndim == 2:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.gather(1, logits_to_keep[..., None].long().expand(-1, -1, hidden_states.shape[-1]))
    return hidden_states[:, logits_to_keep if logits_to_keep.dtype == torch.bool else logits_to_keep.long(), :]


def last_real_token(
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor | int:
    """The index [batch] of the last real token of each row of `hidden_states` [batch, Q, hidden].

    A 2D mask [batch, cached + Q] says what is real, since the padding token may be the end token as well. Without one
    it is the last token that is not `pad_token_id`, as in transformers.
    """
    count = hidden_states.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask[:, -count:].to(hidden_states.device) != 0
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids.to(hidden_states.device) != pad_token_id
    elif hidden_states.shape[0] > 1 and pad_token_id is None:
        raise ValueError(
            "a batch of several texts without `attention_mask`, and no `pad_token_id` in the config: pass the mask, "
            "which says where each text ends"
        )
    else:
        return count - 1
    index = torch.arange(count, device=real.device)
    return (index * real).argmax(-1)
