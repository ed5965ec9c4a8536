"""The README tells the truth: its examples run, its outputs and its table are what the code makes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hub_server import running_hub

from minillm import MiniLLMConfig
from minillm.capabilities import DIRECTIONS, refusal
from minillm.configuration.rope_fields import ROPE_KEYS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
VARIANTS = {
    "causal (RoPE, learned, … positions)": {},
    "causal, RoPE that follows the length (`dynamic`, `longrope`)": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    },
    "causal, sliding window": {"sliding_window": 64},
    "causal, ALiBi or Sandwich": {"position_embedding_type": "alibi"},
    "prefix": {"attention_type": "prefix"},
    "prefix, ALiBi or Sandwich": {"attention_type": "prefix", "position_embedding_type": "alibi"},
    "bidirectional": {"attention_type": "bidirectional"},
}
BACK_ENDS = {
    "`eager`": "eager",
    "`sdpa`": "sdpa",
    "`flex_attention`": "flex_attention",
    "`flash_attention_*`": "flash_attention_2",
    "engines (vLLM, SGLang, continuous batching)": "paged",
    "others (hub kernels)": "kernels-community/x",
}


def served_on(config: MiniLLMConfig, back_end: str, device: str) -> bool:
    return not any(refusal(config, back_end, device, direction) for direction in DIRECTIONS)


def cell(config: MiniLLMConfig, back_end: str) -> str:
    if served_on(config, back_end, "cpu"):
        return "yes"
    return "gpu" if served_on(config, back_end, "cuda") else "no"


def capability_table() -> str:
    lines = [f"| | {' | '.join(BACK_ENDS)} |", "|---" * (len(BACK_ENDS) + 1) + "|"]
    for name, fields in VARIANTS.items():
        cells = (cell(MiniLLMConfig(**fields), back_end) for back_end in BACK_ENDS.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_capability_table():
    written = re.search(r"<!-- capability table -->\n(.*?)\n?<!-- end of capability table -->", README, re.S)[1]
    assert written == capability_table(), f"the table in the README should be:\n{capability_table()}"


def test_commands_are_those_of_ci():
    install_and_test = next(text.strip() for kind, text in BLOCKS if kind == "bash" and "pytest" in text)
    words = (ROOT / ".ci" / "run").read_text("utf-8").replace("-q ", "")
    assert install_and_test in words


def test_links_point_at_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_examples_run_and_print_what_is_written(tmp_path):
    program, expected = [], []
    for (kind, text), (next_kind, next_text) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind == "python":
            program.append(f"{text}\nprint('--- end of block')")
            expected.append(next_text.strip() if next_kind == "text" else "")
    with running_hub(tmp_path / "hub") as environment:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(program)],
            cwd=tmp_path,
            env={**os.environ, **environment, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    # What is published holds no pickle.
    for folder in ("my-model", "my-adapter", "my-merged-model"):
        assert not [path for path in (tmp_path / folder).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    printed = [block.strip() for block in done.stdout.split("--- end of block")[:-1]]
    # Trainer prints its log as dictionaries and tables between the lines of the example.
    kept = ["\n".join(line for line in block.splitlines() if not line.startswith("{")) for block in printed]
    assert kept == expected


@pytest.mark.parametrize("field", re.findall(r"^\| [\w ’']+ \| (`\w+`.*?) \|", README, re.M))
def test_fields_named_in_the_settings_table_exist(field):
    for name in re.findall(r"`(\w+)`", field):
        assert name in MiniLLMConfig.__dataclass_fields__, name


CHOICES = ("attention_type", "position_embedding_type", "rope_parameters", "norm_type", "norm_placement", "mlp_type")


@pytest.mark.parametrize("field", CHOICES)
def test_the_settings_table_names_every_value(field):
    row = next(line for line in README.splitlines() if line.startswith("| ") and f"`{field}`" in line)
    named = re.findall(r"`(\w+)`", row.split(" | ")[2])
    there = ROPE_KEYS if field == "rope_parameters" else get_args(MiniLLMConfig.__dataclass_fields__[field].type)
    assert there and set(there) <= set(named)
    # A row with one choice names nothing else.
    assert field in ("norm_type", "norm_placement") or sorted(there) == sorted(named)
