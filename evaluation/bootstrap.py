"""How far a figure would move with other documents or items of the same kind: the bootstrap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Numbers of units drawn at a time: 80 MB.
MOST_DRAWS = 10_000_000


class Interval(NamedTuple):
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """sum(values) / sum(weights), with the percentile interval of Efron's bootstrap over the units (documents, items).

    Loss per byte has the losses of documents as values and their bytes as weights; accuracy has 0 and 1 as values and
    no weights. For a paired difference the values are the differences of each unit, so both sides of it are drawn
    together. Of one unit nothing can be drawn but itself: its interval has no width.

    Args:
        values: one number for each unit, [n].
        weights: positive numbers, [n]; None: 1 each, so that the figure is the mean.
        confidence: share of the resamples between the ends.
        resamples: how many times n units are drawn with replacement.
        seed: of the draws; the same for the same numbers.

    Raises:
        ValueError: no values, values and weights of other lengths, a value that is no finite number, a weight that is
            not above 0, or `confidence` or `resamples` out of range.
    """
    sums = np.asarray(values, np.float64)
    counts = np.ones_like(sums) if weights is None else np.asarray(weights, np.float64)
    if sums.ndim != 1 or len(sums) == 0 or sums.shape != counts.shape:
        raise ValueError(f"needed: as many weights as values, at least one; got {counts.shape} and {sums.shape}")
    if not np.isfinite(sums).all() or not (np.isfinite(counts) & (counts > 0)).all():
        raise ValueError("values must be finite numbers, and weights finite ones above 0")
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise ValueError(f"needed: 0 < confidence < 1 and resamples >= 1; got {confidence} and {resamples}")
    rng = np.random.default_rng(seed)
    step = max(1, MOST_DRAWS // len(sums))
    figures = []
    for start in range(0, resamples, step):
        drawn = rng.integers(len(sums), size=(min(step, resamples - start), len(sums)))
        figures.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    outside = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(figures), [outside, 1.0 - outside])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))
