"""GLM's blank infilling as pure functions: which spans to cut out of a text, and the model's inputs without them.

Sources: the GLM paper (arXiv 2103.10360, sections 2.1 and 2.2) and its public pre-training code (THUDM/GLM,
blocklm_utils.py). Everywhere `draw(n)` gives n independent float64 numbers, uniform in [0, 1), and spans are int64
[spans, 2]: the first token of each and the one after its last, sorted and disjoint.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from minillm.tokenization.glm_layout import lay_out_row

Draw = Callable[[int], np.ndarray]

NO_SPANS = np.empty((0, 2), np.int64)


class GLMSample(NamedTuple):
    """A document as Part A (the text with its blanks) and then Part B (what fills them); all arrays are int64.

    Attributes:
        input_ids: [n + 2 k], for n tokens and k spans.
        labels: [n + 2 k + 1]; position t-1 predicts labels[t], and the last entry belongs to the slot after the
            document. -100 on Part A and its mask tokens.
        position_ids: [n + 2 k], the index in Part A; in a span, that of its mask token (or see `counting`).
        block_position_ids: [n + 2 k], 0 in Part A; in a span 1, 2, ... from the start token on.
        context_length: tokens of Part A, all of which see one another.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    block_position_ids: np.ndarray
    context_length: int


def corrupt(
    input_ids: np.ndarray,
    spans: np.ndarray,
    order: Sequence[int] | np.ndarray | None = None,
    *,
    mask_token_id: int,
    sop_token_id: int,
    eop_token_id: int,
    counting: bool = False,
) -> GLMSample:
    """Cuts spans out of a text and appends them, each after a start token (arXiv 2103.10360, section 2.1, figure 2).

    The paper's own example, a text x1 ... x6 without x3 and x5 x6, the second span first:

        corrupt([11, 12, 13, 14, 15, 16], [[2, 3], [4, 6]], [1, 0], mask_token_id=1, sop_token_id=2, eop_token_id=3)

        slot                 0    1    2    3    4    5   6   7   8   9   after
        input_ids           11   12    1   14    1    2  15  16   2  13
        labels            -100 -100 -100 -100 -100 -100  15  16   3  13   3
        position_ids         0    1    2    3    4    4   4   4   2   2
        block_position_ids   0    0    0    0    0    1   2   3   1   2
        context_length = 5

    Slot 7 (the 16) is the last of its span, so labels[8] is the end token: it is predicted, never read. Touching spans
    keep blanks of their own.

    Args:
        input_ids: integers [n].
        spans: [k, 2], first token and the one after the last of each span, sorted, not empty, not overlapping.
        order: the spans' order in Part B, a permutation of 0 ... k-1; None keeps that of the text.
        mask_token_id, sop_token_id, eop_token_id: the blank, the start token and the end token of a span.
        counting: the first axis of each span counts on from the end of Part A, rather than stand at the blank
            (`[gMASK]` in GLM-130B, which has one axis only).

    Raises:
        ValueError: spans that are not as described, or an order that is no permutation.
    """
    text = np.asarray(input_ids, np.int64).tolist()
    edges = np.asarray(spans, np.int64).reshape(-1, 2).tolist()
    turns = list(range(len(edges))) if order is None else np.asarray(order, np.int64).tolist()
    _check(edges, turns, len(text))
    context, blanks, done = [], [], 0
    for start, stop in edges:
        context += text[done:start]
        blanks.append(len(context))
        context.append(mask_token_id)
        done = stop
    context += text[done:]
    fills = [(blanks[number], text[slice(*edges[number])]) for number in turns]
    row = lay_out_row(context, fills, sop_token_id, eop_token_id, [mask_token_id] if counting else [])
    columns = (row.input_ids, row.labels, row.position_ids, row.block_position_ids)
    return GLMSample(*(np.array(column, np.int64) for column in columns), context_length=len(context))


def _check(spans: list[list[int]], order: list[int], count: int) -> None:
    done = 0
    for start, stop in spans:
        if start < done or stop > count:
            raise ValueError(f"spans {spans} are not sorted and disjoint within {count} tokens")
        if start >= stop:
            raise ValueError(f"spans {spans} hold an empty one")
        done = stop
    if sorted(order) != list(range(len(spans))):
        raise ValueError(f"the order {order} is no permutation of {len(spans)} spans")


def poisson_cdf(mean: float) -> np.ndarray:
    """Distribution function of span lengths 1, 2, ...: Poisson(`mean`) without 0, float64, the last entry 1.

    The tail beyond ten standard deviations is left out.
    """
    longest = math.ceil(mean + 10 * math.sqrt(mean) + 10)
    logs = [length * math.log(mean) - mean - math.lgamma(length + 1) for length in range(1, longest + 1)]
    sums = np.exp(logs).cumsum()
    return sums / sums[-1]


