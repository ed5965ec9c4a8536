"""Collators for the stock `Trainer`: causal, prefix and supervised fine-tuning, each with packing.

All three turn samples into documents, documents into rows and rows into the same tensors. They differ in two things:
which tokens are scored and which form a bidirectional prefix.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from minillm.data.documents import (
    IGNORE_INDEX,
    Document,
    NothingToScoreError,
    Piece,
    cut_by_documents,
    number_runs,
    read_answer,
    read_ids,
    read_prompts,
    read_scored,
)
from minillm.data.packing import best_fit_decreasing
from minillm.data.row_folder import pack_into
from minillm.prompts import find_prompts
from minillm.training.row_settings import row_settings

logger = logging.get_logger(__name__)

Overlong = Literal["split", "truncate", "error"]

WINDOW_TOKENS = 4_000_000


@dataclass
class DataCollatorForCausalLM:
    """Packs documents into rows for a causal language model; every token but a document's first is scored.

    A sample is a list of token ids or a mapping with `input_ids` and perhaps `attention_mask` (zeros are padding and
    are left out), `labels` (the ids, or -100 where a token is not to be scored) and `document_ids`. A sample with
    `document_ids` is a row already (see `pack_dataset`) and stays one. Fields of other names are not read.

    Called with n samples it returns a dict of int64 tensors [rows, length], rows <= n unless documents are split:
    `input_ids`; `attention_mask`, 1 on tokens and 0 on padding (always at the right); `labels`, -100 at padding and on
    each document's first token (position t-1 predicts labels[t], the model shifts); and with `packing` also
    `document_ids`, 1, 2, ... within a row, and `position_ids`, which begin at 0 in every document (both 0 at padding).

    Args:
        tokenizer: gives `pad_token_id`; a `Trainer` without a processing class saves it beside the model.
        max_length: tokens in a row; needed for `packing`. None takes the longest sample.
        packing: several documents may share a row; the number of rows of a batch then varies. False: one document a
            row.
        pad_token_id: id at padding. None takes the tokenizer's pad token, else its end token.
        padding: "longest": to the longest row of the batch; "max_length": rows of one length throughout.
        pad_to_multiple_of: rows become a multiple of it; it must divide `max_length`.
        overlong: a document beyond `max_length` is split into pieces that count as documents of their own (a last
            token alone takes its predecessor along), loses its end with a logged warning, or raises.
        seed: seed of the random draws of the collators that draw; together with the epoch and the document's ids it
            decides them alone, so that neither the order of samples nor the number of workers matters.

    Raises:
        ValueError: arguments that do not go together; when called, no samples, a sample that is not as described
            (named by its number in the batch), or a batch without one token to score.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    packing: bool = True
    pad_token_id: int | None = None
    padding: Literal["longest", "max_length"] = "longest"
    pad_to_multiple_of: int | None = None
    overlong: Overlong = "split"
    seed: int = 0
    # Shared memory reaches worker processes that outlive an epoch.
    _epoch: torch.Tensor = field(init=False, repr=False, compare=False)
    _shortened: int = field(init=False, repr=False, compare=False, default=0)
    _lost_tokens: int = field(init=False, repr=False, compare=False, default=0)

    allowed_overlong = ("split", "truncate", "error")
    scorable = "a document needs two tokens"

    def __post_init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if self.pad_token_id is None:
            self.pad_token_id = _pad_token_id(self.tokenizer)
        _require_choice("overlong", self.overlong, self.allowed_overlong)
        _require_choice("padding", self.padding, ("longest", "max_length"))
        if self.max_length is None and (self.packing or self.padding == "max_length"):
            raise ValueError('`packing=True` and `padding="max_length"` need `max_length`, the tokens in a row')
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}; a row needs at least 2 tokens to score one")
        multiple = self.pad_to_multiple_of
        if multiple is not None and (multiple < 1 or (self.max_length or multiple) % multiple):
            raise ValueError(f"`pad_to_multiple_of` is {multiple}; it must divide `max_length` ({self.max_length})")

    @property
    def epoch(self) -> int:
        """The epoch that random draws belong to."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the random draws, in running worker processes too."""
        self._epoch.fill_(epoch)

    def __call__(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = self.rows(samples)
        batch = self._tensors([[self._document(piece) for piece in row] for row in rows])
        if bool((batch["labels"] == IGNORE_INDEX).all()):
            raise NothingToScoreError(
                f"none of the {len(samples)} samples of this batch holds a token to score: {self.scorable}"
            )
        return batch

    def rows(self, samples: Sequence[Any], leave_out_unscored: bool = False) -> list[list[Piece]]:
        """The documents of each row, before any random draw. Samples that are rows already come first.

        Args:
            leave_out_unscored: leave out documents without a token to score, and log how many.
        """
        done, loose = self._read_all(samples)
        if leave_out_unscored:
            done, loose = self._only_scored(done, loose)
        if not self.packing:
            return done + [[piece] for piece in loose]
        return done + self._pack(loose)

    def _pack(self, pieces: list[Piece]) -> list[list[Piece]]:
        packed = best_fit_decreasing([len(piece.input_ids) for piece in pieces], self.max_length)
        return [[pieces[index] for index in row] for row in packed]

    def _only_scored(self, done: list[list[Piece]], loose: list[Piece]) -> tuple[list[list[Piece]], list[Piece]]:
        kept = [piece for piece in loose if piece.is_scored]
        kept_rows = [row for row in done if any(piece.is_scored for piece in row)]
        if not kept and not kept_rows:
            raise NothingToScoreError(f"the data set holds no token to score: {self.scorable}")
        lost = len(loose) - len(kept) + len(done) - len(kept_rows)
        if lost:
            logger.warning(
                f"{lost} of {len(loose) + len(done)} documents hold no token to score and are left out: "
                f"{self.scorable}, and labels that are not all -100"
            )
        return kept_rows, kept

    def _read_all(self, samples: Sequence[Any]) -> tuple[list[list[Piece]], list[Piece]]:
        """The samples that are rows already, and the pieces of the others."""
        if len(samples) == 0:
            raise ValueError("the collator was called without samples")
        done: list[list[Piece]] = []
        loose: list[Piece] = []
        for number, sample in enumerate(samples):
            try:
                pieces, is_row = self._read(sample)
            except ValueError as error:
                raise ValueError(f"sample {number} of {len(samples)}: {error}") from error
            if is_row:
                done.append(pieces)
            else:
                loose.extend(pieces)
        return done, loose

    def _read(self, sample: Any) -> tuple[list[Piece], bool]:
        """The pieces of a sample, none longer than `max_length`, and whether they form a row already."""
        ids, scored, columns = self._ids_and_scored(sample)
        if "document_ids" not in columns:
            spans = self._fit(scored)
        elif not self.packing:
            raise ValueError("a sample with `document_ids` is a packed row; this collator has `packing=False`")
        elif len(ids) > self.max_length:
            raise ValueError(f"a packed row has {len(ids)} tokens; `max_length` is {self.max_length}")
        else:
            spans = cut_by_documents(columns["document_ids"])
        prefix_mask = columns.get("prefix_mask")
        if prefix_mask is None:
            return [Piece.cut(ids[span], scored[span]) for span in spans], "document_ids" in columns
        if not self._marks_prefixes:
            raise ValueError("a packed row holds prefixes in `prefix_mask`; this collator marks none")
        return [Piece.cut(ids[span], scored[span], read_prompts(prefix_mask[span])) for span in spans], True

    def _ids_and_scored(self, sample: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        ids, columns = read_ids(sample)
        return ids, read_scored(ids, columns), columns

    @property
    def _marks_prefixes(self) -> bool:
        return "prefix_mask" in self._extra_columns()

    def _document(self, piece: Piece) -> Document:
        """The piece with its prompts, on which nothing is scored."""
        prompts = self._prompts(piece, self.epoch) if piece.prefix_mask is None else piece.prefix_mask
        return Document(piece.input_ids, np.where(prompts > 0, IGNORE_INDEX, piece.labels), prompts)

    def _prompts(self, piece: Piece, epoch: int) -> np.ndarray:
        """k on the k-th prompt of a piece, 0 elsewhere: int64 [tokens]."""
        return np.zeros_like(piece.input_ids)

    def fix_prefixes(self, row: list[Piece]) -> list[Piece]:
        """The row with the prefixes of epoch 0; as it is, if the collator marks no prefixes or they are fixed."""
        if not self._marks_prefixes:
            return row
        return [
            piece._replace(prefix_mask=self._prompts(piece, epoch=0)) if piece.prefix_mask is None else piece
            for piece in row
        ]

    def _fit(self, scored: np.ndarray) -> list[slice]:
        """The spans of a document that are kept: all of it, pieces or a part, as `overlong` says."""
        count, length = len(scored), self.max_length
        if length is None or count <= length:
            return [slice(0, count)]
        if self.overlong == "error":
            raise ValueError(f'a document has {count} tokens; `max_length` is {length} and `overlong` is "error"')
        if self.overlong == "split":
            # A piece of one token would have none to score: it begins with the last token of the piece before it.
            return [slice(min(start, count - 2), start + length) for start in range(0, count, length)]
        self._count_lost(count - length)
        start = self._kept_start(scored)
        return [slice(start, start + length)]

    def _kept_start(self, scored: np.ndarray) -> int:
        """The first of the `max_length` tokens that truncation keeps."""
        return 0

    def _count_lost(self, tokens: int) -> None:
        self._shortened += 1
        self._lost_tokens += tokens
        # At 1, 2, 4, 8, ... documents: the count stays visible without a line for each.
        if self._shortened & (self._shortened - 1) == 0:
            logger.warning(
                f"{self._shortened} documents longer than max_length={self.max_length} were truncated so far; "
                f"{self._lost_tokens} tokens dropped"
            )

    def _width(self, needed: int) -> int:
        """The slots of all rows of a batch whose longest row needs `needed`."""
        width = max(needed, self.max_length) if self.padding == "max_length" else needed
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple

    def _tensors(self, rows: list[list[Document]]) -> dict[str, torch.Tensor]:
        width = self._width(max(sum(len(document.input_ids) for document in row) for row in rows))
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX, **self._extra_columns()}
        batch = {name: np.full((len(rows), width), fill, np.int64) for name, fill in fills.items()}
        for index, row in enumerate(rows):
            start = 0
            for number, document in enumerate(row, start=1):
                span = slice(start, start + len(document.input_ids))
                values = _columns_of(document, number)
                for name, array in batch.items():
                    array[index, span] = values[name]
                start = span.stop
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _extra_columns(self) -> dict[str, int]:
        """Names of the tensors beside ids, mask and labels, with their value at padding."""
        return {"document_ids": 0, "position_ids": 0} if self.packing else {}


@dataclass
class DataCollatorForPrefixLM(DataCollatorForCausalLM):
    """Packs documents for a prefix language model: a random part at each document's start sees itself in both
    directions, the rest is predicted from left to right (Raffel et al. 2020, section 3.2.1).

    Takes and returns what `DataCollatorForCausalLM` does, and `prefix_mask`, 1 inside the prefix. A prefix token sees
    its successor, so labels are -100 on all of the prefix. A document gets a prefix of at least one token that leaves
    its last scored one; the draw follows from (seed, epoch, the document's ids) alone. Add `SetEpochCallback` for new
    prefixes in each epoch, and pack evaluation data with `pack_dataset(..., fixed_prefixes=True)`.

    Args:
        prefix_fraction: (lowest, highest) part of a document that may become the prefix; drawn uniformly.
    """

    prefix_fraction: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.prefix_fraction
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"`prefix_fraction` is {self.prefix_fraction}; needed: 0 <= lowest <= highest <= 1")

    def _prompts(self, piece: Piece, epoch: int) -> np.ndarray:
        low, high = self.prefix_fraction
        draw = uniform_draw(self.seed, epoch, piece.input_ids)
        last_scored = np.flatnonzero(piece.labels != IGNORE_INDEX).max(initial=1)
        length = int(np.clip((low + (high - low) * draw) * len(piece.input_ids), 1, last_scored))
        return (np.arange(len(piece.input_ids)) < length).astype(np.int64)

    def _extra_columns(self) -> dict[str, int]:
        return {**super()._extra_columns(), "prefix_mask": 0}


