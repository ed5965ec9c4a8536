"""What differences between trained variants say: intervals over seeds, and verdicts that hold for several at once.

The seed is what is drawn again when an experiment is repeated, so it is the unit: two variants are compared seed by
seed, and the spread of these differences gives the interval. Documents that all seeds are scored on are a second
sample, whose share of the spread is added. Needs scipy (the extra `report`).
"""

import math
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import numpy as np

LEAST_SEEDS = 5
"""With fewer, a difference is reported without a verdict."""


class Kind(str, Enum):
    """What is said of a variant beside the one that it is compared with; lower values are better."""

    better = "better"
    worse = "worse"
    equal = "equal"
    undecided = "not decided"


class Interval(NamedTuple):
    """A mean difference and its two-sided t interval.

    Attributes:
        mean: of the differences.
        low, high: ends of the interval.
        error: standard error of the mean.
        freedom: degrees of freedom, by Satterthwaite where documents are counted.
        deviation: standard deviation of the differences of single seeds.
        seeds: how many.
    """

    mean: float
    low: float
    high: float
    error: float
    freedom: float
    deviation: float
    seeds: int


class Verdict(NamedTuple):
    """What one comparison says, beside the others that were made with it.

    Attributes:
        name: of the comparison.
        kind: better, worse, equal or not decided.
        interval: of this comparison alone.
        p_difference: p value of "there is no difference", adjusted by Holm for all comparisons.
        p_equality: p value of "the difference is at least the margin", of two one-sided tests, adjusted likewise.
        margin: what counts as equal.
        level: of the study.
    """

    name: str
    kind: Kind
    interval: Interval
    p_difference: float
    p_equality: float
    margin: float
    level: float

    @property
    def seeds_needed(self) -> int | None:
        """Seeds with which a difference of the margin would be found in four of five studies; None where the seeds at
        hand do not differ."""
        deviation = self.interval.deviation
        return seeds_needed(deviation, self.margin, self.level) if deviation > 0 else None

    @property
    def words(self) -> str:
        """The verdict in words, with the interval of what it says."""
        interval = self.interval
        if interval.seeds < LEAST_SEEDS:
            return f"{interval.mean:+.4f}; no verdict from {interval.seeds} seeds (at least {LEAST_SEEDS})"
        if self.kind is Kind.undecided:
            about = "" if self.seeds_needed is None else f" (about {self.seeds_needed} seeds for {self.margin:.3g})"
            return f"not decided{about}: {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
        if self.kind is Kind.equal:
            return f"equal within {self.margin:.3g}: [{interval.low:+.4f}, {interval.high:+.4f}]"
        low, high = sorted((abs(interval.low), abs(interval.high)))
        return f"{self.kind.value} by [{low:.4f}, {high:.4f}]"


def paired_interval(differences: np.ndarray, level: float = 0.95) -> Interval:
    """The t interval of a mean difference.

    Of `differences` [seeds, documents], two-way: the variance of the mean is that of seeds plus that of documents,
    since both would be drawn again, less what they have in common; degrees of freedom by Satterthwaite (1946). Where
    the interval over seeds alone is wider, it is that: with few seeds the two-way one may be too narrow by chance.

    Args:
        differences: one variant's values less the other's, with the same seeds: [seeds], or [seeds, documents] where
            all seeds were scored on the same documents.
        level: share of studies whose interval holds the true difference.

    Raises:
        ValueError: fewer than 2 seeds, values that are not finite, or another shape; a `level` outside of 0 and 1.
    """
    from scipy import special  # pyright: ignore[reportMissingImports]

    values = np.asarray(differences, np.float64)
    if values.ndim not in (1, 2) or values.shape[0] < 2 or values.size == 0:
        raise ValueError(
            f"`differences` have shape {list(values.shape)}; needed: [seeds] or [seeds, documents], 2 seeds"
        )
    if not np.isfinite(values).all():
        raise ValueError("`differences` hold a value that is not finite: leave out seeds that failed")
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}; it must lie between 0 and 1")
    by_seed = values if values.ndim == 1 else values.mean(1)
    seeds, mean = len(by_seed), float(by_seed.mean())
    ways = [(float(by_seed.var(ddof=1)) / seeds, float(seeds - 1))]
    if values.ndim == 2 and values.shape[1] > 1:
        ways.append(with_documents(values))
    quantiles = [float(special.stdtrit(freedom, (1 + level) / 2)) for _, freedom in ways]
    half, (variance, freedom) = max(
        (math.sqrt(way[0]) * quantile, way) for way, quantile in zip(ways, quantiles, strict=True)
    )
    return Interval(mean, mean - half, mean + half, math.sqrt(variance), freedom, float(by_seed.std(ddof=1)), seeds)


