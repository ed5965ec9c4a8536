"""Verdicts on generated answers, by hand."""

import pytest

from minillm.evaluation.items import parse_item
from minillm.evaluation.written_answers import judge_answer, normalize_answer

COLOURS = parse_item({"question": "?", "options": ["red", "dark red", "blue"], "answer": 1}, 1, "item")
SUM = parse_item({"question": "12 + 47?", "answers": ["59", "fifty-nine"]}, 1, "item")
PLAIN_SUM = parse_item({"question": "12 + 47?", "answers": ["59"]}, 1, "item")
PRICE = parse_item({"question": "?", "answers": ["1,200.50"]}, 1, "item")
CAPITAL = parse_item({"question": "?", "options": ["北京", "上海"], "answer": 0, "answers": ["Peking"]}, 1, "item")


def test_normalizing():
    assert normalize_answer(" Ｆｕｌｌ Width STRASSE ﬁ ") == "full width strasse fi"
    assert normalize_answer("Straße") == "strasse"


@pytest.mark.parametrize(
    ("text", "exact", "contains", "chosen"),
    [
        (" Dark Red ", True, True, 1),
        ("It is dark red, not blue", False, True, 1),
        ("red", False, False, 0),
        ("a blue one, or red", False, False, 2),
        ("reddish", False, False, None),
        ("dark reddish", False, False, None),
        ("", False, False, None),
    ],
)
def test_options(text, exact, contains, chosen):
    verdict = judge_answer(COLOURS, text)
    assert (verdict.exact, verdict.contains, verdict.chosen, verdict.number) == (exact, contains, chosen, None)
    assert verdict.text == text


@pytest.mark.parametrize(
    ("item", "text", "right", "has_number"),
    [
        (PLAIN_SUM, "59", True, True),
        (PLAIN_SUM, " 12 + 47 = 59.", True, True),
        (PLAIN_SUM, "59.0", True, True),
        (PLAIN_SUM, "５９", True, True),
        (PLAIN_SUM, "-59", False, True),
        (PLAIN_SUM, "12+47=59, of course 60", False, True),
        (PLAIN_SUM, "60-59", True, True),
        (PLAIN_SUM, "no idea", False, False),
        (PRICE, "It costs $1200.5", True, True),
        (PRICE, "1,200.5", True, True),
        (SUM, "59", None, True),
    ],
)
def test_numbers(item, text, right, has_number):
    verdict = judge_answer(item, text)
    assert (verdict.number, verdict.has_number) == (right, has_number)


def test_accepted_answers_beside_the_option():
    assert judge_answer(CAPITAL, "PEKING").exact and judge_answer(CAPITAL, "PEKING").chosen is None
    verdict = judge_answer(CAPITAL, "是北京，不是上海")
    assert verdict.contains and verdict.chosen == 0 and not verdict.exact
