"""`attn_implementation="minillm_blocks"`: attention in blocks on CPU for every model of transformers, under a mask
made from the predicate that transformers hands over.

Shapes: B batch, H heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from minillm.blocked_attention import Block, BlockedMask, block_size, blocked_attention_forward
from minillm.capabilities import BLOCKS
from minillm.checks import is_transformed, require
from minillm.tuning import tuning

HARMLESS_KEYWORDS = frozenset(
    # What calls and models hand down to attention that changes no score: it is read elsewhere, by the loss for one, is
    # in the mask already, or is for kernels that take lengths instead of a mask.
    "sliding_window is_causal position_ids cache_position past_key_values cache use_cache layer_idx "
    "output_hidden_states output_router_logits return_dict use_return_dict return_loss labels shift_labels "
    "ignore_index reduction num_items_in_batch logits_to_keep token_type_ids mm_token_type_ids completion_mask "
    "assistant_masks length seq_lengths seq_idx cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k deterministic "
    "target_dtype".split()
)


def attention_of_any_model(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockedMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, in blocks under a mask that `blocked_attention_mask` made for them, else by SDPA.
    An attention function of transformers' form.

    Args:
        query: [B, H, queries, head_dim]; `key` and `value`: [B, key/value heads, keys, head_dim].
        attention_mask: a mask in blocks, or whatever SDPA takes.

    Returns:
        The output [B, queries, H, head_dim], and None.

    Raises:
        ValueError: for a model that SDPA cannot serve; for a keyword that may change scores, such as `softcap`; and
            where `position_ids` restart but the mask lets a document see the one before (in a traced graph a
            RuntimeError when it runs).
    """
    check_model(getattr(module, "config", None))
    check_keywords(module, kwargs)
    check_documents(module, query, key, attention_mask, kwargs.get("position_ids"))
    attend: Callable = blocked_attention_forward if isinstance(attention_mask, BlockedMask) else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def check_keywords(module: nn.Module, keywords: dict[str, Any]) -> None:
    """Refuses what may change scores or is asked for in vain."""
    if keywords.keys() <= HARMLESS_KEYWORDS:
        return
    for name, value in keywords.items():
        if value is None or name in HARMLESS_KEYWORDS:
            continue
        if name == "output_attentions":
            if value:
                raise ValueError(f"attn_implementation={BLOCKS!r} keeps no probabilities for `{name}`: use 'eager'")
            continue
        raise ValueError(
            f"{type(module).__name__} hands `{name}` to attention, which attn_implementation={BLOCKS!r} cannot "
            "honour: use the model's default back end or 'eager', or leave it out if it comes from your own call"
        )


