"""GLM's objective: autoregressive blank infilling (arXiv 2103.10360, sections 2.1 and 2.2)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.data.documents import DRAWN_AS_IN_EPOCH_0, IGNORE_INDEX, Piece
from minillm.data.sentence_ends import look_up
from minillm.data.span_masking import (
    Draw,
    corrupt,
    document_span,
    most_spans,
    poisson_cdf,
    sentence_spans,
    token_spans,
)
from minillm.training.objective import Objective
from minillm.training.random_draws import draws

BLANKS = {"token": "mask_token_id", "sentence": "smask_token_id", "document": "gmask_token_id"}


@dataclass
class FilledBlanks(Objective):
    """Spans are cut out of a document (Part A) and predicted behind it, each after a start token (Part B).

    Args:
        mixture: weights of the kinds of spans, "token", "sentence" and "document".
        mask_fraction: part of a document's tokens that spans and sentences cover.
        mean_span_length: of the Poisson distribution, before zeros are left out.
        document_fraction: (shortest, longest) part of a document that the one span covers.
        gmask_counts: on the first axis a span of a document counts on from the end of Part A.
        token_ids: the blank of each kind by the names in `BLANKS`, `sop_token_id` and `eop_token_id`.
        special: boolean, True at the ids that are never cut out; see `look_up`.
        find_ends: ids [n] to boolean [n], the last tokens of sentences; needed for sentences alone.

    Raises:
        ValueError: a setting out of its range.
    """

    mixture: Mapping[str, float]
    mask_fraction: float
    mean_span_length: float
    document_fraction: tuple[float, float]
    gmask_counts: bool
    token_ids: Mapping[str, int]
    special: np.ndarray
    find_ends: Callable[[np.ndarray], np.ndarray] | None

    columns = ("position_ids", "block_position_ids", "prefix_mask", "document_ids")
    overlong = ("split", "error")
    scorable = "a document needs a token that is not special"
    scores_first = True
    added = "blanks"
    behind = "end token"

    def __post_init__(self) -> None:
        self._check_settings()
        weights = {kind: self.mixture[kind] for kind in BLANKS if self.mixture.get(kind)}
        self._kinds = list(weights)
        self._kind_cdf = np.cumsum(list(weights.values())) / sum(weights.values())
        self._lengths = poisson_cdf(self.mean_span_length)

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
        if self.mixture.get("sentence") and self.find_ends is None:
            raise ValueError("`mixture` has sentences, but `find_ends` is None, which would tell where they end")
        if not 0.0 < self.mask_fraction <= 0.5:
            raise ValueError(f"`mask_fraction` is {self.mask_fraction}; needed: above 0 and at most 0.5")
        if not 0.0 < self.mean_span_length < math.inf:
            raise ValueError(f"`mean_span_length` is {self.mean_span_length}; needed: above 0")
        low, high = self.document_fraction
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"`document_fraction` is {self.document_fraction}; needed: 0 < shortest <= longest <= 1")

    def slots(self, tokens: int) -> int:
        return tokens + 2 * self._most_spans(tokens) if tokens else 0

    def _most_spans(self, tokens: int) -> int:
        if self._kinds == ["document"]:
            return 1
        return most_spans(tokens, self.mask_fraction, self.mean_span_length)

    def read(self, sample: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        ids, scored, columns = super().read(sample)
        return ids, scored & ~look_up(self.special, ids), columns

    def lay_out(self, piece: Piece, seed: int, epoch: int) -> dict[str, np.ndarray]:
        draw = draws(seed, epoch, piece.input_ids)
        kind = self._kinds[int(self._kind_cdf.searchsorted(draw(1)[0], side="right"))]
        spans = self._spans(kind, piece, draw)
        sample = corrupt(
            piece.input_ids,
            spans,
            draw(len(spans)).argsort(),
            mask_token_id=self.token_ids[BLANKS[kind]],
            sop_token_id=self.token_ids["sop_token_id"],
            eop_token_id=self.token_ids["eop_token_id"],
            counting=self.gmask_counts and kind == "document",
        )
        return {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "position_ids": sample.position_ids,
            "block_position_ids": sample.block_position_ids,
            "prefix_mask": sample.block_position_ids == 0,
        }

    def _spans(self, kind: str, piece: Piece, draw: Draw) -> np.ndarray:
        maskable = piece.labels != IGNORE_INDEX
        limit = self._most_spans(len(maskable))
        if kind == "token":
            return token_spans(maskable, self.mask_fraction, limit, self._lengths, draw)
        if kind == "sentence" and self.find_ends is not None:
            return sentence_spans(maskable, self.find_ends(piece.input_ids), self.mask_fraction, limit, draw)
        return document_span(maskable, self.document_fraction, draw)

    def check_fixed(self, mask: np.ndarray) -> np.ndarray:
        # Zeros are how such rows were marked before.
        return super().check_fixed(mask if mask.any() else np.full_like(mask, DRAWN_AS_IN_EPOCH_0))