def with_documents(values: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of [seeds, documents] with both drawn anew, at least 0, and its degrees of freedom."""
    seeds, documents = values.shape
    # Mean squares of the two-way layout without replication.
    seed_square = documents * float(values.mean(1).var(ddof=1))
    document_square = seeds * float(values.mean(0).var(ddof=1))
    rest = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    rest_square = float((rest**2).sum()) / ((seeds - 1) * (documents - 1))
    total = seed_square + document_square - rest_square
    if total <= 0:
        return 0.0, float(seeds - 1)
    parts = (
        seed_square**2 / (seeds - 1)
        + document_square**2 / (documents - 1)
        + rest_square**2 / ((seeds - 1) * (documents - 1))
    )
    return total / (seeds * documents), total**2 / parts


def verdicts(comparisons: Mapping[str, np.ndarray], margin: float, level: float = 0.95) -> dict[str, Verdict]:
    """Verdicts on several comparisons at once; the chance that any of them is wrong is at most 1 - `level`.

    A difference is told where it is significant after Holm's correction (1979) over all comparisons; equality where
    two one-sided tests (Schuirmann, 1987), corrected likewise, place it within the margin. A difference that is
    significant and within the margin is told as equal: the margin says what matters.

    Args:
        comparisons: name to differences, as `paired_interval` takes them; negative ones speak for the variant.
        margin: difference below which two variants count as equal, in the unit of the values.
        level: 0.95 for verdicts of which 5 % of studies hold a wrong one.

    Raises:
        ValueError: no comparison, a margin that is not positive, or differences as `paired_interval` refuses them.
    """
    from scipy import special  # pyright: ignore[reportMissingImports]

    if not comparisons:
        raise ValueError("there is nothing to compare")
    if not margin > 0:
        raise ValueError(f"`margin` is {margin}; it must be positive")
    intervals = {name: paired_interval(values, level) for name, values in comparisons.items()}
    of_difference, of_equality = [], []
    for interval in intervals.values():
        # Without any spread a t value is infinite or, for no difference, undefined.
        scale = interval.error or math.ulp(1.0)
        of_difference.append(2 * float(special.stdtr(interval.freedom, -abs(interval.mean) / scale)))
        of_equality.append(float(special.stdtr(interval.freedom, (abs(interval.mean) - margin) / scale)))
    found = {}
    adjusted = zip(intervals.items(), holm(of_difference), holm(of_equality), strict=True)
    for (name, interval), p_difference, p_equality in adjusted:
        kind = Kind.undecided
        if interval.seeds >= LEAST_SEEDS:
            if p_equality < 1 - level:
                kind = Kind.equal
            elif p_difference < 1 - level:
                kind = Kind.better if interval.mean < 0 else Kind.worse
        found[name] = Verdict(name, kind, interval, p_difference, p_equality, margin, level)
    return found


def holm(p_values: list[float]) -> list[float]:
    """p values adjusted for their number by Holm's method: the k-th smallest of n times n - k + 1, in rising order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power(deviation: float, difference: float, seeds: int, level: float = 0.95) -> float:
    """The chance that a paired t test with `seeds` seeds finds a true `difference` of pairs with this deviation.

    Raises:
        ValueError: fewer than 2 seeds, or a deviation that is not positive.
    """
    from scipy import special  # pyright: ignore[reportMissingImports]

    if seeds < 2 or not deviation > 0:
        raise ValueError(f"`seeds` is {seeds} (at least 2) and `deviation` {deviation} (more than 0)")
    limit = special.stdtrit(seeds - 1, (1 + level) / 2)
    shift = abs(difference) / deviation * math.sqrt(seeds)
    return float(1 - special.nctdtr(seeds - 1, shift, limit) + special.nctdtr(seeds - 1, shift, -limit))


def seeds_needed(deviation: float, difference: float, level: float = 0.95, chance: float = 0.8) -> int:
    """The least number of seeds with which a true `difference` is found with this chance.

    Raises:
        ValueError: a deviation or difference that is not positive, or a chance outside of 0 and 1.
    """
    if not (deviation > 0 and difference > 0 and 0 < chance < 1):
        raise ValueError(
            f"`deviation` is {deviation} and `difference` {difference}: both must be positive; `chance` is {chance} "
            "and must lie between 0 and 1"
        )
    enough = 2
    while power(deviation, difference, enough, level) < chance:
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (enough + short) // 2
        if middle >= 2 and power(deviation, difference, middle, level) >= chance:
            enough = middle
        else:
            short = middle
    return enough
