"""Predicting what follows a random prefix (Raffel et al. 2020, section 3.2.1)."""

from dataclasses import dataclass

import numpy as np

from minillm.data.documents import IGNORE_INDEX, Piece, read_prompts
from minillm.training.objective import Objective
from minillm.training.objective_next_token import with_prompts
from minillm.training.random_draws import uniform_draw


@dataclass
class RandomPrefix(Objective):
    """A random part at a document's start sees itself in both directions, the rest is predicted.

    Args:
        prefix_fraction: (lowest, highest) part of a document that may become the prefix; drawn uniformly.

    Raises:
        ValueError: a part out of its range.
    """

    prefix_fraction: tuple[float, float]

    columns = ("prefix_mask",)

    def __post_init__(self) -> None:
        low, high = self.prefix_fraction
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"`prefix_fraction` is {self.prefix_fraction}; needed: 0 <= lowest <= highest <= 1")

    def lay_out(self, piece: Piece, seed: int, epoch: int) -> dict[str, np.ndarray]:
        fixed = piece.prefix_mask
        return with_prompts(piece, self._prefix(piece, seed, epoch) if fixed is None else fixed)

    def _prefix(self, piece: Piece, seed: int, epoch: int) -> np.ndarray:
        low, high = self.prefix_fraction
        draw = uniform_draw(seed, epoch, piece.input_ids)
        last_scored = np.flatnonzero(piece.labels != IGNORE_INDEX).max(initial=1)
        length = int(np.clip((low + (high - low) * draw) * len(piece.input_ids), 1, last_scored))
        return (np.arange(len(piece.input_ids)) < length).astype(np.int64)

    def fix(self, piece: Piece, seed: int) -> np.ndarray:
        return self._prefix(piece, seed, epoch=0)

    def check_fixed(self, mask: np.ndarray) -> np.ndarray:
        return read_prompts(mask)
