"""Verdicts against scipy, figures by hand, and simulated studies of which the truth is known."""

import importlib.util
import math
import os

import numpy as np
import pytest

from minillm.experiments.verdicts import (
    LEAST_SEEDS,
    Kind,
    holm,
    paired_interval,
    power,
    seeds_needed,
    verdicts,
    with_documents,
)

pytestmark = pytest.mark.slow
SEED = 20
STUDIES = 2000
MARGIN = 0.034
"""1 % of a loss of 3.4 nats."""


@pytest.fixture(scope="module", autouse=True)
def package():
    if importlib.util.find_spec("scipy") is None:
        if "CI" in os.environ:
            pytest.fail("CI lacks scipy")
        pytest.skip("needs pip install scipy==1.15.3")


def draws(*shape, deviation=1.0, seed=SEED):
    print(f"seed {seed}")
    return np.random.default_rng(seed).normal(0, deviation, shape)


def test_over_seeds_it_is_scipys_paired_test():
    one, two = draws(7, seed=1), draws(7, seed=2) + 0.5
    interval = paired_interval(one - two)
    from scipy import stats

    expected = stats.ttest_rel(one, two)
    low, high = expected.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9)
    assert interval.mean == pytest.approx((one - two).mean())
    found = verdicts({"a": one - two}, margin=0.1)["a"]
    assert found.p_difference == pytest.approx(expected.pvalue, rel=1e-9)


def test_two_one_sided_tests_are_scipys():
    values = draws(9, deviation=0.02) + 0.01
    from scipy import stats

    low = stats.ttest_1samp(values, -MARGIN, alternative="greater").pvalue
    high = stats.ttest_1samp(values, MARGIN, alternative="less").pvalue
    assert verdicts({"a": values}, MARGIN)["a"].p_equality == pytest.approx(max(low, high), rel=1e-9)


def test_the_two_way_layout_by_hand():
    """Two seeds, two documents: 1 3 / 5 11. Squares: seeds 36, documents 16, rest 4; variance (36 + 16 - 4) / 4."""
    values = np.array([[1.0, 3.0], [5.0, 11.0]])
    assert with_documents(values) == pytest.approx((12.0, 48**2 / (36**2 + 16**2 + 4**2)))
    interval = paired_interval(values)
    assert (interval.mean, interval.deviation) == (5.0, pytest.approx(math.sqrt(18)))
    # With one degree of freedom the interval over seeds alone is the wider one.
    assert (interval.error, interval.freedom) == (3.0, 1.0)


def test_documents_widen_the_interval_and_never_narrow_it():
    values = draws(6, 20)
    alone = paired_interval(values.mean(1))
    for document_deviation in (0.0, 5.0):
        both = paired_interval(values + draws(20, deviation=document_deviation, seed=4))
        assert both.high - both.low >= (alone.high - alone.low) * (2 if document_deviation else 1 - 1e-12)


def test_documents_that_do_not_vary_change_nothing():
    by_seed = draws(6)
    repeated = np.repeat(by_seed[:, None], 40, 1)
    assert paired_interval(repeated)[:5] == pytest.approx(paired_interval(by_seed)[:5])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("deviation", "difference", "seeds"), [(0.02, 0.034, 5), (0.02, 0.01, 34), (0.042, 0.034, 14)]
)
def test_seeds_for_a_difference(deviation, difference, seeds):
    """By (t + z)^2 * deviation^2 / difference^2, which is nearly exact."""
    found = seeds_needed(deviation, difference)
    assert abs(found - seeds) <= 1
    assert power(deviation, difference, found) >= 0.8 > power(deviation, difference, found - 1)


def studies(seeds, deviation, difference=0.0, variants=1, documents=0, document_deviation=0.06, seed=SEED):
    """Simulated differences [studies, variants, seeds] or [.., documents]."""
    rng = np.random.default_rng(seed)
    print(f"seed {seed}")
    shape = (STUDIES, variants, seeds)
    values = difference + rng.normal(0, deviation, shape)
    if not documents:
        return values
    # Documents are the same for all seeds; what remains is of a document and a seed.
    shared = rng.normal(0, document_deviation / math.sqrt(2), (STUDIES, variants, 1, documents))
    own = rng.normal(0, document_deviation / math.sqrt(2), (*shape, documents))
    return values[..., None] + shared + own


