"""Tiny models in saved folders, and what a process without MiniLLM finds in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from stranger import outputs_of

from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer

SIZE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}


TEXT = "def 你好(world):  return 'hello'\n"


def tiny(cls=MiniLLMForCausalLM, **fields):
    torch.manual_seed(0)
    model = cls(MiniLLMConfig(**{**SIZE, **fields})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokenizer():
    return MiniLLMTokenizer.train_from_iterator([TEXT * 20], vocab_size=300, show_progress=False)


def expectation(model, folder: Path) -> str:
    """Writes inputs and outputs of a model beside its folder."""
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if model.config.attention_type == "prefix":
        inputs["prefix_mask"] = torch.tensor([[1] * 5 + [0] * 4] * 2)
    found = {name: value.contiguous() for name, value in outputs_of(model, inputs).items()}
    file = f"{folder}.expected.safetensors"
    save_file({**found, **{f"input:{name}": value for name, value in inputs.items()}}, file)
    return file


def model_case(name: str, model, folder: Path, auto_class: str = "AutoModelForCausalLM") -> dict:
    return {"name": name, "folder": str(folder), "auto_class": auto_class, "expected": expectation(model, folder)}


def visit(cases: list[dict], folder: Path, environment: dict[str, str] | None = None) -> dict[str, str]:
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases), "utf-8")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "stranger.py"), str(listing)],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "stranger-home"), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
