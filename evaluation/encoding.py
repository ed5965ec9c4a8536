"""Texts to token ids as lm-evaluation-harness does it, so that both score the same tokens."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def prefix_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a text, so that its first one can be predicted: bos, else eos. ValueError without either."""
    named: tuple[Any, ...] = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = next((token for token in named if token is not None), None)
    if found is None:
        raise ValueError(
            "the tokenizer names neither bos_token nor eos_token, one of which stands before a text so that its first "
            "token can be predicted: set one of them"
        )
    return found


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens_in_text: bool = True
) -> list[list[int]]:
    """Token ids of texts, with what the tokenizer puts around a text, unless the text begins with bos already.

    Args:
        special_tokens_in_text: read the strings of special tokens in a text as these tokens.
    """
    begin: Any = None
    if special_tokens_in_text and (tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None):
        begin = tokenizer.decode([prefix_token_id(tokenizer)]) or None
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    if not special_tokens_in_text:
        options["split_special_tokens"] = True
    found: dict[int, list[int]] = {}
    for begun in (False, True):
        numbers = [n for n, text in enumerate(texts) if (begin is not None and text.startswith(begin)) == begun]
        if numbers:
            extra: dict[str, Any] = {"add_special_tokens": False} if begun else {}
            ids = tokenizer([texts[number] for number in numbers], **options, **extra)["input_ids"]
            found.update(zip(numbers, ids, strict=True))
    return [found[number] for number in range(len(texts))]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, contexts: Sequence[str], continuations: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of contexts and of what is scored after them: the whole is encoded, and cut where the context ends.

    Blanks at the end of a context count as part of what follows, with which they share tokens. An empty context is the
    prefix token; a continuation that begins with it is scored from its second token on.
    """
    kept = [context.rstrip() for context in contexts]
    moved = [
        context[len(short) :] + continuation
        for context, short, continuation in zip(contexts, kept, continuations, strict=True)
    ]
    before = encode(tokenizer, kept)
    whole = encode(tokenizer, [short + rest for short, rest in zip(kept, moved, strict=True)])
    pairs = [(context, ids[len(context) :]) for context, ids in zip(before, whole, strict=True)]
    for number, context in enumerate(contexts):
        if not context:
            first = prefix_token_id(tokenizer)
            ids = tokenizer(continuations[number], add_special_tokens=False)["input_ids"]
            pairs[number] = ([first], ids[1:] if ids[:1] == [first] else ids)
    return pairs
