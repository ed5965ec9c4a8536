"""What a training sample is: token ids, their labels and the prompts among them, read from the forms in use."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

IGNORE_INDEX = -100

DRAWN_AS_IN_EPOCH_0 = -1
"""The `prefix_mask` of a packed document whose random draws are those of epoch 0 in all epochs."""

MASKS = ("attention_mask", "assistant_masks", "completion_mask", "prefix_mask")

# Model inputs that the collators make themselves: one in a sample would be lost without a word. A packed row may bring
# the prefixes that were drawn for it.
MADE_BY_COLLATORS = ("position_ids", "prefix_mask", "block_position_ids")


class NothingToScoreError(ValueError):
    """A batch or a data set without one token to score, or a sample without any token."""


class Piece(NamedTuple):
    """A document, or the part of one that fits into a row: int64 ids and labels, [tokens] each.

    Labels are the ids, or -100 where a token is not scored; so at the first one, unless something is put before it.
    `prefix_mask` is what a packed row keeps of random draws: k on the k-th prompt and 0 elsewhere, or
    `DRAWN_AS_IN_EPOCH_0` throughout; None where the collator is still to draw.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    prefix_mask: np.ndarray | None = None

    @classmethod
    def cut(
        cls, input_ids: np.ndarray, scored: np.ndarray, prefix_mask: np.ndarray | None = None, first: bool = False
    ) -> "Piece":
        """The piece of these ids, scored where `scored` holds, at its first token only with `first`."""
        labels = np.where(scored, input_ids, IGNORE_INDEX)
        if not first:
            labels[0] = IGNORE_INDEX
        return cls(input_ids, labels, prefix_mask)

    @property
    def is_scored(self) -> bool:
        """Whether any token is."""
        return bool((self.labels != IGNORE_INDEX).any())


def integers(name: str, values: Any, kinds: str = "iu") -> np.ndarray:
    """`values` (list, array or tensor of one axis) as int64 [tokens]; ValueError if it is anything else."""
    if getattr(values, "ndim", 1) != 1 or isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise ValueError(f"`{name}` must be a flat list of integers, got {_describe(values)}")
    if len(values) == 0:
        return np.empty(0, np.int64)
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"`{name}` must be a flat list of integers, got {_describe(values)}") from None
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise ValueError(f"`{name}` must be a flat list of integers, got {_describe(values)}")
    return array.astype(np.int64)


def _describe(values: Any) -> str:
    shape = getattr(values, "shape", None)
    text = repr(values)
    return f"{type(values).__name__}{list(shape) if shape is not None else ''} {text[:60]}{'...' * (len(text) > 60)}"


def read_ids(sample: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The ids of a sample and its per-token columns, without padding.

    Args:
        sample: token ids, or a mapping with `input_ids` and perhaps `attention_mask` (tokens at 0 are padding and are
            left out), `labels`, `document_ids`, `prefix_mask` (only beside `document_ids`), `assistant_masks` or
            `completion_mask`, each as long as `input_ids`.

    Raises:
        NothingToScoreError: empty `input_ids`, or padding alone.
        ValueError: no `input_ids`, ids that are no integers or negative, a column of another length, or a field that a
            collator makes itself (`position_ids`, `block_position_ids`, `prefix_mask` of a loose sample).
    """
    if not isinstance(sample, Mapping):
        sample = {"input_ids": sample}
    if "input_ids" not in sample:
        raise ValueError(f"a sample needs `input_ids`; it has {sorted(sample) or 'no fields'}")
    is_row = sample.get("document_ids") is not None
    for name in MADE_BY_COLLATORS:
        if name in sample and not (is_row and name == "prefix_mask"):
            raise ValueError(f"a sample holds `{name}`, which the collator makes itself: remove this column")
    ids = integers("input_ids", sample["input_ids"])
    columns = {
        name: integers(name, sample[name], kinds="iub" if name in MASKS else "iu")
        for name in (*MASKS, "labels", "document_ids")
        if sample.get(name) is not None
    }
    for name, column in columns.items():
        if len(column) != len(ids):
            raise ValueError(f"`{name}` has {len(column)} values for {len(ids)} `input_ids`")
    real = columns.pop("attention_mask", np.ones_like(ids)) != 0
    ids = ids[real]
    if len(ids) == 0:
        raise NothingToScoreError("a sample has no tokens: its `input_ids` are empty or all padding")
    if ids.min() < 0:
        raise ValueError(f"`input_ids` hold the negative id {ids.min()}")
    return ids, {name: column[real] for name, column in columns.items()}


def read_scored(ids: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Boolean [tokens]: which tokens the sample's `labels` score; all of them without labels.

    Raises:
        ValueError: a label is neither -100 nor the token's own id.
    """
    labels = columns.get("labels", ids)
    wrong = (labels != IGNORE_INDEX) & (labels != ids)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"`labels` hold {labels[at]} at token {at} whose id is {ids[at]}: a label is the token's own id or -100 "
            "(the model shifts them itself)"
        )
    return labels != IGNORE_INDEX


