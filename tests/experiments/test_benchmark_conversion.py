"""The benchmark of conversion runs, on a tiny checkpoint, and sees what is wrong."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "conversion.py"


@pytest.fixture
def benchmark():
    # Not installed; and of this name there is a room.
    spec = importlib.util.spec_from_file_location("conversion_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_measures_and_leaves_nothing(benchmark, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    size = ("--layers", "2", "--hidden-size", "256", "--input-shard", "1MB", "--output-shard", "300KB")
    figures = benchmark.main([*size, "--folder", str(work), "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text("utf-8")) == figures
    assert list(work.iterdir()) == []
    # Two tables of 1024 x 256, and in each of two layers four of 256 x 256 and three of 512 x 256, two bytes each.
    assert 3_670_016 < figures["bytes"] < 3_690_000
    assert figures["largest_output_shard"] < 600_000 < figures["largest_input_shard"] < 1_100_000
    assert figures["peak"] >= figures["peak_before"] > 1e8 and figures["seconds"] > 0
    assert "converted | 0.00 GB in" in capsys.readouterr().out


def test_the_checkpoint_is_what_safetensors_reads_and_a_changed_bit_is_seen(benchmark, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    shapes = benchmark.write_checkpoint(tmp_path / "native", config, "1GB")
    file = tmp_path / "native" / "model.safetensors"
    tensors = load_file(file)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert all(torch.equal(tensor, benchmark.made_up(name, shapes[name])) for name, tensor in tensors.items())
    assert list(benchmark.differing(tmp_path / "native", shapes)) == []
    tensors["lm_head.weight"].view(torch.int16)[3, 5] ^= 1
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert sorted(benchmark.differing(tmp_path / "native", shapes)) == ["lm_head.weight", "model.embed_tokens.weight"]
