"""What the scores of items come to: accuracies with intervals, agreement of ways, and two models side by side."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from minillm.evaluation.bootstrap import Interval, bootstrap_interval
from minillm.evaluation.item_scores import ItemScores
from minillm.evaluation.items import LETTERS, Item, cyclic_orders


def summarize_items(scores: ItemScores, seed: int = 0) -> dict[str, Any]:
    """The figures of a model on items; intervals are those of the bootstrap over items, with 95 % of the resamples.

    Returns:
        A mapping that JSON can hold:

        - `items`: how many there are.
        - `ways`: for each way `accuracy` (an interval), `items` (to which it applies), `chance` (the mean of 1 over
          the number of options; None where no option is chosen), `macro` (the mean over groups) and `groups`, `ties`
          and `unparsed`.
        - `gold_bits_per_byte`: loss of the right options in bits over their UTF-8 bytes, an interval.
        - `letters`: `position_share` of each letter, `accuracy_by_order` and its interval (with rotation).
        - `differences`: accuracy of one way less that of another on the items to which both apply, an interval.
        - `agreement`: for each pair of ways that choose options the `share` of items for which both choose the same,
          and Cohen's `kappa` (None where chance alone would have them agree always).
    """
    told: dict[str, Any] = {"items": len(scores.items), "ways": {}}
    told["ways"] = {way: describe_way(scores, way, seed) for way in scores.ways if applies(scores, way)}
    if scores.gold_nats is not None:
        pairs = [
            (nats / math.log(2), len(item.answer_text.encode("utf-8", "surrogatepass")))
            for item, nats in zip(scores.items, scores.gold_nats, strict=True)
            if nats is not None
        ]
        told["gold_bits_per_byte"] = bootstrap_interval(*zip(*pairs, strict=True), seed=seed)._asdict()
    if scores.letters is not None:
        told["letters"] = describe_letters(scores.items, scores.letters, seed)
    told["differences"] = {
        f"{one} - {other}": difference._asdict()
        for one, other in combinations(told["ways"], 2)
        if (difference := accuracy_difference(scores.correct(one), scores.correct(other), seed)) is not None
    }
    choosing = {way: chosen for way in told["ways"] if (chosen := scores.chosen(way)) is not None}
    told["agreement"] = {
        f"{one} / {other}": agreement(*chosen_by_both(scores, choosing[one], choosing[other]))
        for one, other in combinations(choosing, 2)
    }
    return told


def applies(scores: ItemScores, way: str) -> bool:
    return any(right is not None for right in scores.correct(way))


def describe_way(scores: ItemScores, way: str, seed: int) -> dict[str, Any]:
    judged = [
        (item, right) for item, right in zip(scores.items, scores.correct(way), strict=True) if right is not None
    ]
    groups: dict[str, list[bool]] = {}
    if any(item.group is not None for item, _ in judged):
        for item, right in judged:
            groups.setdefault(item.group or "", []).append(right)
    shares = {name: sum(rights) / len(rights) for name, rights in sorted(groups.items())}
    chooses = scores.chosen(way) is not None
    return {
        "accuracy": bootstrap_interval([float(right) for _, right in judged], seed=seed)._asdict(),
        "items": len(judged),
        "chance": sum(1 / len(item.options) for item, _ in judged) / len(judged) if chooses else None,
        "macro": sum(shares.values()) / len(shares) if shares else None,
        "groups": {name: {"accuracy": share, "items": len(groups[name])} for name, share in shares.items()},
        "ties": scores.ties(way),
        "unparsed": scores.unparsed(way),
    }


def describe_letters(items: Sequence[Item], letters: Sequence[list[int] | None], seed: int) -> dict[str, Any]:
    places = [place for own in letters if own is not None for place in own]
    shares = {LETTERS[place]: places.count(place) / len(places) for place in range(max(map(option_count, items)))}
    rights = []
    for item, own in zip(items, letters, strict=True):
        if own is not None:
            orders = cyclic_orders(len(item.options), len(own) > 1)
            hits = [order[place] == item.answer for order, place in zip(orders, own, strict=True)]
            rights.append(sum(hits) / len(hits))
    return {
        "position_share": shares,
        "accuracy_by_order": bootstrap_interval(rights, seed=seed)._asdict(),
        "orders": len(places),
    }


def option_count(item: Any) -> int:
    return len(item.options)


def accuracy_difference(one: Sequence[bool | None], other: Sequence[bool | None], seed: int = 0) -> Interval | None:
    """Accuracy of one less that of the other, each item with itself, over the items that both judge; None if none."""
    both = [a - b for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return bootstrap_interval(both, seed=seed) if both else None


def chosen_by_both(scores: ItemScores, one: Sequence[Any], other: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What two ways choose for the items with options."""
    kept = [(a, b) for item, a, b in zip(scores.items, one, other, strict=True) if item.options]
    return [a for a, _ in kept], [b for _, b in kept]


