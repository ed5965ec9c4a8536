"""The table of docs/families.md is what `python tests/family_table.py` makes."""

import re

from family_table import MARKS, PAGE, rows

from minillm.configuration import PRESETS
from minillm.conversion import FAMILIES


def cells(row):
    return [cell.strip() for cell in row.strip().strip("|").split(" | ")]


def test_the_table_is_not_stale():
    page = PAGE.read_text("utf-8")
    written = page.partition(MARKS[0])[2].partition(MARKS[1])[0].splitlines()[2:]
    made = [cells(row) for row in rows()]
    assert [cells(row)[:-1] for row in written] == [row[:-1] for row in made]
    # Rounding differs between machines, its bound does not.
    for row in (*made, *map(cells, written)):
        assert re.fullmatch(r"\d\.\de[-+]\d\d|within 1e-5", row[-1])
        assert row[-1] == "within 1e-5" or float(row[-1]) <= 1e-5


def test_every_family_of_a_preset_can_be_converted():
    assert {preset.family for preset in PRESETS.values()} - {"minillm"} == set(FAMILIES)
