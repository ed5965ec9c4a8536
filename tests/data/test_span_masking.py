"""Cutting spans out of texts: the worked example, a plain loop, and what the random spans promise."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from glm_cases import EOP, MASK, SOP, naive_corruption

from minillm.data.span_masking import (
    corrupt,
    document_span,
    most_spans,
    poisson_cdf,
    runs,
    sentence_spans,
    token_spans,
)
from minillm.tokenization.glm_layout import lay_out_row
from minillm.training.glm_collator import draws

TOKENS = {"mask_token_id": MASK, "sop_token_id": SOP, "eop_token_id": EOP}
LENGTHS = poisson_cdf(3.0)


def as_lists(sample):
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in sample]


def stream(seed):
    print(f"seed {seed}")
    return draws(seed, 0, np.arange(3))


def covered(spans):
    return int((spans[:, 1] - spans[:, 0]).sum())


def test_worked_example_of_the_documentation():
    """Figure 2 of the GLM paper: x3 and x5 x6 are cut out, the second is filled in first."""
    sample = corrupt(
        [11, 12, 13, 14, 15, 16], [[2, 3], [4, 6]], [1, 0], mask_token_id=1, sop_token_id=2, eop_token_id=3
    )
    assert as_lists(sample) == [
        [11, 12, 1, 14, 1, 2, 15, 16, 2, 13],
        [-100, -100, -100, -100, -100, -100, 15, 16, 3, 13, 3],
        [0, 1, 2, 3, 4, 4, 4, 4, 2, 2],
        [0, 0, 0, 0, 0, 1, 2, 3, 1, 2],
        5,
    ]
    assert all(value.dtype == np.int64 for value in sample[:4])


def test_touching_spans_keep_blanks_of_their_own():
    sample = corrupt([11, 12, 13, 14], [[0, 2], [2, 3]], **TOKENS)
    assert as_lists(sample) == [
        [MASK, MASK, 14, SOP, 11, 12, SOP, 13],
        [-100, -100, -100, -100, 11, 12, EOP, 13, EOP],
        [0, 1, 2, 0, 0, 0, 1, 1],
        [0, 0, 0, 1, 2, 3, 1, 2],
        3,
    ]


@pytest.mark.parametrize(
    ("ids", "spans", "expected"),
    [
        ([11, 12], [], [[11, 12], [-100] * 3, [0, 1], [0, 0], 2]),
        ([11], [[0, 1]], [[MASK, SOP, 11], [-100, -100, 11, EOP], [0, 0, 0], [0, 1, 2], 1]),
        ([], [], [[], [-100], [], [], 0]),
    ],
    ids=["no span", "one token", "no text"],
)
def test_smallest_texts(ids, spans, expected):
    assert as_lists(corrupt(ids, spans, **TOKENS)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_plain_loop(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(100):
        ids = [rng.randrange(10, 99) for _ in range(rng.randint(1, 30))]
        edges = sorted(rng.sample(range(len(ids) + 1), 2 * rng.randint(0, min(6, len(ids) + 1) // 2)))
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        if rng.random() < 0.5:  # half of the texts are cut out wholly, in touching spans
            spans = list(pairwise(sorted({0, *edges, len(ids)})))
        order = rng.sample(range(len(spans)), len(spans))
        found = corrupt(np.array(ids), np.array(spans), order, **TOKENS)
        assert as_lists(found) == list(naive_corruption(ids, spans, order, MASK)), (ids, spans, order)
        # What fills blanks in generation builds the very same row.
        context = found.input_ids[: found.context_length].tolist()
        blanks = [place for place, token in enumerate(context) if token == MASK]
        fills = [(blanks[number], ids[slice(*spans[number])]) for number in order]
        for counting in (False, True):
            row = lay_out_row(context, fills, SOP, EOP, [MASK] if counting else [])
            found = corrupt(np.array(ids), np.array(spans), order, **TOKENS, counting=counting)
            assert as_lists(found)[:4] == [row.input_ids, row.labels, row.position_ids, row.block_position_ids]
            assert found.context_length == sum(row.prefix_mask)


@pytest.mark.parametrize(
    ("spans", "order", "message"),
    [
        ([[0, 2], [1, 3]], None, "are not sorted and disjoint within 4 tokens"),
        ([[2, 3], [0, 1]], None, "are not sorted and disjoint"),
        ([[3, 5]], None, "are not sorted and disjoint within 4 tokens"),
        ([[-1, 1]], None, "are not sorted and disjoint"),
        ([[2, 2]], None, "hold an empty one"),
        ([[2, 1]], None, "hold an empty one"),
        ([[0, 1], [2, 3]], [0, 0], "is no permutation of 2 spans"),
        ([[0, 1]], [], "is no permutation of 1 spans"),
    ],
)
def test_wrong_spans_are_refused(spans, order, message):
    with pytest.raises(ValueError, match=message):
        corrupt([11, 12, 13, 14], spans, order, **TOKENS)


def test_lengths_are_those_of_a_poisson_distribution_without_zero():
    probabilities = np.diff(LENGTHS, prepend=0)
    for length in range(1, 15):
        expected = 3**length * math.exp(-3) / math.factorial(length) / (1 - math.exp(-3))
        assert probabilities[length - 1] == pytest.approx(expected, abs=1e-12)
    assert LENGTHS[-1] == 1.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_token_spans_cover_15_percent_with_poisson_lengths(seed):
    draw, maskable = stream(seed), np.ones(1000, bool)
    found = [token_spans(maskable, 0.15, most_spans(1000, 0.15, 3.0), LENGTHS, draw) for _ in range(300)]
    shares = [covered(spans) / 1000 for spans in found]
    # The last span reaches over the mark by a token or two.
    assert 0.15 < np.mean(shares) < 0.153
    lengths = np.concatenate([spans[:, 1] - spans[:, 0] for spans in found])
    counts = np.bincount(lengths, minlength=12)[1:12] / len(lengths)
    # 14,000 spans: the standard error of a share is below 0.0036.
    assert np.abs(counts - np.diff(LENGTHS, prepend=0)[:11]).max() < 0.014
    # Each place is cut out as often as any other, but for the edges.
    cut = np.zeros(1000)
    for spans in found:
        for start, stop in spans:
            cut[start:stop] += 1
    thirds = [cut[start : start + 300].mean() / 300 for start in (50, 350, 650)]
    assert max(thirds) - min(thirds) < 0.01


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.5])
def test_token_spans_fit_into_every_text(seed, fraction):
    draw, rng = stream(seed), random.Random(seed)
    for count in [*range(1, 60), 200]:
        maskable = np.array([rng.random() > 0.1 * (seed % 2) for _ in range(count)])
        limit = most_spans(count, fraction, 3.0)
        spans = token_spans(maskable, fraction, limit, LENGTHS, draw)
        ordinary = int(maskable.sum())
        assert len(spans) <= limit
        assert (spans[:, 0] < spans[:, 1]).all() and (spans[1:, 0] > spans[:-1, 1]).all()
        assert all(maskable[start:stop].all() for start, stop in spans)
        assert (len(spans) > 0) == (ordinary > 0)
        # A token stays in a text of more than one.
        assert ordinary < 2 or covered(spans) < ordinary


def test_spans_go_on_behind_a_token_that_is_not_maskable():
    maskable = np.array([True, True, False, True, True, False])
    spans = token_spans(maskable, 0.5, 6, np.array([0, 0, 1.0]), lambda count: np.zeros(count))
    assert spans.tolist() == [[0, 2], [3, 4]]
    spans = token_spans(maskable, 0.5, 1, np.array([0, 0, 1.0]), lambda count: np.zeros(count))
    assert spans.tolist() == [[0, 2]]


def test_no_span_without_a_maskable_token():
    nothing = np.zeros(5, bool)
    assert len(token_spans(nothing, 0.15, 3, LENGTHS, stream(0))) == 0
    assert len(sentence_spans(nothing, nothing, 0.15, 3, stream(0))) == 0
    assert len(document_span(nothing, (0.5, 1.0), stream(0))) == 0


def test_sentences_are_cut_at_their_ends_and_at_special_tokens():
    # a b . c . | special | d e . f
    maskable = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 1], bool)
    ends = np.array([0, 0, 1, 0, 1, 0, 0, 0, 1, 0], bool)
    assert runs(np.flatnonzero(maskable), ends[maskable]).tolist() == [[0, 3], [3, 5], [6, 9], [9, 10]]
    seen = set()
    for seed in range(40):
        spans = sentence_spans(maskable, ends, 0.3, 10, draws(seed, 0, np.arange(3)))
        assert {tuple(span) for span in spans.tolist()} <= {(0, 3), (3, 5), (6, 9), (9, 10)}
        # 0.3 of 9 tokens are 2.7: three are enough.
        assert 3 <= covered(spans) <= 5
        seen.add(tuple(map(tuple, spans.tolist())))
    assert {((0, 3),), ((6, 9),), ((0, 3), (3, 5)), ((3, 5), (9, 10))} <= seen


def test_one_sentence_stays_unless_there_is_only_one():
    three = np.array([1, 1, 1], bool)
    for seed in range(10):
        draw = draws(seed, 0, np.arange(3))
        assert len(sentence_spans(three, three, 0.9, 10, draw)) == 2
        assert len(sentence_spans(three, three, 0.9, 1, draw)) == 1
        assert sentence_spans(three, ~three, 0.1, 10, draw).tolist() == [[0, 3]]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11])
def test_document_span_is_uniform_from_half_to_all(count):
    draw = stream(count)
    spans = [document_span(np.ones(count, bool), (0.5, 1.0), draw).tolist() for _ in range(4000)]
    assert all(len(span) == 1 and span[0][1] == count for span in spans)
    lengths = [span[0][1] - span[0][0] for span in spans]
    possible = range(math.ceil(count / 2), count + 1)
    assert set(lengths) == set(possible)
    assert max(lengths.count(length) / 4000 * len(possible) for length in possible) < 1.2


def test_document_span_begins_behind_special_tokens_and_ends_before_them():
    maskable = np.array([0, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    assert document_span(maskable, (0.9, 1.0), stream(0)).tolist() == [[6, 8]]
    assert document_span(maskable, (0.1, 0.17), stream(0)).tolist() == [[7, 8]]


def test_most_spans_is_rarely_reached_and_never_decreases():
    limits = [most_spans(count, 0.15, 3.0) for count in range(1, 3000)]
    assert limits == sorted(limits) and limits[0] == 1
    # By hand for 1000: m = 3 / (1 - e^-3) = 3.157, v = 12 / (1 - e^-3) - m^2 = 2.661; 47.5 + 2 * sqrt(150 v / m^3).
    assert limits[999] == math.ceil(47.51 + 2 * math.sqrt(150 * 2.661 / 31.47)) == 55
    for count in (50, 200, 1000):
        draw = stream(count)
        numbers = [len(token_spans(np.ones(count, bool), 0.15, count, LENGTHS, draw)) for _ in range(1000)]
        assert np.mean(np.array(numbers) > limits[count - 1]) < 0.06