@dataclass
class DataCollatorForSFT(DataCollatorForCausalLM):
    """Packs prompts with their answers for supervised fine-tuning: only the answer is scored.

    A sample tells its answer in one of these ways: `prompt_ids` and `completion_ids`; `input_ids` and `prompt_length`;
    `input_ids` and `assistant_masks` (from `apply_chat_template(..., return_assistant_tokens_mask=True)`; several
    answers may alternate with prompts) or `completion_mask`; `input_ids` and `labels` with -100 outside of the answer.
    The tensors are those of `DataCollatorForCausalLM`, and `prefix_mask` with `prompt_is_prefix`.

    A document beyond `max_length` is truncated with a logged warning (or raises with `overlong="error"`): the prompt
    loses its start, down to half of `max_length`, then the answer its end. So an answer always remains.

    Args:
        prompt_is_prefix: for models with `attention_type="prefix"`: each run of tokens outside of the answers is a
            prompt, which sees itself in both directions; `prefix_mask` is k on the k-th one.
        answer_start_token_id, turn_token_ids: the tokens of a chat, by which answers that are not scored, such as
            earlier ones in a prompt, are told from prompts, as `generate()` tells them; None takes the tokenizer's.
    """

    overlong: Overlong = "truncate"
    prompt_is_prefix: bool = False
    answer_start_token_id: int | None = None
    turn_token_ids: Sequence[int] | None = None

    allowed_overlong = ("truncate", "error")

    def _ids_and_scored(self, sample: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        return read_answer(sample)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("answer_start_token_id", "turn_token_ids"):
            if getattr(self, name) is not None and not self.prompt_is_prefix:
                raise ValueError(f"`{name}` tells prompts apart, which are marked with `prompt_is_prefix=True` alone")
            if getattr(self, name) is None and self.prompt_is_prefix:
                setattr(self, name, getattr(self.tokenizer, name, None))
        if (self.answer_start_token_id is None) != (self.turn_token_ids is None):
            raise ValueError("give both of `answer_start_token_id` and `turn_token_ids`, or neither")

    def _prompts(self, piece: Piece, epoch: int) -> np.ndarray:
        outside = piece.labels == IGNORE_INDEX
        if self.answer_start_token_id is None:
            return number_runs(outside)
        end = getattr(self.tokenizer, "eos_token_id", None)
        ids = torch.from_numpy(piece.input_ids)[None]
        found = find_prompts(ids, self.answer_start_token_id, self.turn_token_ids, [] if end is None else [end])
        return number_runs(outside & (found[0].numpy() > 0))

    def _kept_start(self, scored: np.ndarray) -> int:
        prompt = int(scored.argmax())
        answer = len(scored) - prompt
        return prompt - max(self.max_length - answer, min(prompt, self.max_length // 2))

    def _extra_columns(self) -> dict[str, int]:
        return {**super()._extra_columns(), **({"prefix_mask": 0} if self.prompt_is_prefix else {})}


def pack_dataset(
    samples: Any,
    collator: DataCollatorForCausalLM,
    fixed_prefixes: bool = False,
    *,
    folder: str | Path | None = None,
    window_tokens: int | None = None,
) -> Any:
    """Packs a whole data set beforehand, so that the number of rows, and with it the steps of a run, is known.

    Documents without a token to score are left out, and a logged warning counts them.

    Args:
        samples: a sequence of samples as `collator` takes them; a `datasets.Dataset` gives one back. With `folder` a
            stream as well: a `datasets.IterableDataset` or another iterable, from its beginning in every call.
        collator: one of the collators here, with `packing`; give the same one to the `Trainer`.
        fixed_prefixes: keep the prefixes of epoch 0 in the rows, whatever the collator's epoch is, now or later: an
            evaluation of unchanged weights then repeats itself.
        folder: write the rows to files there, and return them as `minillm.data.PackedRows`, which reads them from disk
            as they are asked for: data that memory does not hold. After a run that was ended the same call goes on;
            a complete folder is opened at once. Needs pyarrow.
        window_tokens: with `folder`, read and pack the samples in windows of so many tokens, each into a file of its
            own; None takes 4 million. More takes more memory and leaves less padding.

    Returns:
        Rows of at most `max_length` tokens, each a mapping of lists: `input_ids`, `document_ids`, `labels`, and
        `prefix_mask` with `fixed_prefixes` and a collator that marks prefixes. The collator takes a row as one sample.
        `Trainer` keeps these columns, since the model's forward names them.

    Raises:
        ValueError: no samples, a sample that is not as the collator wants it, nothing to score, a collator without
            `packing`, a stream or `window_tokens` without `folder`, or a folder that holds rows of other settings or
            of another source.
        FolderInUse: another process packs into `folder`.
        OSError: the disk is full; another call goes on.
        ImportError: `folder` without pyarrow.
    """
    if not collator.packing:
        raise ValueError("`pack_dataset` needs a collator with `packing=True`")

    def pack(window: Any) -> list[list[Piece]]:
        rows = collator.rows(window, leave_out_unscored=True)
        return [collator.fix_prefixes(row) for row in rows] if fixed_prefixes else rows

    if folder is not None:
        settings = row_settings(collator, fixed_prefixes)
        return pack_into(folder, samples, pack, settings, WINDOW_TOKENS if window_tokens is None else window_tokens)
    if window_tokens is not None:
        raise ValueError(f"`window_tokens` is {window_tokens}, but only packing into a `folder` is done in windows")
    if not hasattr(samples, "__len__"):
        raise ValueError(f"a {type(samples).__name__} is a stream, whose rows need a place: give a `folder`")
    packed = [_row_columns(row) for row in pack(samples)]
    return type(samples).from_list(packed) if hasattr(samples, "from_list") else packed


def _row_columns(row: list[Piece]) -> dict[str, list[int]]:
    columns = {
        "input_ids": [piece.input_ids for piece in row],
        "document_ids": [np.full(len(piece.input_ids), number) for number, piece in enumerate(row, start=1)],
        "labels": [piece.labels for piece in row],
    }
    if row[0].prefix_mask is not None:
        columns["prefix_mask"] = [piece.prefix_mask for piece in row]
    return {name: np.concatenate(parts).tolist() for name, parts in columns.items()}


def uniform_draw(seed: int, epoch: int, ids: np.ndarray) -> float:
    """A number in [0, 1) that depends on the seed, the epoch and the token ids (int64) and on nothing else."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=8, key=f"{seed}:{epoch}".encode())
    return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53


def _columns_of(document: Document, number: int) -> dict[str, Any]:
    tokens = np.arange(len(document.input_ids))
    return {
        "input_ids": document.input_ids,
        "attention_mask": 1,
        "labels": document.labels,
        "document_ids": number,
        "position_ids": tokens,
        "prefix_mask": document.prefix_mask,
    }


def _pad_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if (value := getattr(tokenizer, name, None)) is not None:
            return value
    raise ValueError("no id for padding: give `pad_token_id`, or a `tokenizer` with a pad or an end token")


def _require_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; allowed: {', '.join(map(repr, allowed))}")
