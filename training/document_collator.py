"""The collator: samples to documents, documents to rows, rows to tensors, whatever is learned from them."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from minillm.data.documents import IGNORE_INDEX, NothingToScoreError, Piece, cut_by_documents
from minillm.data.packing import best_fit_decreasing
from minillm.training.laid_out import require_laid_out, require_numbers, require_objective, require_slots
from minillm.training.objective import Objective

logger = logging.get_logger(__name__)

Overlong = Literal["split", "truncate", "error"]

NO_MAX_LENGTH = '`packing=True` and `padding="max_length"` need `max_length`, the tokens in a row'


@dataclass
class DocumentCollator(ABC):
    """Fits documents into rows and makes tensors of them; what is learned from a document is its `objective`.

    A subclass gives `make_objective`, by fields of its own. For samples, tensors, arguments and errors see
    `DataCollatorForCausalLM`.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    packing: bool = True
    pad_token_id: int | None = None
    padding: Literal["longest", "max_length"] = "longest"
    pad_to_multiple_of: int | None = None
    overlong: Overlong = "split"
    seed: int = 0

    def __post_init__(self) -> None:
        # Shared memory reaches worker processes that outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._lost: Counter[str] = Counter()
        if self.pad_token_id is None:
            self.pad_token_id = _pad_token_id(self.tokenizer)
        _require_choice("padding", self.padding, ("longest", "max_length"))
        if self.max_length is None and (self.packing or self.padding == "max_length"):
            raise ValueError(NO_MAX_LENGTH)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}; a row needs at least 2 tokens to score one")
        multiple = self.pad_to_multiple_of
        if multiple is not None and (multiple < 1 or (self.max_length or multiple) % multiple):
            raise ValueError(f"`pad_to_multiple_of` is {multiple}; it must divide `max_length` ({self.max_length})")
        _require_choice("overlong", self.overlong, self.objective.overlong)
        if self._longest is not None and self._longest < 1:
            needed = self._slots(1) + bool(self.objective.behind)
            raise ValueError(f"`max_length` is {self.max_length}; a document of one token needs {needed} slots")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # These follow from the fields.
        vars(self).pop("objective", None)
        vars(self).pop("_longest", None)

    @abstractmethod
    def make_objective(self) -> Objective:
        """What is learned from a document, by this collator's fields.

        Raises:
            ValueError: fields that do not go together.
        """

    @cached_property
    def objective(self) -> Objective:
        """What is learned from a document."""
        return require_objective(self.make_objective(), self)

    @cached_property
    def _longest(self) -> int | None:
        """The tokens of the longest document that fits into a row."""
        if self.max_length is None:
            return None
        return bisect_right(range(self.max_length + 1), self._capacity, key=self._slots) - 1

    def _slots(self, tokens: int) -> int:
        return require_slots(self.objective, tokens)

    @property
    def _capacity(self) -> int:
        """The slots of a row that its documents may take."""
        if self.max_length is None:
            raise ValueError(NO_MAX_LENGTH)
        return self.max_length - bool(self.objective.behind)

    @property
    def epoch(self) -> int:
        """The epoch that random draws belong to."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the random draws, in running worker processes too."""
        self._epoch.fill_(epoch)

    def __call__(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        epoch = self.epoch
        pieces = self.rows(samples)
        rows = [[self._lay_out(piece, epoch) for piece in row] for row in pieces]
        require_laid_out(rows, pieces, self.objective, None if self.max_length is None else self._capacity)
        batch = self._tensors(rows)
        if bool((batch["labels"] == IGNORE_INDEX).all()):
            raise NothingToScoreError(
                f"none of the {len(samples)} samples of this batch holds a token to score: {self.objective.scorable}"
            )
        return batch

    def rows(self, samples: Sequence[Any], leave_out_unscored: bool = False) -> list[list[Piece]]:
        """The documents of each row, before any random draw. Samples that are rows already come first.

        Args:
            leave_out_unscored: leave out documents without a token to score, and log how many.
        """
        done, loose, empty = self._read_all(samples, leave_out_unscored)
        if leave_out_unscored:
            done, loose = self._only_scored(done, loose, empty)
        if not self.packing:
            return done + [[piece] for piece in loose]
        slots = [self._slots(len(piece.input_ids)) for piece in loose]
        return done + [[loose[index] for index in row] for row in best_fit_decreasing(slots, self._capacity)]

    def fix_prefixes(self, row: list[Piece]) -> list[Piece]:
        """The row with the draws of epoch 0; as it is, if nothing is drawn or they are fixed."""
        return [
            piece._replace(prefix_mask=self.objective.fix(piece, self.seed)) if piece.prefix_mask is None else piece
            for piece in row
        ]

    def _only_scored(
        self, done: list[list[Piece]], loose: list[Piece], empty: int
    ) -> tuple[list[list[Piece]], list[Piece]]:
        kept = [piece for piece in loose if piece.is_scored]
        kept_rows = [row for row in done if any(piece.is_scored for piece in row)]
        if not kept and not kept_rows:
            raise NothingToScoreError(f"the data set holds no token to score: {self.objective.scorable}")
        lost = empty + len(loose) - len(kept) + len(done) - len(kept_rows)
        if lost:
            logger.warning(
                f"{lost} of {empty + len(loose) + len(done)} documents hold no token to score and are left out: "
                f"{self.objective.scorable}, and labels that are not all -100"
            )
        return kept_rows, kept

    def _read_all(self, samples: Sequence[Any], pass_over_empty: bool) -> tuple[list[list[Piece]], list[Piece], int]:
        """The samples that are rows already, the pieces of the others, and how many were passed over as empty."""
        if len(samples) == 0:
            raise ValueError("the collator was called without samples")
        done: list[list[Piece]] = []
        loose: list[Piece] = []
        empty = 0
        for number, sample in enumerate(samples):
            try:
                pieces, is_row = self._read(sample)
            except ValueError as error:
                if pass_over_empty and isinstance(error, NothingToScoreError):
                    empty += 1
                    continue
                raise ValueError(f"sample {number} of {len(samples)}: {error}") from error
            if is_row:
                done.append(pieces)
            else:
                loose.extend(pieces)
        return done, loose, empty

    def _read(self, sample: Any) -> tuple[list[Piece], bool]:
        """The pieces of a sample, none longer than a row takes, and whether they form a row already."""
        ids, scored, columns = self.objective.read(sample)
        is_row, fixed = "document_ids" in columns, columns.get("prefix_mask")
        spans = self._row_spans(columns["document_ids"]) if is_row else self._fit(scored)
        first = self.objective.scores_first
        masks = [None if fixed is None else self.objective.check_fixed(fixed[span]) for span in spans]
        pieces = [Piece.cut(ids[span], scored[span], mask, first) for span, mask in zip(spans, masks, strict=True)]
        return pieces, is_row

    def _row_spans(self, document_ids: np.ndarray) -> list[slice]:
        """The spans of the documents in a packed row."""
        if not self.packing:
            raise ValueError("a sample with `document_ids` is a packed row; this collator has `packing=False`")
        spans = cut_by_documents(document_ids)
        slots = sum(self.objective.slots(span.stop - span.start) for span in spans)
        if slots <= self._capacity:
            return spans
        if not self.objective.added:
            raise ValueError(f"a packed row has {slots} tokens; `max_length` is {self.max_length}")
        behind = f", and one for the last {self.objective.behind}" if self.objective.behind else ""
        raise ValueError(
            f"a packed row may need {slots} slots for its documents with {self.objective.added}{behind}; `max_length` "
            f"is {self.max_length}: pack with this collator"
        )

    def _fit(self, scored: np.ndarray) -> list[slice]:
        """The spans of a document that are kept: all of it, pieces or a part, as `overlong` says."""
        count, longest = len(scored), self._longest
        if longest is None or count <= longest:
            return [slice(0, count)]
        if self.overlong == "error":
            added = self.objective.added
            room = f"with {added}, `max_length` ({self.max_length}) allows {longest}," if added else None
            raise ValueError(
                f'a document has {count} tokens; {room or f"`max_length` is {longest}"} and `overlong` is "error"'
            )
        if self.overlong == "split":
            # A piece in which nothing could be scored begins with the last token of the piece before it.
            last = count - (1 if self.objective.scores_first else 2)
            return [slice(min(start, last), start + longest) for start in range(0, count, longest)]
        self._count_lost(count - longest)
        start = self.objective.kept_start(scored, longest)
        return [slice(start, start + longest)]

    def _count_lost(self, tokens: int) -> None:
        self._lost.update(documents=1, tokens=tokens)
        documents = self._lost["documents"]
        # At 1, 2, 4, 8, ... documents: the count stays visible without a line for each.
        if documents & (documents - 1) == 0:
            logger.warning(
                f"{documents} documents longer than max_length={self.max_length} were truncated so far; "
                f"{self._lost['tokens']} tokens dropped"
            )

    def _lay_out(self, piece: Piece, epoch: int) -> dict[str, np.ndarray]:
        return self.objective.lay_out(piece, self.seed, epoch if piece.prefix_mask is None else 0)

    def _width(self, needed: int) -> int:
        """The slots of all rows of a batch whose longest row needs `needed`."""
        width = needed
        if self.padding == "max_length":
            if self.max_length is None:
                raise ValueError(NO_MAX_LENGTH)
            width = max(needed, self.max_length)
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple

    def _tensors(self, rows: list[list[dict[str, np.ndarray]]]) -> dict[str, torch.Tensor]:
        behind = int(bool(self.objective.behind))
        counts = [[len(document["input_ids"]) for document in row] for row in rows]
        used = [sum(own) for own in counts]
        width = self._width(max(used) + behind)
        # Each document's number as often as it has slots, then 0 at padding.
        numbers = [number for own in counts for number in (*range(1, len(own) + 1), 0)]
        times = [count for own, total in zip(counts, used, strict=True) for count in (*own, width - total)]
        document_ids = np.repeat(numbers, times).reshape(len(rows), width)
        shared = {"document_ids": 0, "position_ids": 0} if self.packing else {}
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX, **shared}
        fills |= dict.fromkeys(self.objective.columns, 0)
        batch = dict.fromkeys(fills, document_ids)
        batch["attention_mask"] = (document_ids > 0).astype(np.int64)
        slots = np.arange(width)
        for name in fills.keys() - {"attention_mask", "document_ids"}:
            padding = np.full(width, fills[name])
            # A label behind a document stands on the first slot of the next one, which is labelled by no other.
            skip = behind if name == "labels" else 0
            parts = []
            for row, own, total in zip(rows, counts, used, strict=True):
                parts.append(padding[:skip])
                for document, count in zip(row, own, strict=True):
                    # Positions alone may be left out.
                    parts.append(document[name][skip:] if name in document else slots[:count])
                parts.append(padding[total + skip :])
            batch[name] = np.concatenate(parts, dtype=np.int64).reshape(len(rows), width)
        require_numbers(batch, self.objective)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def _pad_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if (value := getattr(tokenizer, name, None)) is not None:
            return value
    raise ValueError("no id for padding: give `pad_token_id`, or a `tokenizer` with a pad or an end token")


def _require_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; allowed: {', '.join(map(repr, allowed))}")
