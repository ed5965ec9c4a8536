"""Supervised fine-tuning: predicting the answers to prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minillm.data.documents import IGNORE_INDEX, Piece, number_runs, read_answer, read_prompts
from minillm.prompts import find_prompts
from minillm.training.objective_next_token import NextToken, with_prompts


class Answers(NextToken):
    """Only the answers are predicted. A document that does not fit loses the start of its prompt, down to half of a
    row, then the end of its answer."""

    overlong = ("truncate", "error")

    def read(self, sample: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        return read_answer(sample)

    def kept_start(self, scored: np.ndarray, length: int) -> int:
        prompt = int(scored.argmax())
        answer = len(scored) - prompt
        return prompt - max(length - answer, min(prompt, length // 2))


@dataclass
class AnswersToPrefixes(Answers):
    """The answers are predicted, and each prompt sees itself in both directions.

    Args:
        answer_start_token_id, turn_token_ids, end_token_id: the tokens of a chat, by which answers that are not scored
            are told from prompts. Without the first, all but the scored answers is prompt.
    """

    answer_start_token_id: int | None = None
    turn_token_ids: Sequence[int] = ()
    end_token_id: int | None = None

    columns = ("prefix_mask",)

    def lay_out(self, piece: Piece, seed: int, epoch: int) -> dict[str, np.ndarray]:
        return with_prompts(piece, self._prompts(piece) if piece.prefix_mask is None else piece.prefix_mask)

    def _prompts(self, piece: Piece) -> np.ndarray:
        outside = piece.labels == IGNORE_INDEX
        if self.answer_start_token_id is None:
            return number_runs(outside)
        ends = [] if self.end_token_id is None else [self.end_token_id]
        ids = torch.from_numpy(piece.input_ids)[None]
        found = find_prompts(ids, self.answer_start_token_id, self.turn_token_ids, ends)
        return number_runs(outside & (found[0].numpy() > 0))

    def fix(self, piece: Piece, seed: int) -> np.ndarray:
        return self._prompts(piece)

    def check_fixed(self, mask: np.ndarray) -> np.ndarray:
        return read_prompts(mask)
