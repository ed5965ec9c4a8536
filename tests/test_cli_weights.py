"""The commands take only checkpoints that hold exactly a causal language model's weights: none is made up."""

import shutil

import pytest
import torch
from cli_cases import assert_same_weights, fail, invoke, small_model, small_tokenizer, succeed, weights, write_corpus
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import minillm

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def save(folder, cls=minillm.MiniLLMForCausalLM, **fields):
    tokenizer = small_tokenizer()
    cls(small_model(tokenizer, **fields).config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_weights(folder, edit, name="model.safetensors"):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def save_adapter(base, folder):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that `AutoModelForCausalLM` loads although their weights are not the model's, and what is wrong."""
    root = tmp_path_factory.mktemp("models")
    lacking, wide = save(root / "lacking", tie_word_embeddings=True), save(root / "wide")
    edit_weights(lacking, lambda tensors: tensors.pop(O_PROJ))
    edit_weights(wide, lambda tensors: tensors.update({O_PROJ: torch.zeros(32, 16)}))
    return {
        "classifier": (save(root / "classifier", minillm.MiniLLMForSequenceClassification), "missing: lm_head.weight"),
        "tied-classifier": (
            save(root / "tied", minillm.MiniLLMForSequenceClassification, tie_word_embeddings=True),
            "that it does not have: score.weight",
        ),
        "base-model": (save(root / "base-model", minillm.MiniLLMModel), "missing: lm_head.weight"),
        "lacking": (lacking, f"missing: {O_PROJ}"),
        "other-shape": (wide, f"of another shape: {O_PROJ}"),
    }


CASES = ("classifier", "tied-classifier", "base-model", "lacking", "other-shape")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", files=6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["export", "push", "generate", "train", "extend"])
def test_wrong_weights_are_refused_by_name(command, case, folders, corpus, tmp_path):
    folder, words = folders[case]
    out = tmp_path / "out"
    arguments = {
        "export": ("export", folder, out),
        "push": ("push", folder, "user/model"),
        "generate": ("generate", folder, "a"),
        "train": ("train", "--model", folder, "--data", corpus, "--out", out),
        "extend": ("tokenizer", "extend", folder, corpus, "--num-new", 3, "--out", out, "--model", folder),
    }
    told = fail(*arguments[command])
    assert f"{folder} does not hold exactly the weights of a causal language model; {words}" in told
    assert list(tmp_path.iterdir()) == []


def test_many_missing_weights_are_counted(tmp_path):
    folder = save(tmp_path / "model")
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "self_attn" in name])
    # Two layers of four projections.
    assert "and 5 more" in fail("generate", folder, "a")


def test_a_tied_base_model_holds_all_weights_and_is_taken(tmp_path):
    folder = save(tmp_path / "model", minillm.MiniLLMModel, tie_word_embeddings=True)
    succeed("export", folder, tmp_path / "out")
    base = minillm.MiniLLMModel.from_pretrained(folder)
    assert_same_weights(weights(base), weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_is_taken_only_whole_and_on_a_whole_base(tied, tmp_path):
    base = save(tmp_path / "base", tie_word_embeddings=tied)
    adapter = save_adapter(base, tmp_path / "adapter")
    assert succeed("generate", adapter, "def a(", "--max-new-tokens", 4)
    half = shutil.copytree(adapter, tmp_path / "half")
    edit_weights(half, lambda tensors: tensors.pop(LORA_A), "adapter_model.safetensors")
    assert f"{half} does not hold exactly the weights" in fail("generate", half, "a")
    told = fail("export", base, tmp_path / "out", "--adapter", half)
    assert f"{half} holds no adapter for {base}" in told and "q_proj.lora_A" in told
    edit_weights(base, lambda tensors: tensors.pop(O_PROJ))
    assert f"{base} does not hold exactly" in fail("generate", adapter, "a")
    assert f"{base} does not hold exactly" in fail("export", base, tmp_path / "out", "--adapter", adapter)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_base_is_one_line(tmp_path):
    adapter = save_adapter(save(tmp_path / "base"), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    told = fail("generate", adapter, "a")
    assert f"{adapter} is an adapter for {tmp_path / 'base'}, which cannot be loaded" in told
    assert f"{tmp_path / 'base'} is no folder here" in told
    assert f"base_model_name_or_path, or merge the two with `minillm export BASE OUT --adapter {adapter}`" in told
    (adapter / "adapter_config.json").write_text("{", "utf-8")
    assert "adapter holds no adapter that can be loaded" in fail("generate", adapter, "a")
    (adapter / "adapter_config.json").write_text("{}", "utf-8")
    assert "adapter is an adapter that names no base model" in fail("generate", adapter, "a")


def test_an_adapter_of_another_base_is_merged_with_a_warning(tmp_path):
    base, other = save(tmp_path / "base"), save(tmp_path / "other")
    adapter = save_adapter(base, tmp_path / "adapter")
    result = invoke("export", other, tmp_path / "out", "--adapter", adapter)
    assert result.exit_code == 0, result.output
    words = f"warning: {adapter} was made for {base}, not for {other}: the merged model may be of no use\n"
    assert result.stderr == words
    # The same folder by another path is the same base.
    (tmp_path / "link").symlink_to(base)
    succeed("export", tmp_path / "link", tmp_path / "again", "--adapter", adapter)
