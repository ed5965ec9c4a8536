"""Predicting the next token."""

import numpy as np

from minillm.data.documents import IGNORE_INDEX, Piece
from minillm.training.objective import Objective


class NextToken(Objective):
    """Every token but a document's first is predicted from those before it."""

    def lay_out(self, piece: Piece, seed: int, epoch: int) -> dict[str, np.ndarray]:
        return {"input_ids": piece.input_ids, "labels": piece.labels}

    def fix(self, piece: Piece, seed: int) -> np.ndarray | None:
        return None

    def check_fixed(self, mask: np.ndarray) -> np.ndarray:
        raise ValueError("a packed row holds prefixes in `prefix_mask`; this collator marks none")


def with_prompts(piece: Piece, prompts: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a document whose prompts, k on the k-th one, see themselves in both directions: nothing on them is
    scored."""
    labels = np.where(prompts > 0, IGNORE_INDEX, piece.labels)
    return {"input_ids": piece.input_ids, "labels": labels, "prefix_mask": prompts}
