"""The page on training: its code runs from top to bottom and prints what the page shows."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```)?", re.M | re.S)


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = PYTHON.findall(PAGE.read_text("utf-8"))
    assert len(blocks) == 14
    shown, names = 0, {}
    for code, output in blocks:
        capsys.readouterr()
        exec(compile(code, str(PAGE), "exec"), names)
        if output:
            assert capsys.readouterr().out == output
            shown += 1
    assert shown == 2
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "checkpoints", "merged", "pretrained", "rows"}
    pickles = [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not [path for path in pickles if "checkpoints" not in path.parts]
    assert type(AutoModelForCausalLM.from_pretrained("merged")).__name__ == "MiniLLMForCausalLM"
