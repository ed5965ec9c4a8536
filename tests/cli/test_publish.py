"""`minillm export` and `minillm push`."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from cli_cases import assert_same_weights, fail, save_small_model, succeed, tree, weights
from hub_server import running_hub
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.cli.publishing import export_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model") / "base", "prefix", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory):
    """A LoRA adapter whose update is far from zero."""
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(r=4, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapted.save_pretrained(folder)
    return folder


def assert_complete(folder):
    """Weights without pickles, config, tokenizer, code and card."""
    names = {path.name for path in folder.iterdir()}
    needed = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert needed | {"modeling_minillm.py", "configuration_minillm.py", "tokenization_minillm.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_export_writes_a_complete_equal_folder(model_folder, tmp_path):
    out = tmp_path / "deep" / "out"
    assert succeed("export", model_folder, out) == f"written: {out}\n"
    assert_complete(out)
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, out))
    assert_same_weights(weights(one), weights(other))
    text = "def value(line): 北京"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (model_folder, out)]
    assert ids[0] == ids[1]
    assert tree(tmp_path / "deep")[0] == "out"


@pytest.mark.parametrize("dtype", [None, "bfloat16"], ids=["own-dtype", "bfloat16"])
def test_export_merges_an_adapter_as_peft_does(dtype, model_folder, adapter_folder, tmp_path):
    out = tmp_path / "merged"
    succeed("export", model_folder, out, "--adapter", adapter_folder, *(["--dtype", dtype] if dtype else []))
    assert_complete(out)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    before = weights(base)
    merged = PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()
    wanted = merged.to(getattr(torch, dtype)) if dtype else merged
    found = AutoModelForCausalLM.from_pretrained(out)
    assert_same_weights(weights(found), weights(wanted))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (weights(found)[name].float() - before[name]).abs().max() > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_writes_the_dtype(dtype, model_folder, tmp_path):
    succeed("export", model_folder, tmp_path / "out", "--dtype", dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert_same_weights(weights(model), weights(base.to(getattr(torch, dtype))))


def test_an_exported_low_precision_model_stays_so(model_folder, tmp_path):
    succeed("export", model_folder, tmp_path / "half", "--dtype", "bfloat16")
    succeed("export", tmp_path / "half", tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_export_refuses_bad_input_and_leaves_nothing(model_folder, adapter_folder, tmp_path):
    out = tmp_path / "new" / "out"
    for dtype in ("int8", "float8", "Tensor"):
        told = fail("export", model_folder, out, "--dtype", dtype)
        assert f"--dtype '{dtype}' is unknown; use float32, bfloat16, float16" in told
    assert "missing holds no adapter" in fail("export", model_folder, out, "--adapter", tmp_path / "missing")
    other = save_small_model(tmp_path / "other", hidden_size=16)
    assert "holds no adapter for" in fail("export", other, out, "--adapter", adapter_folder)
    assert "is no folder here" in fail("export", tmp_path / "nowhere", out)
    (other / "tokenizer.json").unlink()
    assert "holds no tokenizer" in fail("export", other, out)
    assert not (tmp_path / "new").exists()


def test_export_of_a_lone_adapter_says_how_to_merge_it(model_folder, adapter_folder, tmp_path):
    for command in (["export", adapter_folder, tmp_path / "out"], ["push", adapter_folder, "user/model"]):
        told = fail(*command)
        assert f"minillm export {model_folder} OUT --adapter {adapter_folder}" in told
    assert tree(tmp_path) == []


def test_push_uploads_what_from_pretrained_loads(model_folder, tmp_path):
    """In a process of its own, since the client reads the hub's address when it is imported."""
    code = (
        "import sys, torch\nfrom typer.testing import CliRunner\nfrom minillm.cli.main import app\n"
        "result = CliRunner().invoke(app, ['push', sys.argv[1], 'user/pushed'])\n"
        "assert result.exit_code == 0, (result.output, result.exception)\nprint(result.stdout, end='')\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "one, other = (AutoModelForCausalLM.from_pretrained(name) for name in (sys.argv[1], 'user/pushed'))\n"
        "assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))\n"
        "one, other = (AutoTokenizer.from_pretrained(name) for name in (sys.argv[1], 'user/pushed'))\n"
        "assert one('def x 北京')['input_ids'] == other('def x 北京')['input_ids']\n"
        "result = CliRunner().invoke(app, ['push', sys.argv[1], 'a/b/c'])\n"
        "assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, result.output\n"
        "assert 'a/b/c was not uploaded' in result.stderr\n"
    )
    with running_hub(tmp_path) as environment:
        done = subprocess.run(
            [sys.executable, "-c", code, str(model_folder)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        address = re.escape(environment["HF_ENDPOINT"])
        assert re.fullmatch(rf"{address}/user/pushed/commit/[0-9a-f]{{40}}\n", done.stdout)
    assert_complete(tmp_path / "user" / "pushed")


def test_push_without_a_hub_is_one_line(model_folder):
    # The tests run with HF_HUB_OFFLINE=1.
    assert "user/model was not uploaded" in fail("push", model_folder, "user/model")
    assert "is no folder here" in fail("push", "nowhere", "user/model")


def test_a_folder_that_is_not_free_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(ValueError, match="is not empty"):
        export_model(str(tmp_path / "no model"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
