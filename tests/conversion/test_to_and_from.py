"""Conversion as a whole: sources of every kind, what is carried over, what is refused, interruptions, commands."""

import json
import os
import subprocess
import sys

import pytest
import torch
from cli_cases import invoke
from conversion_cases import IDS, edit_json, logits_of, save_native
from hub_server import running_hub
from native_families import native_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.conversion import FAMILIES, ConversionError, convert, detect, export, load

# --- sources ---


def test_shards(tmp_path):
    native = save_native(tmp_path / "native", max_shard_size="20KB")
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 3
    convert(tmp_path / "native", tmp_path / "ours", max_shard_size="30KB")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text("utf-8"))
    files = {path.name for path in (tmp_path / "ours").glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits_of(native))


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_bin_files_that_hold_tensors(sharded, llama, tmp_path):
    native, folder = llama
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    files = [f"pytorch_model-{i}.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: tensors[name] for name in part}, folder / file)
    if sharded:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    torch.testing.assert_close(logits_of(load(folder)), logits_of(native))


class Trap:
    def __reduce__(self):
        return (print, ("the pickle ran",))


def test_a_bin_file_with_anything_else_is_refused_unread(llama, capsys):
    folder = llama[1]
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin"):
        load(folder)
    assert "the pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "bloom_odd_heads", "falcon_7b"])
def test_names_without_the_prefix_of_the_base_model(name, tmp_path):
    native = save_native(tmp_path / "native", name)
    file = tmp_path / "native" / "model.safetensors"
    bare = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    if name == "gpt2":
        # Masks that old checkpoints store.
        bare |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(bare, file, {"format": "pt"})
    torch.testing.assert_close(logits_of(load(tmp_path / "native")), logits_of(native))


def test_old_spellings_of_rope(llama):
    native, folder = llama
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=10000.0, rope_scaling=None)
    torch.testing.assert_close(logits_of(load(folder)), logits_of(native))
    edit_json(folder / "config.json", rope_theta=500.0)
    assert load(folder).config.rope_parameters["rope_theta"] == 500.0


def test_a_repeated_head_beside_tied_embeddings(llama):
    native, folder = llama
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits_of(load(folder)), logits_of(native))
    save_file(tensors | {"lm_head.weight": torch.randn(64, 48)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"lm_head\.weight.*tie_word_embeddings"):
        load(folder)


UPLOAD_AND_LOAD = """
import sys, torch
from huggingface_hub import HfApi
from minillm.conversion import load
api = HfApi()
api.create_repo("user/model")
api.upload_folder(repo_id="user/model", folder_path="native")
model = load("user/model", revision="main").eval()
torch.save(model(torch.tensor([[3, 9, 4, 33, 21, 7]])).logits.detach(), "logits.pt")
"""


@pytest.mark.mostly_thorough("sharded")
@pytest.mark.parametrize("kind", ["whole", "sharded", "bin"])
def test_a_repository_over_http(kind, tmp_path):
    native = save_native(tmp_path / "native", max_shard_size="20KB" if kind == "sharded" else "1GB")
    assert (tmp_path / "native" / "model.safetensors.index.json").exists() == (kind == "sharded")
    if kind == "bin":
        weights = tmp_path / "native" / "model.safetensors"
        torch.save(load_file(weights), tmp_path / "native" / "pytorch_model.bin")
        weights.unlink()
    with running_hub(tmp_path / "hub") as environment:
        environment = {**os.environ, **environment}
        command = [sys.executable, "-c", UPLOAD_AND_LOAD]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(native))


def test_a_revision_of_what_is_here_is_refused(llama):
    with pytest.raises(ConversionError, match="revision='dev'"):
        load(llama[1], revision="dev")


# --- what comes along ---


def word_tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_tokenizer_generation_config_and_dtype_are_carried_over(tmp_path):
    native = native_model("llama", torch.bfloat16)
    native.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=2, pad_token_id=0)
    native.save_pretrained(tmp_path / "native")
    word_tokenizer().save_pretrained(tmp_path / "native")
    seen = []
    convert(tmp_path / "native", tmp_path / "ours", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.generation_config.temperature == 0.7
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("a c h")["input_ids"] == [3, 5, 10]
    card = (tmp_path / "ours" / "README.md").read_text("utf-8")
    assert "trust_remote_code=True" in card and "pipeline_tag: text-generation" in card
    assert not list((tmp_path / "ours").glob("*.bin"))
    convert(tmp_path / "native", tmp_path / "wide", dtype=torch.float32)
    assert load_file(tmp_path / "wide" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    export(tmp_path / "ours", tmp_path / "back", "llama")
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("a c h")["input_ids"] == [3, 5, 10]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_stranger_loads_a_converted_folder(llama, tmp_path):
    native, folder = llama
    convert(folder, tmp_path / "ours")
    script = (
        "import sys; sys.modules['minillm'] = None\n"
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'ours')!r}, trust_remote_code=True)\n"
        f"torch.save(model(torch.tensor({IDS.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(native))


def test_adapters_of_a_llama_serve_its_twin_and_back(llama, tmp_path):
    native, folder = llama
    twin = load(folder)
    torch.manual_seed(0)
    for number, (base, other) in enumerate([(native, twin), (twin, native)]):
        adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
        expected = logits_of(adapted)
        adapted.save_pretrained(tmp_path / f"adapter{number}")
        adapted.unload()
        loaded = PeftModel.from_pretrained(other, tmp_path / f"adapter{number}")
        torch.testing.assert_close(logits_of(loaded), expected)
        assert not torch.allclose(logits_of(loaded.unload()), expected, atol=1e-2)


# --- refusals ---


