"""The pages of the documentation: their code runs, and their drawings are what the code draws."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from docs_cases import DOCS, assert_shown, code_of
from hub_server import running_hub

from minillm import MiniLLMConfig
from minillm.publishing.description import draw_mask

ROOT = DOCS.parent
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
DRAWING = re.compile(r"<!-- mask: (\{[^\n]*\}) -->\n```text\n(.*?)```", re.S)
DRAWINGS = DRAWING.findall((DOCS / "variants.md").read_text("utf-8"))
OF_THEIR_OWN = ["variants", "publishing", "tokenizers", "conversion", "infilling", "blocks"]
# What these need is imported by other tests already; a process of their own would double their time.
IN_PROCESS = ["adapters", "data", "evaluation", "objectives", "preference_training"]
PER_TOKEN = ("attention_mask", "prefix_mask", "document_ids")


def drawn(settings: str) -> str:
    fields = json.loads(settings)
    inputs = {name: torch.tensor([[int(digit) for digit in fields.pop(name)]]) for name in PER_TOKEN if name in fields}
    return draw_mask(MiniLLMConfig(**fields), 8, **inputs)


@pytest.mark.parametrize(("settings", "drawing"), DRAWINGS, ids=[settings for settings, _ in DRAWINGS])
def test_a_drawing_is_what_the_code_draws(settings, drawing):
    assert drawing == drawn(settings) + "\n", drawn(settings)


def test_all_drawings_are_checked_and_differ():
    assert len({drawing for _, drawing in DRAWINGS}) == (DOCS / "variants.md").read_text("utf-8").count("■\n```")


def test_a_drawing_can_be_checked_by_hand():
    config = MiniLLMConfig(attention_type="prefix", sliding_window=2)
    assert draw_mask(config, 4, prefix_mask=torch.tensor([[1, 1, 1, 0]])) == "■ ■ ■ ·\n■ ■ ■ ·\n■ ■ ■ ·\n· · ■ ■"


def anchors_of(page):
    """Headings as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.M))
    return {heading.strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_are_there(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target
    # A page that is run leaves files of its own.
    rooms = (
        "benchmarks|cli|configuration|conversion|data|docs|evaluation|examples|experiments|modeling_minillm|plugin|publishing|"
        "tests|tokenization|training"
    )
    for named in re.findall(rf"`((?:{rooms})/[\w/.*-]+\.\w+)`", text):
        assert list(ROOT.glob(named)), named


@pytest.mark.parametrize("page", IN_PROCESS)
def test_the_code_of_a_page_runs_in_this_process(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), f"{page}.md", "exec"), {"__name__": "__main__"})
    assert_shown(page, capsys.readouterr().out)


@pytest.mark.mostly_thorough("variants")
@pytest.mark.parametrize("page", [*OF_THEIR_OWN, pytest.param("tracking", marks=pytest.mark.slow)])
def test_the_code_of_a_page_runs(page, tmp_path):
    with running_hub(tmp_path / "hub") as environment:
        done = subprocess.run(
            [sys.executable, "-c", code_of(page)],
            cwd=tmp_path,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_shown(page, done.stdout)
    if page == "publishing":
        shown = re.search(r"<!-- files -->\n```text\n(.*?)\n```", (DOCS / "publishing.md").read_text("utf-8"), re.S)[1]
        for folder in ("my-model", "my-merged-model"):
            assert sorted(path.name for path in (tmp_path / folder).iterdir()) == shown.splitlines()
