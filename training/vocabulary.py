"""The model side of an extended vocabulary: rows for the new tokens that begin where their spelling was."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minillm.head import NormHead
from minillm.tokenization.vocabulary_extension import spell_new_tokens


def resize_for_vocabulary(
    model: PreTrainedModel,
    old_tokenizer: PreTrainedTokenizerFast,
    new_tokenizer: PreTrainedTokenizerFast,
    pad_to_multiple_of: int | None = None,
) -> list[int]:
    """Gives a model rows for the tokens that `new_tokenizer` has beyond `old_tokenizer`; the model is changed.

    Each new row, of the input embedding and of an untied output head with its bias, is the mean of the rows of the old
    tokens that spelled the new one, computed in float32. Rows of a `NormHead`, of which only the direction counts, are
    means of directions. Old rows stay as they are, `config.vocab_size` follows, and a table that is larger than its
    tokenizer (padded for speed) is filled up first.

    For any causal language model of transformers. Call it before adding adapters.

    Args:
        old_tokenizer: what the model was trained with.
        new_tokenizer: its extension, e.g. by `extend_vocabulary` or `add_tokens`.
        pad_to_multiple_of: the number of rows is made a multiple of it; what lies beyond the tokens is initialised as
            the model's config says.

    Returns:
        The new ids, e.g. for PEFT's `trainable_token_indices`.

    Raises:
        TypeError: a tokenizer that is not a fast one.
        ValueError: a model with adapters, a tokenizer with more tokens than the model has rows, or a `new_tokenizer`
            that is no extension of the old one. The model is unchanged then.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("the model has adapters: merge them first (`merge_and_unload`), or resize the base model")
    spelling = spell_new_tokens(old_tokenizer, new_tokenizer)
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    highest = max(old_tokenizer.get_vocab().values())
    if highest >= size:
        raise ValueError(f"old_tokenizer has ids up to {highest}, but the model's embedding only {size} rows")
    tied = is_tied(model)
    size = max(size, max(spelling, default=0) + 1)
    model.resize_token_embeddings(size, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    embeddings = model.get_input_embeddings()
    tables = [embeddings.weight]
    head: Any = model.get_output_embeddings()
    by_direction = isinstance(head, NormHead)
    if head is not None and not tied:
        rows = head.raw_weight if by_direction else head.weight
        tables += [parameter for parameter in (rows, getattr(head, "bias", None)) if parameter is not None]
    for table in tables:
        fill_rows(table, spelling, highest + 1, by_direction and table is head.raw_weight)
    return list(spelling)


def is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def fill_rows(table: torch.Tensor, spelling: dict[int, list[int]], num_old: int, by_direction: bool = False) -> None:
    """Writes means of old rows into new ones.

    Args:
        table: [rows, width] or [rows], changed in place.
        spelling: new row to old rows; where there are none (the old tokenizer dropped the characters), all of them.
        num_old: number of old rows.
        by_direction: average the rows divided by their lengths.
    """
    for row, parts in spelling.items():
        old = table[parts or list(range(num_old))].float()
        if by_direction:
            old = torch.nn.functional.normalize(old, dim=-1)
        table[row] = old.mean(0).to(table.dtype)