def check_documents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: BlockedMask | torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Refuses packed documents that the mask lets see each other: transformers looks for them only where neither a
    cache nor an `attention_mask` is given, and not in every model.

    Args:
        position_ids: [B or 1, length]; or of several axes [axes, B, length], the first of texts or time.
    """
    if position_ids is None or query.shape[2] == 1:
        return
    positions = position_ids[0] if position_ids.ndim == 3 else position_ids
    if positions.ndim != 2 or positions.device.type == "meta" or is_transformed():
        return
    length, is_traced = positions.shape[1], is_tracing(query)
    if not query.shape[2] == key.shape[2] == length:
        return
    if is_traced and getattr(module, "layer_idx", None):
        # All layers get the same: one assertion is enough in a graph.
        return
    if isinstance(mask, BlockedMask) and (mask.is_checked or is_traced):
        return
    # Where positions fall, or count from 0 again; [B or 1, length - 1], of the tokens behind the first. Times may
    # stand still at 0, as those of an image.
    begins = positions[:, 1:] < positions[:, :-1]
    if position_ids.ndim == 2:
        begins = begins | ((positions[:, 1:] == 0) & F.pad(positions[:, 2:] == 1, (0, 1)))
    if not is_traced and not begins.any():
        return
    message = (
        "`position_ids` restart, as in packed documents, but the mask lets these see each other: transformers keeps "
        "them apart only without a cache and a mask (pass `use_cache=False` and no `attention_mask`), and not in "
        f"every model ({type(module).__name__} here)"
    )
    # Whether a document's first token sees the one before it; padding, whose position is 0 too, may, but not itself.
    if mask is None:
        require(~begins, message)
    elif isinstance(mask, BlockedMask):
        for at in begins.any(0).nonzero().flatten().tolist():
            seen = mask.visible(Block(slice(at + 1, at + 2), slice(at, at + 2)))[:, 0, 0].all(-1)
            require(~(seen & begins[:, at]), message)
        mask.is_checked = True
    elif mask.dtype == torch.bool and mask.shape[-2:] == (length, length):
        # An additive mask is the caller's own, who knows.
        seen = mask.diagonal(-1, -2, -1) & mask.diagonal(0, -2, -1)[..., 1:]
        require(~(seen.any(1) & begins), message)


def blocked_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | BlockedMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> BlockedMask | torch.Tensor | None:
    """The mask for `attention_of_any_model`: in blocks where these pay off, else that of SDPA. A mask function of
    transformers' form, with the arguments of its `sdpa_mask`.

    Args:
        mask_function: predicate over indices (batch, head, query, key), any of which is a tensor that broadcasts.
        attention_mask: boolean [B, kv_length], False at padding; or a mask in blocks, which is given back.

    Returns:
        A `BlockedMask` or a boolean tensor, [B, 1, q_length, kv_length], or None for plain causal or full attention.

    Raises:
        ValueError: for a model (by its `config` among the keywords) that SDPA cannot serve.
    """
    check_model(kwargs.get("config"))
    if isinstance(attention_mask, BlockedMask):
        # `generate()` makes the masks of a static cache itself, and hands them to the model as its `attention_mask`.
        return attention_mask
    is_open = allow_is_causal_skip or allow_is_bidirectional_skip
    is_open = is_open and (local_size is None or kv_length < local_size)
    is_long = is_square(q_length, kv_length, q_offset, kv_offset) and q_length > tuning.any_model_blocks_from
    if is_long and not use_vmap and runs_on(device):
        # Where no mask is needed SDPA has its own way, as it has for a mask without padding.
        padding = None if attention_mask is None or attention_mask.all() else attention_mask
        fits = padding is None or padding.shape[-1] == kv_length
        if fits and not (is_open and padding is None):
            return BlockedMask(
                batch_size, kv_length, predicate_of_blocks(batch_size, kv_length, mask_function, padding)
            )
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]: it takes a tensor too
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def check_model(config: PreTrainedConfig | None) -> None:
    """Refuses models that would misread a mask of SDPA, or be misread by SDPA."""
    if config is not None and not is_served_by_sdpa(type(config)):
        raise ValueError(
            f"attn_implementation={BLOCKS!r} cannot serve the model of {type(config).__name__}, as 'sdpa' cannot: it "
            "computes attention by itself, or in a way of its own; use 'eager'"
        )


@torch.compiler.assume_constant_result
def is_served_by_sdpa(config_class: type) -> bool:
    """Whether a model of this config says so, and leaves attention to functions of transformers' form. Older ones add
    the mask to their scores: a boolean one, or None, would be wrong there in silence."""
    return _is_served_by_sdpa(config_class)


# Beneath a name of its own, since a compiler that looks into a call of a cache warns.
@functools.cache
def _is_served_by_sdpa(config_class: type) -> bool:
    found, classes = [], [PreTrainedModel]
    while classes:
        each = classes.pop()
        classes += each.__subclasses__()
        if each.config_class is config_class:
            found.append(each)
    return not found or any(each._supports_sdpa and each._can_set_attn_implementation() for each in found)


def is_square(q_length: int, kv_length: int, q_offset: int | torch.Tensor, kv_offset: int) -> bool:
    """Whether the keys are the new tokens. A cache of fixed size counts on the device, and is not asked."""
    return q_length == kv_length and not isinstance(q_offset, torch.Tensor) and q_offset == kv_offset == 0


def runs_on(device: torch.device | str) -> bool:
    """Whether this is eager mode on CPU."""
    probe = torch.empty(0, device=device)
    return probe.device.type == "cpu" and not is_tracing(probe) and not is_transformed()


def predicate_of_blocks(
    batch_size: int, length: int, mask_function: Callable, padding: torch.Tensor | None
) -> Callable[[Block], torch.Tensor]:
    """The mask of a block, boolean [B or 1, 1, queries, keys], with padding [B, length] in it. A query that sees no
    key at all, as one of padding on the left, sees itself."""
    # Blocks may be made anew in the backward pass, when the caller has filled the buffer for the next batch.
    padding = None if padding is None else padding.clone()
    rows, head = torch.arange(batch_size)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.int64)

    def visible(block: Block) -> torch.Tensor:
        queries, keys = (torch.arange(part.start, part.stop)[None, None] for part in block)
        queries, keys = queries[..., None], keys[..., None, :]
        seen = mask_function(rows, head, queries, keys)
        if padding is not None:
            seen = seen & padding[:, None, None, block.keys]
        seen = seen.expand(-1, 1, queries.shape[2], keys.shape[3])
        return seen if blind is None else seen | (blind[:, None, block.queries, None] & (queries == keys))

    blind = None
    if padding is not None:
        found = torch.zeros(batch_size, length, dtype=torch.bool)
        for start in range(0, length, block_size(length)):
            queries = slice(start, min(length, start + block_size(length)))
            if not padding[:, queries].all():
                found[:, queries] = ~visible(Block(queries, slice(0, length)))[:, 0].any(-1)
        blind = found
    return visible


def register() -> None:
    """Makes attention in blocks known to transformers, as `attn_implementation="minillm_blocks"`."""
    AttentionInterface.register(BLOCKS, attention_of_any_model)
    AttentionMaskInterface.register(BLOCKS, blocked_attention_mask)
