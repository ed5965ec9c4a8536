"""What the comparison with transformers' own tests of Llama takes for a fault."""

import pytest
import transformers_common
from transformers_common import Meant, Outcome, faults_of, outcome_of, report

PASSED, FAILED, SKIPPED = (Outcome(kind, ("because",), frozenset()) for kind in ("passed", "failed", "skipped"))


def test_the_worst_of_its_parts_is_the_outcome_of_a_test():
    parts = [["[A]", "passed", ""], ["[B]", "skipped", "none"], ["[C]", "failed", "broken"]]
    assert outcome_of(parts) == Outcome("failed", ("[C] broken",), frozenset({"[B]"}))
    assert outcome_of(parts[:2]) == Outcome("passed", ("[A]",), frozenset({"[B]"}))
    assert outcome_of(parts[1:2]) == Outcome("skipped", ("[B] none",), frozenset({"[B]"}))


@pytest.mark.parametrize(
    ("own", "usual", "words"),
    [
        (PASSED, PASSED, None),
        (FAILED, PASSED, "failed: because"),
        (SKIPPED, PASSED, "skipped: because"),
        (FAILED, SKIPPED, "failed: because"),
        (SKIPPED, SKIPPED, None),
        (PASSED, SKIPPED, None),
        (FAILED, FAILED, None),
        (PASSED._replace(skipped=frozenset({"[A]"})), PASSED, "skipped: [A]"),
        (PASSED._replace(skipped=frozenset({"[A]"})), PASSED._replace(skipped=frozenset({"[A]"})), None),
    ],
)
def test_a_fault_is_what_goes_worse_than_for_llama(own, usual, words):
    assert faults_of({"test_x": own}, {"test_x": usual}) == ({} if words is None else {"test_x": [words]})


def test_a_fault_that_is_meant_is_none_until_it_is_gone(monkeypatch, capsys):
    meant = Meant("test_x", "Alibi", "because", "a reason"), Meant("test_new", ".*", "", "a test of a newer version")
    monkeypatch.setattr(transformers_common, "MEANT", meant)
    fine = {"test_x": PASSED}
    found = dict.fromkeys(("Llama", "Causal", "Prefix", "Alibi"), (fine, ["generation.test_utils"]))
    assert not report(found | {"Alibi": ({"test_x": FAILED}, [])})
    assert report(found | {"Alibi": ({"test_x": FAILED._replace(why=("because", "of something else"))}, [])})
    assert report(found | {"Causal": ({"test_x": FAILED}, [])})
    told = capsys.readouterr().out
    assert "Alibi.test_x: failed: because; failed: of something else" in told and "generation.test_utils" in told
    assert "Causal.test_x: failed: because" in told
    assert "test_x of Alibi is no such fault any more" in told and "test_new" not in told
