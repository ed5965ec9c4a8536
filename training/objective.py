"""What an objective is: what a model is to learn from a document, whatever rows and batches it goes into."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from minillm.data.documents import DRAWN_AS_IN_EPOCH_0, Piece, read_ids, read_scored


class Objective(ABC):
    """What a model is to learn from a document. It sees one document at a time: a `DocumentCollator` reads samples by
    it, fits documents into rows, pads them and makes tensors.

    A subclass gives `lay_out`, the names of what that makes in `columns`, and `slots` if a document grows. The rest is
    there for those that are told otherwise what to score, or keep a row's random draws in another way.

    Attributes:
        columns: names of the model's inputs that are made beside `input_ids`, `labels` and `attention_mask`, 0 at
            padding. `document_ids` and `position_ids` go into packed rows anyway.
        overlong: what may be done with a document that does not fit into a row: of "split", "truncate" and "error".
        scorable: what a document needs to have a token to score, for messages.
        scores_first: whether a document's first token can be scored, since something is put before it.
        added: what a document has beside its tokens when it is laid out, for messages.
        behind: what is predicted in the slot behind a document, be it another document's first one or padding; for
            messages. Rows keep a slot for it.
    """

    columns: tuple[str, ...] = ()
    overlong: tuple[str, ...] = ("split", "truncate", "error")
    scorable: str = "a document needs two tokens"
    scores_first: bool = False
    added: str = ""
    behind: str = ""

    @abstractmethod
    def lay_out(self, piece: Piece, seed: int, epoch: int) -> dict[str, np.ndarray]:
        """The model's inputs of one document, int64 or boolean [slots] each: `input_ids`, `labels` and those in
        `columns` but for `document_ids`. Anything else raises a ValueError when a batch is made.

        Position t-1 predicts `labels[t]`; `labels[0]` is -100, and with `behind` there is an entry more, for the slot
        behind the document. `position_ids` may be left out, in `columns` or not: the slots are then counted.

        Args:
            piece: the document; its `prefix_mask` is what `fix` made, or None.
            seed, epoch: with the document's ids they decide all random draws, by `draws`. A
                piece with fixed draws comes with epoch 0.
        """

    def slots(self, tokens: int) -> int:
        """The slots that a document of so many tokens takes, at most, in any epoch: an int from 1 on, 0 for no token,
        never decreasing. `lay_out` gives no more."""
        return tokens

    def read(self, sample: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Ids [tokens], which of them may be scored (boolean [tokens]), and the other columns of a sample.

        Raises:
            NothingToScoreError: a sample without a token, which `pack_dataset` leaves out.
            ValueError: a sample that is not as wanted.
        """
        ids, columns = read_ids(sample)
        return ids, read_scored(ids, columns), columns

    def kept_start(self, scored: np.ndarray, length: int) -> int:
        """The first of the `length` tokens that truncation keeps; `scored` is boolean [tokens]."""
        return 0

    def fix(self, piece: Piece, seed: int) -> np.ndarray | None:
        """The `prefix_mask` of a packed row, int64 [tokens], by which the document keeps the draws of epoch 0; None
        where nothing is drawn."""
        return np.full_like(piece.input_ids, DRAWN_AS_IN_EPOCH_0)

    def check_fixed(self, mask: np.ndarray) -> np.ndarray:
        """The `prefix_mask` of a document in a packed row, as `fix` made it.

        Raises:
            ValueError: it is another objective's.
        """
        if (mask != DRAWN_AS_IN_EPOCH_0).any():
            raise ValueError("a packed row holds the prefixes of another collator in `prefix_mask`")
        return mask