def read_answer(sample: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Ids, boolean [tokens] on the answer, and the per-token columns of a sample for supervised fine-tuning.

    The answer is told by one of: `prompt_ids` and `completion_ids`; `prompt_length` beside `input_ids`;
    `assistant_masks` or `completion_mask` (1 on the answer); `labels` (-100 outside of the answer).

    Raises:
        ValueError: none or several of these, a `prompt_length` that leaves no answer, or no token to score.
    """
    ways = [
        name
        for name in ("completion_ids", "prompt_length", "assistant_masks", "completion_mask", "labels")
        if isinstance(sample, Mapping) and sample.get(name) is not None
    ]
    if len(ways) != 1:
        found = f"several fields tell ({', '.join(ways)})" if ways else "no field tells"
        raise ValueError(
            f"{found} where the answer begins: give one of `prompt_ids` with `completion_ids`, `prompt_length`, "
            "`assistant_masks`, `completion_mask` or `labels`. A Trainer drops columns that the model's forward does "
            "not name: set `remove_unused_columns=False` or pack the data set beforehand with `pack_dataset`"
        )
    if ways == ["completion_ids"]:
        if sample.get("prompt_ids") is None:
            raise ValueError("a sample has `completion_ids` but no `prompt_ids`")
        prompt = integers("prompt_ids", sample["prompt_ids"])
        completion = integers("completion_ids", sample["completion_ids"])
        ids, columns = read_ids({"input_ids": np.concatenate([prompt, completion])})
        scored = np.arange(len(ids)) >= len(prompt)
    else:
        ids, columns = read_ids(sample)
        scored = _answer_tokens(sample, ways[0], ids, columns)
    if not scored[1:].any():
        raise ValueError(f"a sample of {len(ids)} tokens has no answer to score, judged by `{ways[0]}`")
    # What nothing predicts is no answer: a prompt has one token at least.
    scored[0] = False
    return ids, scored, columns


def _answer_tokens(sample: Mapping, way: str, ids: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    if way == "labels":
        return read_scored(ids, columns)
    if way != "prompt_length":
        return columns[way] != 0
    length = sample["prompt_length"]
    if int(length) != length or not 0 <= length < len(ids):
        raise ValueError(f"`prompt_length` is {length}; a sample of {len(ids)} tokens allows 0 to {len(ids) - 1}")
    return np.arange(len(ids)) >= length


def number_runs(inside: np.ndarray) -> np.ndarray:
    """Boolean [tokens] to int64: k on the k-th run of True, 0 elsewhere."""
    starts = np.diff(inside.astype(np.int64), prepend=0) > 0
    return starts.cumsum() * inside


def read_prompts(mask: np.ndarray) -> np.ndarray:
    """The `prefix_mask` of a document, k on the k-th prompt. ValueError if a number comes back or they fall."""
    edges = np.flatnonzero(np.diff(mask, prepend=0))
    numbers = mask[edges][mask[edges] != 0]
    if (mask < 0).any() or (np.diff(numbers, prepend=0) <= 0).any():
        raise ValueError(
            "`prefix_mask` of a packed row must be 1 on the first prompt of a document, 2 on the second, and so on, "
            "and 0 elsewhere"
        )
    return mask


def cut_by_documents(document_ids: np.ndarray) -> list[slice]:
    """The spans of the documents in a row. ValueError if the numbers decrease."""
    steps = np.diff(document_ids)
    if (steps < 0).any():
        raise ValueError("`document_ids` decrease inside a row; they must be non-decreasing")
    edges = [0, *(np.flatnonzero(steps) + 1).tolist(), len(document_ids)]
    return [slice(start, stop) for start, stop in pairwise(edges)]
