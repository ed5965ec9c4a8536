"""The commands take only checkpoints that hold exactly a causal language model's weights: none is made up."""

import json
import shutil

import pytest
import torch
from cli_cases import (
    assert_same_weights,
    fail,
    invoke,
    save_adapter,
    small_model,
    small_tokenizer,
    succeed,
    weights,
    write_corpus,
)
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import minillm
from minillm.cli.inspection import adapter_words
from minillm.cli.loading import adapter_config
from minillm.cli.merging import load_adapted
from minillm.publishing.description import UNMERGEABLE

ADAPTER = "adapter_model.safetensors"
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


def edit_config(folder, key, value):
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}), "utf-8")


def surplus_adapters(base, tmp_path):
    """Adapters of which a part has no place in the base, and the first tensor without one."""
    tall = save_adapter(save(tmp_path / "tall", num_hidden_layers=3), tmp_path / "of-more-layers")
    unknown = save_adapter(base, tmp_path / "unknown")
    edit_weights(unknown, lambda tensors: tensors.update({"odd.lora_A.weight": torch.zeros(2)}), ADAPTER)
    head = shutil.copytree(unknown, tmp_path / "head")
    edit_weights(head, lambda tensors: tensors.update({"base_model.model.head.weight": torch.zeros(2)}), ADAPTER)
    edit_weights(head, lambda tensors: tensors.pop("odd.lora_A.weight"), ADAPTER)
    for folder in (tall, unknown, head):
        edit_config(folder, "base_model_name_or_path", str(base))
    return {tall: "layers.2.self_attn.q_proj.lora_A", unknown: "odd.lora_A", head: "head.weight"}


def test_an_adapter_with_surplus_tensors_is_refused_by_name(tmp_path):
    base = save(tmp_path / "base")
    for adapter, name in surplus_adapters(base, tmp_path).items():
        for command in (
            ["export", base, tmp_path / "out", "--adapter", adapter],
            ["export", base, tmp_path / "out", "--adapter", adapter, "--as", "llama"],
            ["push", adapter, "user/adapter", "--base", "user/base"],
            ["generate", adapter, "a"],
        ):
            told = fail(*command)
            assert str(adapter) in told and name in told and "weights of a causal" not in told, told
            assert not (tmp_path / "out").exists()


def test_prompts_have_no_surplus_tensors(tmp_path):
    base = save(tmp_path / "base")
    for config in (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2),
    ):
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        adapted.save_pretrained(tmp_path / "prompt")
        load_adapted(AutoModelForCausalLM.from_pretrained(base), str(base), str(tmp_path / "prompt"))
        tensors = load_file(tmp_path / "prompt" / ADAPTER)
        save_file(tensors | {"odd": torch.zeros(2)}, tmp_path / "prompt" / ADAPTER)
        with pytest.raises(ValueError, match="no place for: odd"):
            load_adapted(AutoModelForCausalLM.from_pretrained(base), str(base), str(tmp_path / "prompt"))


def test_an_adapter_without_its_base_is_one_line(tmp_path):
    adapter = save_adapter(save(tmp_path / "base"), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    missing = (
        f"error: {adapter} is an adapter for {base}, which is missing: if that model is elsewhere, write its place "
        f"into {adapter}/adapter_config.json as base_model_name_or_path, or merge the two with "
        f"`minillm export BASE OUT --adapter {adapter}`"
    )
    for command in (("generate", adapter, "a"), ("export", adapter, out), ("train", "--model", adapter, "--out", out)):
        options = ("--data", write_corpus(tmp_path / "corpus", files=6)) if command[0] == "train" else ()
        assert fail(*command, *options) == missing
    assert fail("push", adapter, "user/adapter") == f"{missing}; or name its repository, `--base user/base`"
    words = adapter_words(str(adapter), adapter_config(str(adapter)))
    assert words["base model"] == f"{base}, which is missing"
    assert words["to merge it"] == f"minillm export BASE OUT --adapter {adapter}"
    base.mkdir()
    assert f"the base model of the adapter {adapter} cannot be loaded: {base} holds no" in fail(
        "generate", adapter, "a"
    )
    (adapter / "adapter_config.json").write_text("{", "utf-8")
    assert "adapter holds no adapter that can be loaded" in fail("generate", adapter, "a")
    (adapter / "adapter_config.json").write_text("{}", "utf-8")
    assert "adapter is an adapter that names no base model" in fail("generate", adapter, "a")


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path):
    base = save(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    wanted = succeed("generate", adapter, "def a(", "--max-new-tokens", 4)
    for file in adapter.glob("token*"):
        file.unlink()
    assert succeed("generate", adapter, "def a(", "--max-new-tokens", 4) == wanted
    for file in base.glob("token*"):
        file.unlink()
    assert fail("generate", adapter, "a") == (
        f"error: neither the adapter {adapter} nor its base model {base} holds a tokenizer"
    )
    shutil.rmtree(base)
    assert f"is an adapter for {base}, which is missing" in fail("generate", adapter, "a")
    (adapter / "adapter_config.json").write_text("{}", "utf-8")
    assert "adapter that names no base model: write its place into" in fail("generate", adapter, "a")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("peft_type", "ZZZ", "'ZZZ'` is no kind of adapter that PEFT knows"),
        ("target_modules", "(((", "'((('` is no regular expression: missing )"),
        ("layer_replication", [[0, 10**7]], "[[0, 10000000]]` must be a list of [first, end], of 2 layers"),
        ("layer_replication", [0, 2], "[0, 2]` must be a list of [first, end], of 2 layers"),
    ],
)
def test_a_setting_of_an_adapter_is_refused_by_name(key, value, words, tmp_path):
    base = save(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    edit_config(adapter, key, value)
    for command in (["export", base, tmp_path / "out", "--adapter", adapter], ["generate", adapter, "a"]):
        assert f"{adapter}/adapter_config.json: `{key}={words}" in fail(*command)


def test_a_setting_that_peft_does_not_know_is_one_line_of_warning(tmp_path):
    base = save(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    edit_config(adapter, "odd", 5)
    for command in (["export", base, tmp_path / "out", "--adapter", adapter], ["generate", adapter, "a"]):
        result = invoke(*command)
        assert result.exit_code == 0, result.output
        assert result.stderr == (
            f"warning: {adapter}/adapter_config.json: PEFT does not know odd and goes on without\n"
        )


def test_the_kinds_that_cannot_be_merged_are_those_of_peft():
    refused = {
        kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if not hasattr(tuner, "merge_and_unload")
    }
    # It has the method, and refuses.
    assert {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING} & UNMERGEABLE == refused | {"SHADOW"}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("PROMPT_TUNING", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        ("PREFIX_TUNING", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        ("P_TUNING", PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)),
        ("LORA", LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[1])),
    ],
)
def test_what_stays_an_adapter_is_not_promised_as_a_model(kind, config, tmp_path):
    base, adapter = save(tmp_path / "base"), tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    refusal = f"error: {adapter} is a {kind} adapter, which cannot be merged into weights"
    assert fail("export", base, tmp_path / "out", "--adapter", adapter) == refusal
    assert fail("export", adapter, tmp_path / "out") == f"{refusal}: load both with PEFT"
    card = (adapter / "README.md").read_text("utf-8")
    assert "it loads without `trust_remote_code`.\n" in card
    told = [card, succeed("info", adapter), fail("push", adapter, "user/adapter")]
    shutil.rmtree(base)
    told += [fail(*command) for command in (("generate", adapter, "a"), ("push", adapter, "user/adapter"))]
    assert not [text for text in told if "minillm export" in text or "merge" in text]


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
