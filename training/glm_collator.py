"""The collator of GLM's objective: autoregressive blank infilling (arXiv 2103.10360), packed."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minillm.data.documents import IGNORE_INDEX, Piece, cut_by_documents
from minillm.data.packing import best_fit_decreasing
from minillm.data.sentence_ends import ListedEnds, SentenceEnds, id_table, look_up, special_ids
from minillm.data.span_masking import (
    Draw,
    GLMSample,
    corrupt,
    document_span,
    most_spans,
    poisson_cdf,
    sentence_spans,
    token_spans,
)
from minillm.training.collators import DataCollatorForCausalLM, uniform_draw

BLANKS = {"token": "mask_token_id", "sentence": "smask_token_id", "document": "gmask_token_id"}
MIXTURE = {"token": 0.5, "sentence": 0.25, "document": 0.25}


@dataclass
class DataCollatorForGLM(DataCollatorForCausalLM):
    """Cuts spans out of documents for a prefix language model to fill in, and packs several documents into a row (GLM,
    arXiv 2103.10360, sections 2.1 and 2.2).

    Samples are those of `DataCollatorForCausalLM`; where `labels` are -100 nothing is cut out, and neither are special
    tokens. Of each document one kind of spans is drawn by the weights of `mixture`:

    - "token": spans with lengths from Poisson(`mean_span_length`) without 0 until they cover `mask_fraction` of the
      document, each replaced by `mask_token_id`; two have a token between them at least.
    - "sentence": whole sentences (see `SentenceEnds`) until they cover as much, each replaced by `smask_token_id`;
      neighbouring ones keep blanks of their own. A document of one sentence is cut out whole.
    - "document": one span up to the last token, `document_fraction` of the document long, replaced by
      `gmask_token_id`.

    See `minillm.data.span_masking` for the details and `corrupt` there for a worked example of the arrays.

    Called with n samples it returns a dict of int64 tensors [rows, length]: `input_ids`, each document as its text
    with blanks (Part A) and then the spans in random order, each after `sop_token_id` (Part B); `labels`, the spans'
    tokens and, in the slot after each span's last token, `eop_token_id`, elsewhere -100 (position t-1 predicts
    labels[t], the model shifts); `attention_mask`; `position_ids`, the index in Part A, in a span that of its blank;
    `block_position_ids`, 0 in Part A and 1, 2, ... in a span; `prefix_mask`, 1 in Part A; `document_ids`, 1, 2, ...
    The last span of a document has its end token in the slot behind the document, be it another document's first slot,
    which nothing else scores, or padding: so a row holds at most `max_length` - 1 tokens.

    The draws follow from (seed, epoch, the document's ids) alone. Add `SetEpochCallback` for new ones in each epoch,
    and pack evaluation data with `pack_dataset(..., fixed_prefixes=True)`, whose rows keep the draws of epoch 0. Rows
    packed beforehand hold documents as they are. One of n tokens becomes n + 2 k with k spans; as k changes with the
    epoch, packing reserves room for the most spans that it may get (`most_spans`; more are not cut out).

    Args:
        mixture: weights of the kinds, of any sum; a kind that is left out does not occur.
        mask_fraction: part of a document's tokens that spans and sentences cover, above 0 and at most 0.5.
        mean_span_length: of the Poisson distribution, before zeros are left out.
        document_fraction: (shortest, longest) part of a document that the one span covers; uniform.
        gmask_counts: on the first axis a span of a document counts on from the end of Part A. For models with one axis
            (RoPE, ALiBi, ...), in which the tokens of a long span would all stand at one place; GLM-130B was trained
            so, and `generate()` and `fill()` do it for such models by themselves.
        mask_token_id, smask_token_id, gmask_token_id, sop_token_id, eop_token_id: None takes the tokenizer's. Ids may
            be equal.
        special_token_ids: ids that are never cut out, beside those above, padding and the tokenizer's special tokens.
        sentence_end_token_ids: ids that end a sentence; None asks the tokenizer.
        overlong: a document that may need more than a row is split into pieces that count as documents of their own
            before anything is cut out, or raises. Spans are never truncated.

    Raises:
        ValueError: arguments that do not go together, or an id that neither the tokenizer nor an argument gives; when
            called, as `DataCollatorForCausalLM`.
    """

    mixture: Mapping[str, float] = field(default_factory=MIXTURE.copy)
    mask_fraction: float = 0.15
    mean_span_length: float = 3.0
    document_fraction: tuple[float, float] = (0.5, 1.0)
    gmask_counts: bool = False
    mask_token_id: int | None = None
    smask_token_id: int | None = None
    gmask_token_id: int | None = None
    sop_token_id: int | None = None
    eop_token_id: int | None = None
    special_token_ids: Iterable[int] = ()
    sentence_end_token_ids: Iterable[int] | None = None

    allowed_overlong = ("split", "error")
    scorable = "a document needs a token that is not special"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_settings()
        weights = {kind: self.mixture[kind] for kind in BLANKS if self.mixture.get(kind)}
        self._kinds = list(weights)
        self._kind_cdf = np.cumsum(list(weights.values())) / sum(weights.values())
        named = [self._find_id(BLANKS[kind]) for kind in weights]
        named += [self._find_id("sop_token_id"), self._find_id("eop_token_id"), self.pad_token_id]
        own = set() if self.tokenizer is None else special_ids(self.tokenizer)
        self._special = id_table(own.union(named, self.special_token_ids))
        self._lengths = poisson_cdf(self.mean_span_length)
        self._find_ends = self._sentence_ends() if "sentence" in weights else None
        self._longest = None
        if self.max_length is not None:
            self._longest = bisect_right(range(self.max_length), self.max_length - 1, key=self.most_slots) - 1
            if self._longest < 1:
                raise ValueError(f"`max_length` is {self.max_length}; a document of one token needs 4 slots")

    def _check_settings(self) -> None:
        weights = list(self.mixture.values())
        if (
            set(self.mixture) - set(BLANKS)
            or not all(0 <= weight < math.inf for weight in weights)
            or not any(weights)
        ):
            raise ValueError(
                f"`mixture` is {self.mixture}; needed: weights from 0 on of {', '.join(BLANKS)}, not all 0"
            )
        if not 0.0 < self.mask_fraction <= 0.5:
            raise ValueError(f"`mask_fraction` is {self.mask_fraction}; needed: above 0 and at most 0.5")
        if not 0.0 < self.mean_span_length < math.inf:
            raise ValueError(f"`mean_span_length` is {self.mean_span_length}; needed: above 0")
        low, high = self.document_fraction
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"`document_fraction` is {self.document_fraction}; needed: 0 < shortest <= longest <= 1")

    def _find_id(self, name: str) -> int:
        if getattr(self, name) is None:
            setattr(self, name, getattr(self.tokenizer, name, None))
        if getattr(self, name) is None:
            raise ValueError(f"no `{name}`: give it, or a `tokenizer` that has one")
        return getattr(self, name)

    def _sentence_ends(self) -> SentenceEnds | ListedEnds:
        if self.sentence_end_token_ids is not None:
            return ListedEnds(self.sentence_end_token_ids)
        if self.tokenizer is None:
            raise ValueError(
                "nothing tells where sentences end: give `sentence_end_token_ids` or a `tokenizer`, or a `mixture` "
                'without "sentence"'
            )
        return SentenceEnds(self.tokenizer)

    def most_slots(self, tokens: int) -> int:
        """The tokens that a document of `tokens` tokens may become, at most, in any epoch."""
        return tokens + 2 * self._most_spans(tokens) if tokens else 0

    def _most_spans(self, tokens: int) -> int:
        if self._kinds == ["document"]:
            return 1
        return most_spans(tokens, self.mask_fraction, self.mean_span_length)

    def _prompts(self, piece: Piece, epoch: int) -> np.ndarray:
        # What a row keeps with `fixed_prefixes`: that its draws are those of epoch 0.
        return np.zeros_like(piece.input_ids)

    def _read(self, sample: Any) -> tuple[list[Piece], bool]:
        ids, scored, columns = self._ids_and_scored(sample)
        is_row, fixed = "document_ids" in columns, columns.get("prefix_mask")
        if not is_row:
            parts = self._fit(scored)
        elif not self.packing:
            raise ValueError("a sample with `document_ids` is a packed row; this collator has `packing=False`")
        elif fixed is not None and fixed.any():
            raise ValueError("a packed row holds the prefixes of another collator in `prefix_mask`")
        else:
            parts = cut_by_documents(columns["document_ids"])
            slots = sum(self.most_slots(part.stop - part.start) for part in parts)
            if slots >= self.max_length:
                raise ValueError(
                    f"a packed row may need {slots} slots for its documents with blanks, and one for the last end "
                    f"token; `max_length` is {self.max_length}: pack with this collator"
                )
        maskable = scored & ~look_up(self._special, ids)
        labels = np.where(maskable, ids, IGNORE_INDEX)
        return [Piece(ids[part], labels[part], fixed if fixed is None else fixed[part]) for part in parts], is_row

    def _fit(self, scored: np.ndarray) -> list[slice]:
        count, longest = len(scored), self._longest
        if longest is None or count <= longest:
            return [slice(0, count)]
        if self.overlong == "error":
            raise ValueError(
                f"a document has {count} tokens; with blanks, `max_length` ({self.max_length}) allows {longest}, and "
                '`overlong` is "error"'
            )
        return [slice(start, start + longest) for start in range(0, count, longest)]

    def _pack(self, pieces: list[Piece]) -> list[list[Piece]]:
        slots = [self.most_slots(len(piece.input_ids)) for piece in pieces]
        return [[pieces[index] for index in row] for row in best_fit_decreasing(slots, self.max_length - 1)]

    def _document(self, piece: Piece) -> GLMSample:
        draw = draws(self.seed, self.epoch if piece.prefix_mask is None else 0, piece.input_ids)
        kind = self._kinds[int(np.searchsorted(self._kind_cdf, draw(1)[0], side="right"))]
        spans = self._spans(kind, piece, draw)
        return corrupt(
            piece.input_ids,
            spans,
            np.argsort(draw(len(spans))),
            mask_token_id=getattr(self, BLANKS[kind]),
            sop_token_id=self.sop_token_id,
            eop_token_id=self.eop_token_id,
            counting=self.gmask_counts and kind == "document",
        )

    def _spans(self, kind: str, piece: Piece, draw: Draw) -> np.ndarray:
        maskable = piece.labels != IGNORE_INDEX
        limit = self._most_spans(len(maskable))
        if kind == "token":
            return token_spans(maskable, self.mask_fraction, limit, self._lengths, draw)
        if kind == "sentence":
            return sentence_spans(maskable, self._find_ends(piece.input_ids), self.mask_fraction, limit, draw)
        return document_span(maskable, self.document_fraction, draw)

    def _extra_columns(self) -> dict[str, int]:
        return dict.fromkeys(("position_ids", "block_position_ids", "prefix_mask", "document_ids"), 0)

    def _tensors(self, rows: list[list[GLMSample]]) -> dict[str, torch.Tensor]:
        width = self._width(1 + max(sum(len(document.input_ids) for document in row) for row in rows))
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX, **self._extra_columns()}
        batch = {name: np.full((len(rows), width), fill, np.int64) for name, fill in fills.items()}
        for index, row in enumerate(rows):
            for name, values in row_columns(row).items():
                batch[name][index, : len(values)] = values
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def row_columns(row: Sequence[GLMSample]) -> dict[str, np.ndarray]:
    """The documents of a row one after the other: int64 [tokens] each, `labels` [tokens + 1]."""
    lengths = np.array([len(document.input_ids) for document in row])
    ends = lengths.cumsum()
    labels = [document.labels[:-1] for document in row]
    columns = {
        "input_ids": np.concatenate([document.input_ids for document in row]),
        "attention_mask": np.ones(ends[-1], np.int64),
        "labels": np.concatenate([*labels, [IGNORE_INDEX]]),
        "position_ids": np.concatenate([document.position_ids for document in row]),
        "block_position_ids": np.concatenate([document.block_position_ids for document in row]),
        "document_ids": np.repeat(np.arange(1, len(row) + 1), lengths),
    }
    columns["prefix_mask"] = (columns["block_position_ids"] == 0).astype(np.int64)
    # The slot behind a document, its neighbour's first or padding, is labelled for this document alone.
    columns["labels"][ends] = [document.labels[-1] for document in row]
    return columns


def draws(seed: int, epoch: int, ids: np.ndarray) -> Draw:
    """A stream of uniform numbers that depends on the seed, the epoch and the ids and on nothing else.

    It is built on the raw bits of PCG64, whose sequence numpy promises to keep between versions.
    """
    bits = np.random.PCG64(int(uniform_draw(seed, epoch, ids) * 2**53))
    return lambda count: (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53
