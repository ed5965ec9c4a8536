"""The table of docs/families.md is what `python tests/support/family_table.py` makes."""

import pytest
from family_table import MARKS, PAGE, measure, rows

from minillm.configuration import PRESETS
from minillm.conversion import FAMILIES


def cells(row):
    return [cell.strip() for cell in row.strip().strip("|").split(" | ")]


def written_rows():
    page = PAGE.read_text("utf-8")
    return [cells(row) for row in page.partition(MARKS[0])[2].partition(MARKS[1])[0].splitlines()[2:]]


def test_the_table_is_not_stale():
    assert [row[:-1] for row in written_rows()] == [cells(row)[:-1] for row in rows()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_error_is_what_is_measured(family):
    """Rounding differs between machines: the page's figure is no less than what is measured here, and not far more."""
    (written,) = [float(row[-1]) for row in written_rows() if row[0] == f"`{family}`"]
    error, sizes = measure(family)
    assert error <= written <= max(1e-6, 10 * error) and written <= 1e-5
    # "Logits between 2 and 12", beside which the errors stand.
    assert all(2 <= size <= 12 for size in sizes)


def test_every_family_of_a_preset_can_be_converted():
    assert {preset.family for preset in PRESETS.values()} - {"minillm"} == set(FAMILIES)