# Packing and every epoch ask for the same few lengths.
@functools.lru_cache(maxsize=2**14)
def most_spans(count: int, fraction: float, mean: float) -> int:
    """The most spans that a text of `count` tokens may get, two standard deviations above the expected number.

    Spans of Poisson lengths without 0 (mean m, variance v) that are to cover T tokens number about T / m, with
    variance T v / m^3 (the central limit theorem of renewal processes). It never decreases with `count`.
    """
    positive = -math.expm1(-mean)
    length = mean / positive
    variance = mean * (1 + mean) / positive - length**2
    covered = fraction * count
    expected, deviation = covered / length, math.sqrt(covered * variance / length**3)
    return max(1, min((count + 1) // 2, math.ceil(expected + 2 * deviation)))


def token_spans(maskable: np.ndarray, fraction: float, limit: int, lengths: np.ndarray, draw: Draw) -> np.ndarray:
    """Spans of random lengths at random places, drawn until they cover `fraction` of the maskable tokens.

    A token at least stays between two spans. A span that does not fit is shortened, so that a text of two tokens or
    more keeps one of them. Spans never hold a token that is not maskable: one that meets such a token goes on after
    it as a span of its own.

    Args:
        maskable: boolean [n], the tokens that may be blanked.
        fraction: above 0, at most 0.5.
        limit: the most spans; of more, the longest stay.
        lengths: distribution function of the lengths 1, 2, ..., as from `poisson_cdf`.
    """
    ordinary = np.flatnonzero(maskable)
    count = len(ordinary)
    if count == 0:
        return NO_SPANS
    sizes = 1 + lengths.searchsorted(draw(limit), side="right")
    covered = sizes.cumsum()
    number = min(limit, 1 + int(covered.searchsorted(fraction * count)))
    sizes = sizes[:number]
    room = count - (number - 1) - (covered[number - 1] - sizes[-1]) - (number == 1 < count)
    sizes[-1] = min(sizes[-1], room)
    # The last one drawn is longer than most, since it crossed the mark; it must not always be the text's last.
    sizes = sizes[draw(number).argsort()]
    free = count - sizes.sum() - (number - 1)
    places = (draw(number) * (free + 1)).astype(np.int64)
    places.sort()
    # Within `ordinary`: behind `places` free tokens, the spans before, and one token after each of them.
    chosen = ordinary[(places + np.arange(number)).repeat(sizes) + np.arange(sizes.sum())]
    return _longest(runs(chosen), limit)


def sentence_spans(maskable: np.ndarray, ends: np.ndarray, fraction: float, limit: int, draw: Draw) -> np.ndarray:
    """Whole sentences, drawn until they cover `fraction` of the maskable tokens.

    A sentence goes from the end of the one before it, or a token that is not maskable, to its own. Neighbours keep
    blanks of their own. One sentence at least stays, unless there is only one.

    Args:
        maskable: boolean [n].
        ends: boolean [n], the last tokens of sentences.
        fraction: of the maskable tokens, above 0.
        limit: the most spans.
    """
    ordinary = np.flatnonzero(maskable)
    if len(ordinary) == 0:
        return NO_SPANS
    sentences = runs(ordinary, ends[ordinary])
    order = np.argsort(draw(len(sentences)))
    covered = (sentences[:, 1] - sentences[:, 0])[order].cumsum()
    number = 1 + int(np.searchsorted(covered, fraction * len(ordinary)))
    number = min(number, limit, max(1, len(sentences) - 1))
    return sentences[np.sort(order[:number])]


def document_span(maskable: np.ndarray, fractions: tuple[float, float], draw: Draw) -> np.ndarray:
    """One span up to the last maskable token; its length is uniform between two fractions of their number.

    Where it would hold a token that is not maskable, it begins after the last of these.
    """
    ordinary = np.flatnonzero(maskable)
    count = len(ordinary)
    if count == 0:
        return NO_SPANS
    longest = max(1, int(fractions[1] * count))
    shortest = min(longest, max(1, math.ceil(fractions[0] * count)))
    length = shortest + int(draw(1)[0] * (longest - shortest + 1))
    return runs(ordinary[count - length :])[-1:]


def runs(places: np.ndarray, ends: np.ndarray | None = None) -> np.ndarray:
    """The runs of consecutive numbers among sorted `places` [n], as spans; `ends` [n] ends a run after a place too."""
    breaks = places[1:] - places[:-1] != 1
    if ends is not None:
        breaks |= ends[:-1]
    last = np.flatnonzero(breaks)
    spans = np.empty((len(last) + 1, 2), np.int64)
    spans[0, 0], spans[1:, 0] = places[0], places[last + 1]
    spans[:-1, 1], spans[-1, 1] = places[last] + 1, places[-1] + 1
    return spans


def _longest(spans: np.ndarray, limit: int) -> np.ndarray:
    if len(spans) <= limit:
        return spans
    sizes = spans[:, 1] - spans[:, 0]
    return spans[np.sort(np.argsort(-sizes, kind="stable")[:limit])]
