"""The figures of items, worked out by hand."""

import json

import pytest

from minillm.evaluation.bootstrap import bootstrap_interval
from minillm.evaluation.item_report import (
    agreement,
    changed_items,
    compare_items,
    differing_items,
    summarize_items,
)
from minillm.evaluation.item_scores import ItemScores
from minillm.evaluation.items import parse_item
from minillm.evaluation.written_answers import judge_answer

RECORDS = [
    {"question": "a", "options": ["x", "yy"], "answer": 0, "group": "one"},
    {"question": "b", "options": ["x", "yy"], "answer": 1, "group": "one"},
    {"question": "c", "options": ["x", "yy"], "answer": 1, "group": "one"},
    {"question": "d", "options": ["x", "yy", "zzz", "w"], "answer": 2, "group": "two"},
    {"question": "e", "answers": ["7"]},
]
ITEMS = [parse_item(record, number, "item") for number, record in enumerate(RECORDS, 1)]


def scores_of(sums, chars, written, gold=(0.5, 1.0, 2.0, 4.0, None)):
    options = {"sum": [*sums, None], "char": [*chars, None]}
    verdicts = [judge_answer(item, text) for item, text in zip(ITEMS, written, strict=True)]
    letters = [[0, 1], [1, 1], [0, 0], [3, 0, 0, 0], None]
    return ItemScores(ITEMS, options, letters, verdicts, list(gold))


MODEL = scores_of(
    sums=[[-1, -2], [-1, -2], [-3, -2], [-4, -3, -2, -9]],
    chars=[[-2, -1], [-1, -1], [-3, -2], [-4, -3, -2, -9]],
    written=["x", "yy", "no", "zzz", "is 7"],
)
BASE = scores_of(
    sums=[[-1, -2], [-2, -1], [-2, -3], [-1, -3, -2, -9]],
    chars=[[-2, -1], [-1, -1], [-3, -2], [-4, -3, -2, -9]],
    written=["x", "yy", "no", "w", "8"],
    gold=(1.5, 1.0, 2.0, 3.0, None),
)


def test_accuracies_chance_groups_and_ties():
    told = summarize_items(MODEL, seed=2)
    assert json.loads(json.dumps(told)) == told
    assert told["items"] == 5 and list(told["ways"]) == ["sum", "char", "exact", "contains", "choice", "number"]
    own = told["ways"]["sum"]
    assert own["accuracy"] == bootstrap_interval([1, 0, 1, 1], seed=2)._asdict()
    assert own["chance"] == pytest.approx((3 / 2 + 1 / 4) / 4)
    assert own["groups"] == {"one": {"accuracy": pytest.approx(2 / 3), "items": 3}, "two": {"accuracy": 1, "items": 1}}
    assert own["macro"] == pytest.approx(5 / 6) and own["items"] == 4
    assert [told["ways"][way]["ties"] for way in ("sum", "char")] == [0, 1]
    assert told["ways"]["choice"]["accuracy"]["value"] == 0.75 and told["ways"]["choice"]["unparsed"] == 1
    exact = told["ways"]["exact"]
    assert exact["chance"] is None and exact["items"] == 5 and set(exact["groups"]) == {"one", "two", ""}
    assert exact["accuracy"]["value"] == 0.6 and told["ways"]["contains"]["accuracy"]["value"] == 0.8
    assert told["ways"]["number"]["accuracy"]["value"] == 1.0 and told["ways"]["number"]["items"] == 1
    # "x", "yy", "yy", "zzz": 8 bytes.
    assert told["gold_bits_per_byte"]["value"] == pytest.approx(7.5 / 8 / 0.6931471805599453)


def test_letters_have_shares_and_accuracies_over_orders():
    told = summarize_items(MODEL)["letters"]
    assert told["position_share"] == {"A": 6 / 10, "B": 3 / 10, "C": 0.0, "D": 1 / 10} and told["orders"] == 10
    # Right letters: A, B; B, A; B, A; and C, B, A, D of the last.
    assert told["accuracy_by_order"]["value"] == pytest.approx((2 / 2 + 1 / 2 + 1 / 2 + 1 / 4) / 4)


def test_differences_are_paired():
    told = summarize_items(MODEL, seed=1)["differences"]
    assert told["sum - char"] == bootstrap_interval([1, 0, 0, 0], seed=1)._asdict()
    assert told["sum - exact"] == bootstrap_interval([0, -1, 1, 0], seed=1)._asdict()
    assert told["exact - number"]["value"] == -1.0 and "sum - number" not in told


def test_agreement_by_hand():
    told = summarize_items(MODEL)["agreement"]
    assert set(told) == {"sum / char", "sum / choice", "char / choice"}
    # Chosen by sum 0 0 1 2, by char 1 0 1 2: they meet in three of four; by chance in (2*1 + 1*2 + 1*1) / 16.
    assert told["sum / char"] == {"share": 0.75, "kappa": pytest.approx((0.75 - 5 / 16) / (11 / 16))}
    # An answer that names no option meets none.
    assert told["sum / choice"]["share"] == 0.5
    # The textbook's case: 20 and 15 of 50 agree; kappa 0.4.
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert agreement(one, other) == {"share": pytest.approx(0.7), "kappa": pytest.approx(0.4)}
    assert agreement([1, 1], [1, 1]) == {"share": 1.0, "kappa": None}
    with pytest.raises(ValueError, match="as many"):
        agreement([1], [1, 2])


def test_items_that_ways_differ_in():
    records = differing_items(MODEL)
    assert [record["item"] for record in records] == [1, 2, 3]
    assert records[0]["chosen"] == {"sum": 0, "char": 1, "choice": 0} and records[0]["correct"]["char"] is False
    assert records[2]["generated"] == "no" and records[2]["chosen"]["choice"] is None


def test_two_models_are_compared_item_by_item():
    told = compare_items(MODEL, BASE, seed=4)
    assert told["ways"]["sum"] == {
        "difference": bootstrap_interval([0, -1, 1, 1], seed=4)._asdict(),
        "gained": 2,
        "lost": 1,
    }
    assert told["ways"]["number"] == {"difference": {"value": 1.0, "low": 1.0, "high": 1.0}, "gained": 1, "lost": 0}
    expected = bootstrap_interval([each / 0.6931471805599453 for each in (-1, 0, 0, 1)], [1, 2, 2, 3], seed=4)
    assert told["gold_bits_per_byte"] == pytest.approx(expected._asdict())
    changed = changed_items(MODEL, BASE)
    assert [record["item"] for record in changed] == [2, 3, 4, 5]
    assert changed[3]["generated"] == "is 7" and changed[3]["base"]["generated"] == "8"
    assert changed[0]["base"]["chosen"]["sum"] == 1 and changed[0]["chosen"]["sum"] == 0
    with pytest.raises(ValueError, match="same items"):
        compare_items(MODEL, ItemScores(ITEMS[::-1], {}, None, None, None))


@pytest.mark.parametrize("way", ["letters", "exact", "choice"])
def test_a_way_in_which_items_were_not_scored_is_refused(way):
    scores = ItemScores(ITEMS, {"sum": MODEL.options["sum"]}, None, None, None)
    with pytest.raises(ValueError, match=f"not scored by '{way}'; they were by sum"):
        scores.correct(way)
