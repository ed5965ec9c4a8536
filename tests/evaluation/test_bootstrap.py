"""The bootstrap against a loop over its own draws, and against the interval of a normal mean."""

import random

import numpy as np
import pytest

from minillm.evaluation.bootstrap import bootstrap_interval


def naive(values, weights, resamples, seed):
    """The same draws, figure by figure."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    figures = sorted(sum(values[i] for i in row) / sum(weights[i] for i in row) for row in drawn)

    def quantile(share):
        place = share * (len(figures) - 1)
        low = int(place)
        high = min(low + 1, len(figures) - 1)
        return figures[low] + (place - low) * (figures[high] - figures[low])

    return sum(values) / sum(weights), quantile(0.025), quantile(0.975)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_ratio_of_sums_equals_a_loop(seed):
    rng = random.Random(seed)
    values = [rng.uniform(0, 9) for _ in range(11)]
    weights = [rng.randint(1, 40) for _ in values]
    assert bootstrap_interval(values, weights, resamples=97, seed=seed) == pytest.approx(
        naive(values, weights, 97, seed), rel=1e-12
    )
    assert bootstrap_interval(values, resamples=97, seed=seed) == pytest.approx(
        naive(values, [1] * 11, 97, seed), rel=1e-12
    )


def test_many_units_are_drawn_in_parts(monkeypatch):
    values = list(range(50))
    whole = bootstrap_interval(values, resamples=40, seed=1)
    monkeypatch.setattr("minillm.evaluation.bootstrap.MOST_DRAWS", 50 * 7)
    assert bootstrap_interval(values, resamples=40, seed=1) == whole


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = bootstrap_interval(values, resamples=4000, seed=0)
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_the_seed_decides():
    values = [1.0, 2.0, 5.0, 9.0]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([3.0], [2.0]) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "at least one"),
        (([1.0], [1.0, 2.0]), "as many weights"),
        (([1.0, float("nan")],), "finite"),
        (([1.0], [0.0]), "above 0"),
    ],
)
def test_bad_numbers_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(*arguments)


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"resamples": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0, 2.0], **options)