def agreement(one: Sequence[Any], other: Sequence[Any]) -> dict[str, float | None]:
    """The share of items for which both choose the same, and Cohen's kappa: (share - chance) / (1 - chance), where
    chance is how often choices as frequent as these would meet. An answer that names no option is a choice too.

    ValueError for lists of other lengths, or empty ones.
    """
    if not one or len(one) != len(other):
        raise ValueError(f"needed: as many choices of one as of the other, got {len(one)} and {len(other)}")
    count = len(one)
    share = sum(a == b for a, b in zip(one, other, strict=True)) / count
    expected = sum(one.count(choice) * other.count(choice) for choice in set(one)) / count**2
    return {"share": share, "kappa": None if expected == 1.0 else (share - expected) / (1.0 - expected)}


def differing_items(scores: ItemScores) -> list[dict[str, Any]]:
    """The records of the items for which not all ways choose the same option."""
    choosing = [chosen for way in scores.ways if (chosen := scores.chosen(way)) is not None]
    return [
        scores.record(index)
        for index, item in enumerate(scores.items)
        if item.options and len({chosen[index] for chosen in choosing}) > 1
    ]


def compare_items(scores: ItemScores, base: ItemScores, seed: int = 0) -> dict[str, Any]:
    """What a model gains or loses against a base model on the same items: for each way that both were scored in the
    difference of accuracies, paired by item, and how many items were gained and lost; the difference of the right
    options' bits per byte. ValueError if the items are others."""
    if scores.items != base.items:
        raise ValueError("the scores are not those of the same items")
    told: dict[str, Any] = {"ways": {}}
    for way in scores.ways:
        if way not in base.ways:
            continue
        rights, of_base = scores.correct(way), base.correct(way)
        difference = accuracy_difference(rights, of_base, seed)
        # The way applies to none of the items.
        if difference is None:
            continue
        pairs = list(zip(rights, of_base, strict=True))
        told["ways"][way] = {
            "difference": difference._asdict(),
            "gained": sum(one is True and other is False for one, other in pairs),
            "lost": sum(one is False and other is True for one, other in pairs),
        }
    if scores.gold_nats is not None and base.gold_nats is not None:
        rows = [
            ((one - other) / math.log(2), len(item.answer_text.encode("utf-8", "surrogatepass")))
            for item, one, other in zip(scores.items, scores.gold_nats, base.gold_nats, strict=True)
            if one is not None and other is not None
        ]
        told["gold_bits_per_byte"] = bootstrap_interval(*zip(*rows, strict=True), seed=seed)._asdict()
    return told


def changed_items(scores: ItemScores, base: ItemScores) -> list[dict[str, Any]]:
    """The records of the items that a model and a base model answer differently in any way, with both answers."""
    changed = []
    for index in range(len(scores.items)):
        one, other = scores.record(index), base.record(index)
        if one["correct"] != other["correct"] or one["chosen"] != other["chosen"]:
            kept = {
                name: value for name, value in other.items() if name in ("scores", "chosen", "generated", "correct")
            }
            changed.append({**one, "base": kept})
    return changed
