"""What of a collator decides the rows that it packs, as JSON can hold it."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from minillm.data.sentence_ends import special_ids

OF_TENSORS = {"padding", "pad_to_multiple_of"}
OF_PREFIXES = {"seed", "prefix_fraction"}


def row_settings(collator: Any, fixed_prefixes: bool) -> dict[str, Any]:
    """The fields of a collator by name, but for those that only its tensors show: padding, and prefixes still to draw.

    Of a tokenizer the number of tokens, the special ones and the end count.
    """
    left_out = OF_TENSORS if fixed_prefixes else OF_TENSORS | OF_PREFIXES
    return {"fixed_prefixes": fixed_prefixes, **plain(collator, left_out)}


def plain(value: Any, left_out: Iterable[str] = ()) -> Any:
    """A setting in the types of JSON; anything unknown by its type alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PreTrainedTokenizerBase):
        return {"tokens": len(value), "special": sorted(special_ids(value)), "end": value.eos_token_id}
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.init and field.name not in left_out]
        return {"type": type(value).__name__, **{name: plain(getattr(value, name), left_out) for name in names}}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(entry) for entry in value)
    if isinstance(value, Iterable):
        return [plain(entry) for entry in value]
    return type(value).__qualname__
