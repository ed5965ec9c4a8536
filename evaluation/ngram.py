"""Unigram and bigram models over token ids: what a language model has to beat."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minillm.evaluation.perplexity import IGNORE_INDEX, Collator, PerplexityResult, batches


class UnigramModel:
    """p(w) = (count(w) + 1) / (tokens + vocabulary size): frequencies with add-one smoothing.

    Args:
        documents: token ids of the training documents.
        vocab_size: ids run from 0 to vocab_size - 1.

    Raises:
        ValueError: no tokens, or an id out of range.
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
        tokens = np.concatenate([_ids(document, vocab_size) for document in documents] or [np.empty(0, np.int64)])
        if len(tokens) == 0:
            raise ValueError("there are no tokens to count")
        counts = np.bincount(tokens, minlength=vocab_size)
        self.vocab_size = vocab_size
        self.probabilities = (counts + 1) / (len(tokens) + vocab_size)

    def log_prob(self, previous: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """log p of each of `tokens` [n] in nats; the tokens before them, `previous` [n], do not matter."""
        return np.log(self.probabilities[tokens])


class BigramModel:
    """The interpolated Kneser-Ney bigram model (Kneser & Ney 1995, in the interpolated form of Chen & Goodman 1999).

        p(w | v) = max(c(v w) - D, 0) / c(v .) + D N(v .) / c(v .) q(w)
        q(w)     = max(N(. w) - D, 0) / N(. .) + D |{w: N(. w) > 0}| / N(. .) / vocabulary size

    c counts pairs of neighbours within a document, N(v .) the distinct successors of v, N(. w) the distinct
    predecessors of w, N(. .) the distinct pairs; D = n1 / (n1 + 2 n2) from the pairs seen once and twice (0.75 where
    that is 0 or 1). After a token that was never followed by another, p = q. No token has probability 0.

    Args:
        documents: token ids of the training documents.
        vocab_size: ids run from 0 to vocab_size - 1.

    Raises:
        ValueError: no document of two tokens, or an id out of range.
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
        arrays = [_ids(document, vocab_size) for document in documents]
        pairs = [array[:-1] * vocab_size + array[1:] for array in arrays if len(array) > 1]
        if not pairs:
            raise ValueError("there are no pairs of tokens to count: no document has two tokens")
        # A pair (v, w) is the number v * vocab_size + w.
        self.pairs, counts = np.unique(np.concatenate(pairs), return_counts=True)
        self.vocab_size = vocab_size
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once and twice else 0.75
        first, second = np.divmod(self.pairs, vocab_size)
        self.totals = np.bincount(first, counts, vocab_size)
        self.discounted = counts - discount
        self.backoff = discount * np.bincount(first, minlength=vocab_size) / np.maximum(self.totals, 1)
        self.backoff[self.totals == 0] = 1.0
        predecessors = np.bincount(second, minlength=vocab_size)
        uniform = discount * (predecessors > 0).sum() / vocab_size
        self.continuation = (np.maximum(predecessors - discount, 0) + uniform) / len(self.pairs)

    def log_prob(self, previous: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """log p(tokens[i] | previous[i]) in nats, both int64 [n]."""
        pair = previous * self.vocab_size + tokens
        place = np.searchsorted(self.pairs, pair).clip(max=len(self.pairs) - 1)
        seen = np.where(self.pairs[place] == pair, self.discounted[place], 0.0)
        direct = seen / np.maximum(self.totals[previous], 1)
        return np.log(direct + self.backoff[previous] * self.continuation[tokens])


def ngram_perplexity(
    ngram: UnigramModel | BigramModel, dataset: Sequence[Any], collator: Collator, batch_size: int = 64
) -> PerplexityResult:
    """The perplexity of an n-gram model on the very tokens that `perplexity` scores with the same data and collator:
    those whose label is not -100, each after the token before it.

    Raises:
        ValueError: nothing to score, or an id that the model does not know.
    """
    total, count = 0.0, 0
    for batch in batches(dataset, collator, batch_size):
        ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        row, token = np.nonzero(labels[:, 1:] != IGNORE_INDEX)
        # Not the id in that slot: GLM's end tokens are labels only.
        previous, tokens = ids[row, token], labels[row, token + 1]
        _ids(tokens, ngram.vocab_size)
        total -= ngram.log_prob(previous, tokens).sum()
        count += len(tokens)
    return PerplexityResult.from_sum(float(total), count)


def _ids(values: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    ids = np.asarray(values, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids run from {ids.min()} to {ids.max()}; the vocabulary has 0 to {vocab_size - 1}")
    return ids
