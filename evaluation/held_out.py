"""Held-out rows scored token by token: perplexity with its interval, and the loss of common and of rare tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from minillm.evaluation.bootstrap import bootstrap_interval
from minillm.evaluation.perplexity import IGNORE_INDEX, Collator, PerplexityResult, batches, token_nll
from minillm.training.put_back import evaluating

GROUPS = 10


@dataclass
class HeldOutScore:
    """The losses of held-out rows.

    Attributes:
        losses: summed negative log likelihood of each document, or of each piece that a row holds of one, in nats.
        tokens: number of scored tokens of each.
        loss_of_id: float64 [vocabulary], summed loss of the tokens of each id.
        count_of_id: int64 [vocabulary], how often each id was scored.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    loss_of_id: np.ndarray = field(default_factory=lambda: np.zeros(0))
    count_of_id: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def result(self) -> PerplexityResult:
        """The perplexity of all scored tokens. ValueError without any."""
        return PerplexityResult.from_sum(sum(self.losses), sum(self.tokens))

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """Perplexities between which 95 % of those lie that documents drawn anew from these have."""
        # In one order, whichever process scored which: the draws go by numbers.
        parts = sorted(zip(self.tokens, self.losses, strict=True))
        found = bootstrap_interval([loss for _, loss in parts], [count for count, _ in parts], seed=seed)
        return float(np.exp(min(found.low, 709.0))), float(np.exp(min(found.high, 709.0)))

    def add(self, other: "HeldOutScore") -> None:
        """Takes in what another one scored."""
        self.losses += other.losses
        self.tokens += other.tokens
        size = max(len(self.loss_of_id), len(other.loss_of_id))
        self.loss_of_id = grown(self.loss_of_id, size) + grown(other.loss_of_id, size)
        self.count_of_id = grown(self.count_of_id, size) + grown(other.count_of_id, size)


def grown(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)))


def score_held_out(
    model: PreTrainedModel,
    rows: Sequence[Any],
    collator: Collator,
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda count: None,
) -> HeldOutScore:
    """Scores rows as `perplexity` does, and keeps what each document and each token id had.

    Args:
        model, rows, collator, batch_size: as for `perplexity`.
        advance: told the number of rows after each batch; what it raises ends the scoring.

    Raises:
        ValueError: as `perplexity`.
    """
    score = HeldOutScore()
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            for batch in batches(part, collator, batch_size):
                score.add(score_batch(token_nll(model, batch), batch))
            advance(len(part))
    return score


def score_batch(losses: torch.Tensor, batch: dict[str, torch.Tensor]) -> HeldOutScore:
    """The losses of a batch, as `token_nll` gives them, by document and by id."""
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORE_INDEX
    # Of the token before: GLM labels the slot behind a document.
    documents = batch.get("document_ids", torch.zeros_like(batch["labels"]))[:, :-1]
    places = torch.stack([torch.nonzero(scored)[:, 0], documents[scored]])
    _, numbers = torch.unique(places, dim=1, return_inverse=True)
    values, ids = losses.double().cpu().numpy(), labels[scored].numpy()
    return HeldOutScore(
        losses=np.bincount(numbers.numpy(), values).tolist(),
        tokens=np.bincount(numbers.numpy()).tolist(),
        loss_of_id=np.bincount(ids, values),
        count_of_id=np.bincount(ids),
    )


def loss_by_frequency(score: HeldOutScore, counts: np.ndarray) -> list[dict[str, Any]]:
    """The mean loss of scored tokens by how frequent they were in training, commonest first.

    The ids are sorted by frequency and cut into tenths of all training tokens: the first tenth is that of the few
    commonest ids. An id belongs where the middle of its share lies; ids that never occurred have a group of their own.

    Args:
        counts: [vocabulary], how often each id occurred in training.

    Returns:
        For each group with scored tokens: `group` (1 to 10, 0 for ids never seen), `ids` (how many it has), `tokens`
            (how many were scored) and `loss` (their mean, in nats).
    """
    size = max(len(counts), len(score.count_of_id))
    counts, seen = grown(np.asarray(counts), size), grown(score.count_of_id, size)
    losses = grown(score.loss_of_id, size)
    order = np.argsort(-counts, kind="stable")
    middles = np.cumsum(counts[order]) - counts[order] / 2
    groups = np.zeros(size, np.int64)
    groups[order] = np.minimum(GROUPS, 1 + (GROUPS * middles / max(1, counts.sum())).astype(np.int64))
    groups[counts == 0] = 0
    found = []
    for group in (*range(1, GROUPS + 1), 0):
        own = groups == group
        if tokens := int(seen[own].sum()):
            found.append(
                {"group": group, "ids": int(own.sum()), "tokens": tokens, "loss": float(losses[own].sum() / tokens)}
            )
    return found