def test_unknown_keys_are_named_until_they_are_vouched_for(llama):
    native, folder = llama
    edit_json(folder / "config.json", attention_sinks=4)
    with pytest.raises(ConversionError, match="attention_sinks=4"):
        load(folder)
    torch.testing.assert_close(logits_of(load(folder, ignore_keys=["attention_sinks"])), logits_of(native))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba'.*bloom.*llama"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*quantized"),
        ("llama", {"hidden_act": "swoosh"}, "hidden_act='swoosh'"),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "spiral"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("bloom_odd_heads", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post"),
        ("falcon_7b", {"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        ("mpt_odd_heads", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv.*6.0"),
        ("mpt_odd_heads", {"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max.*16"),
        ("mpt_odd_heads", {"logit_scale": 0.5}, "logit_scale=0.5"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_expressed_are_named(name, changes, message, tmp_path):
    save_native(tmp_path / "native", name)
    edit_json(tmp_path / "native" / "config.json", **changes)
    with pytest.raises(ConversionError, match=message):
        load(tmp_path / "native")
    assert invoke("convert", "--from", tmp_path / "native", "--to", tmp_path / "ours").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks `model\.layers\.1\.mlp\.up_proj\.weight`"),
        (
            lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}),
            r"holds `model\.layers\.0\.extra\.weight`",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(47)}),
            r"`model\.norm\.weight` has shape \[47\]; .* has \[48\]",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_are_named(change, message, llama):
    change_tensors(llama[1], change)
    with pytest.raises(ConversionError, match=message):
        load(llama[1])


def test_broken_files_are_named(llama, tmp_path):
    folder = llama[1]
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConversionError, match=r"model\.safetensors is damaged or cut off"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="holds no weights"):
        load(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ConversionError, match=r"model-00001-of-00002\.safetensors, which .* lacks"):
        load(folder)
    (folder / "config.json").write_text("{", "utf-8")
    with pytest.raises(ConversionError, match=r"config\.json cannot be read"):
        load(folder)
    with pytest.raises(ConversionError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ConversionError, match="nowhere"):
        load("nowhere/at-all")


def test_the_two_baichuans_are_told_apart_or_asked_for():
    raw = {"model_type": "baichuan", "hidden_size": 8, "vocab_size": 77}
    assert detect(raw | {"vocab_size": 125696}).name == detect(raw | {"z_loss_weight": 0}).name == "baichuan2"
    assert detect(raw | {"vocab_size": 64000}).name == "baichuan"
    assert detect(raw | {"_name_or_path": "baichuan-inc/Baichuan2-7B-Chat"}).name == "baichuan2"
    with pytest.raises(ConversionError, match="'baichuan' or 'baichuan2'"):
        detect(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_names_every_field_in_the_way(family, tmp_path):
    config = MiniLLMConfig(
        vocab_size=32,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        position_embedding_type="sandwich",
        qk_norm=True,
        norm_placement="sandwich",
    )
    MiniLLMForCausalLM(config).save_pretrained(tmp_path / "ours")
    # A Mixtral without experts is not even a config to compare with.
    expected = "mlp_type='glu'" if family == "mixtral" else r"position_embedding_type='sandwich'.*qk_norm=True"
    with pytest.raises(ConversionError, match=expected):
        export(tmp_path / "ours", tmp_path / "out", family)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_overrides_clear_the_way(llama, tmp_path):
    native, folder = llama
    convert(folder, tmp_path / "ours", hidden_dropout=0.1)
    with pytest.raises(ConversionError, match=r"hidden_dropout=0\.1"):
        export(tmp_path / "ours", tmp_path / "back", "llama")
    export(tmp_path / "ours", tmp_path / "back", "llama", hidden_dropout=0.0)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits_of(native))


def test_an_interrupted_conversion_leaves_nothing(llama, tmp_path):
    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama[1], tmp_path / "ours", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


# --- commands ---


def test_commands_convert_export_and_refuse(llama, tmp_path):
    native, folder = llama
    result = invoke(
        "convert", "--from", folder, "--to", tmp_path / "ours", "--dtype", "float32", "--set", "use_cache=false"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"written: {tmp_path / 'ours'}" in result.output
    assert MiniLLMConfig.from_pretrained(tmp_path / "ours").use_cache is False
    result = invoke("export", tmp_path / "ours", tmp_path / "back", "--as", "llama")
    assert result.exit_code == 0, (result.output, result.exception)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits_of(native))
    for arguments, message in (
        (("convert", "--from", folder, "--to", tmp_path / "ours"), "not empty"),
        (("convert", "--from", folder, "--to", tmp_path / "x", "--family", "gpt5"), "unknown family 'gpt5'"),
        (("convert", "--from", folder, "--to", tmp_path / "x", "--set", "colour=red"), "FIELD=VALUE"),
        (("convert", "--from", folder, "--to", tmp_path / "x", "--dtype", "int3"), "--dtype 'int3'"),
        (("export", tmp_path / "ours", tmp_path / "x", "--as", "bloom"), "this model is no bloom"),
        (("export", folder, tmp_path / "x", "--as", "llama"), "'llama' model, not a MiniLLM"),
        (("export", tmp_path / "ours", tmp_path / "x", "--set", "use_cache=true"), "--set needs --as"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1 and message in result.stderr, (arguments, result.output)
        assert not (tmp_path / "x").exists()


def test_export_merges_an_adapter_first(llama, tmp_path):
    folder = llama[1]
    word_tokenizer().save_pretrained(folder)
    convert(folder, tmp_path / "ours")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    result = invoke("export", tmp_path / "ours", tmp_path / "back", "--as", "llama", "--adapter", tmp_path / "adapter")
    assert result.exit_code == 0, (result.output, result.exception)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(logits_of(back), logits_of(adapted), atol=1e-5, rtol=0)
