"""Where the prompts of a text are: each is a bidirectional block of its own for a prefix model, answers are causal.

Shapes: B batch, L tokens.
"""

from collections.abc import Sequence

import torch


def previous(values: torch.Tensor, first: int) -> torch.Tensor:
    """The value before each of [B, L], `first` before the first.

    Cut after filling: a graph of any L may not ask whether L - 1 is 1, as comparing `values[:, 1:]` would.
    """
    return torch.nn.functional.pad(values, (1, 0), value=first)[:, :-1]


def running_max(values: torch.Tensor) -> torch.Tensor:
    """The largest of [B, L] up to each, in the order of L."""
    if not torch.compiler.is_exporting():
        return values.cummax(-1).values
    # ONNX has no `cummax`. The order is that of the mask, which an exported graph holds anyway: [B, L, L].
    index = torch.arange(values.shape[1], device=values.device)
    hidden = torch.iinfo(values.dtype).min
    return torch.where(index[:, None] >= index, values[:, None, :], hidden).amax(-1)


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """Where documents [B, L] begin, as booleans, for numbers above the least int64."""
    return document_ids != previous(document_ids, torch.iinfo(torch.int64).min)


def last_before(real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of a boolean mask [B, L]: the index of the last True before it (0 if there is none), and whether
    there is none."""
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = running_max(torch.where(real, index, -1))
    before = previous(last, -1)
    return before.clamp(min=0), before < 0


def find_prompts(
    input_ids: torch.Tensor,
    answer_start_token_id: int,
    turn_token_ids: Sequence[int],
    end_token_ids: Sequence[int] = (),
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tells prompts from answers by the tokens of a chat.

    An answer begins after an answer-start token and ends with an end token or before the next token that starts a
    turn; all else is prompt. So the answer-start token belongs to the prompt and the end token to the answer, as the
    `{% generation %}` block of MiniLLM's chat template marks them. Ids without such tokens are one prompt.

    Args:
        input_ids: [B, L].
        answer_start_token_id: the token after which an answer begins, such as that of `<|assistant|>`.
        turn_token_ids: the tokens that start a turn, those of all roles.
        end_token_ids: the tokens that end an answer.
        attention_mask: [B, L], 0 at padding, whose ids mean nothing.

    Returns:
        int64 [B, L]: k on the k-th prompt of a row, 0 on answers and at padding. It is a `prefix_mask`.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    opens = (input_ids == answer_start_token_id) & real
    turns = opens | (torch.isin(input_ids, torch.tensor(list(turn_token_ids), device=input_ids.device)) & real)
    ends = torch.isin(input_ids, torch.tensor(list(end_token_ids), device=input_ids.device)) & real
    last, none_yet = last_before(turns | ends)
    in_answer = ~none_yet & opens.gather(1, last) & ~turns
    return number_prompts((~in_answer).long(), attention_mask)


def number_prompts(
    prefix_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Numbers the runs of ones of a prefix mask: 1 on the first prompt of a document, 2 on the second, and so on.

    Args:
        prefix_mask: [B, L], not 0 on prompts.
        attention_mask: [B, L], 0 at padding, which neither ends a run nor belongs to one.
        document_ids: [B, L], where several documents stand in a row; the numbers begin again with each.

    Returns:
        int64 [B, L], 0 outside of prompts: the form in which `forward` takes several prompts.
    """
    mask = (prefix_mask != 0).long()
    real = torch.ones_like(mask, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    before, is_first = last_before(real)
    if document_ids is not None:
        is_first = is_first | (document_ids.gather(1, before) != document_ids)
    starts = (mask * real > 0) & (is_first | (mask.gather(1, before) == 0))
    count = starts.long().cumsum(-1)
    # What earlier documents counted: the value before the last first token.
    earlier = running_max(torch.where(is_first & real, count - starts.long(), 0))
    return (count - earlier) * mask * real
