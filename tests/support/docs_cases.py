"""The code of a page of the documentation, and what the page shows as printed by it."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def code_of(page: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text("utf-8"), re.M | re.S)
    assert blocks
    return "\n".join(blocks)


def assert_shown(page: str, printed: str):
    """What a page shows as printed, behind the code that prints it, was printed."""
    for shown in re.findall(r"^```\n\n```text\n(.*?)^```", (DOCS / f"{page}.md").read_text("utf-8"), re.M | re.S):
        assert shown in printed, printed
