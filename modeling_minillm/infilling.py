"""GLM's inputs: which tokens are context, and where each stands on the two position axes (arXiv 2103.10360)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class GLMInputs(NamedTuple):
    """Inputs of `forward` and `generate()`, all int64 [batch, length]; unpack them with `**inputs._asdict()`."""

    position_ids: torch.Tensor
    block_position_ids: torch.Tensor
    prefix_mask: torch.Tensor


def glm_inputs(
    input_ids: torch.Tensor,
    mask_token_ids: Sequence[int],
    sop_token_id: int,
    attention_mask: torch.Tensor | None = None,
    counting_token_ids: Sequence[int] = (),
) -> GLMInputs:
    """The prefix and both position axes of a context with a blank, a start token, and what fills the blank.

    The context, all before the first start token, is the bidirectional prefix; its first axis counts (from the first
    real token), its second is 0. From the start token on the first axis is where the blank stands, and the second
    counts 1, 2, ...

    Args:
        input_ids: [batch, length]; every row has a blank in its context, then a start token.
        mask_token_ids: ids that mark a blank, e.g. of `[gMASK]` and `[MASK]`. Of several in a row the one named first
            here is filled, at its first place.
        sop_token_id: id of the start token.
        attention_mask: [batch, length], 0 at padding, on the left or between a context and its start token.
        counting_token_ids: blanks after which the first axis goes on counting (`[gMASK]` in GLM-130B and in
            ChatGLM-6B's first release).

    Raises:
        ValueError: a row without start token, or without a blank before it.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    slots = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = (input_ids == sop_token_id) & real
    if not bool(starts.any(-1).all()):
        raise ValueError(f"`input_ids` row {row_without(starts)} holds no start token (`sop_token_id={sop_token_id}`)")
    start = starts.long().argmax(-1, keepdim=True)
    context = (slots < start) & real
    blank, counting = torch.full_like(start, -1), torch.zeros_like(start, dtype=torch.bool)
    for token_id in mask_token_ids:
        here = (input_ids == token_id) & context
        chosen = here.any(-1, keepdim=True) & (blank < 0)
        blank = torch.where(chosen, here.long().argmax(-1, keepdim=True), blank)
        counting |= chosen & (token_id in counting_token_ids)
    if bool((blank < 0).any()):
        raise ValueError(
            f"`input_ids` row {row_without(blank >= 0)} has no blank (`mask_token_ids={list(mask_token_ids)}`) before "
            "its start token"
        )
    first = real.long().argmax(-1, keepdim=True)
    index, inside = (slots - first).clamp(min=0), slots >= start
    return GLMInputs(
        position_ids=torch.where(inside & ~counting, blank - first, index),
        block_position_ids=torch.where(inside, slots - start + 1, 0),
        prefix_mask=context.long(),
    )


def row_without(found: torch.Tensor) -> int:
    """The first row of a boolean tensor [batch, n] that holds no True."""
    return int((~found.any(-1)).long().argmax())


def continue_positions(
    position_ids: torch.Tensor, block_position_ids: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both axes [batch, prompt] of a prompt, gone on to `total` tokens: the first as its last two tokens do (standing
    still or counting), the second by counting where it has begun."""
    more = torch.arange(1, total - position_ids.shape[1] + 1, device=position_ids.device)
    step = (position_ids[:, -1:] - position_ids[:, -2:-1] == 1).long() if position_ids.shape[1] > 1 else 1
    first = torch.cat((position_ids, position_ids[:, -1:] + more * step), dim=-1)
    begun = (block_position_ids[:, -1:] > 0).long()
    return first, torch.cat((block_position_ids, block_position_ids[:, -1:] + more * begun), dim=-1)