def kinds(values, margin=MARGIN):
    """The verdicts of each study, [studies, variants]."""
    return [[verdict.kind for verdict in verdicts(dict(enumerate(study)), margin).values()] for study in values]


@pytest.mark.parametrize("seeds", [5, 8, 10])
@pytest.mark.parametrize("deviation", [0.006, 0.02, 0.06])
def test_without_a_difference_at_most_six_percent_of_studies_tell_one(seeds, deviation):
    found = kinds(studies(seeds, deviation, variants=3))
    wrong = sum(any(kind in (Kind.better, Kind.worse) for kind in study) for study in found)
    assert wrong <= 0.06 * STUDIES


@pytest.mark.parametrize("seeds", [5, 8, 10])
@pytest.mark.parametrize("deviation", [0.006, 0.02, 0.06])
def test_at_the_margin_at_most_six_percent_of_studies_tell_equality(seeds, deviation):
    found = kinds(studies(seeds, deviation, difference=MARGIN, variants=2))
    assert sum(Kind.equal in study for study in found) <= 0.06 * STUDIES


@pytest.mark.parametrize("seeds", [5, 8, 10])
@pytest.mark.parametrize("deviation", [0.02, 0.06])
def test_intervals_over_seeds_and_documents_hold_the_truth(seeds, deviation):
    values = studies(seeds, deviation, difference=0.1, documents=32)[:, 0]
    inside = sum(interval.low <= 0.1 <= interval.high for interval in map(paired_interval, values))
    assert inside >= 0.94 * STUDIES
    alone = sum(
        interval.low <= 0.1 <= interval.high for interval in (paired_interval(study.mean(1)) for study in values)
    )
    assert alone < inside


@pytest.mark.parametrize("seeds", [5, 8, 10])
@pytest.mark.parametrize("deviation", [0.02, 0.042, 0.06])
def test_the_power_is_what_is_said(seeds, deviation):
    # A margin so small that nothing is called equal.
    found = kinds(studies(seeds, deviation, difference=MARGIN), margin=1e-9)
    share = sum(study[0] is Kind.worse for study in found) / STUDIES
    assert share == pytest.approx(power(deviation, MARGIN, seeds), abs=0.03)


def test_words():
    values = np.linspace(-0.03, 0.03, 6)
    said = {
        "better": values / 30 - 0.1,
        "worse": values / 30 + 0.1,
        "equal": values / 30,
        "undecided": values * 3,
    }
    words = {name: verdict.words for name, verdict in verdicts(said, margin=0.05).items()}
    assert words["better"].startswith("better by [0.09") and words["worse"].startswith("worse by [0.09")
    assert words["equal"].startswith("equal within 0.05: [-0.00")
    assert words["undecided"].startswith("not decided (about ")
    few = verdicts({"few": said["better"][: LEAST_SEEDS - 1]}, margin=0.05)["few"]
    assert few.kind is Kind.undecided and "no verdict from 4 seeds" in few.words


def test_no_spread_at_all_is_a_verdict_too():
    found = verdicts({"same": np.zeros(5), "apart": np.full(5, 0.1)}, margin=0.01)
    assert (found["same"].kind, found["apart"].kind) == (Kind.equal, Kind.worse)
    assert found["same"].seeds_needed is None


@pytest.mark.parametrize(
    ("values", "words"),
    [([0.1], "2 seeds"), (np.zeros((2, 2, 2)), r"shape \[2, 2, 2\]"), ([0.1, math.nan], "not finite"), ([], "shape")],
)
def test_what_is_no_difference_of_seeds_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        paired_interval(np.array(values))


def test_other_refusals():
    with pytest.raises(ValueError, match="nothing to compare"):
        verdicts({}, 0.1)
    with pytest.raises(ValueError, match="`margin` is 0"):
        verdicts({"a": np.zeros(5)}, 0)
    with pytest.raises(ValueError, match="`level` is 95"):
        paired_interval(np.zeros(5), level=95)
    with pytest.raises(ValueError, match="`seeds` is 1"):
        power(0.1, 0.1, 1)
    with pytest.raises(ValueError, match="`difference` 0: both"):
        seeds_needed(0.1, 0)
