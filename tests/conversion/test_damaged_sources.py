"""Damaged files of others: one line that names the file and the fault, at once, and nothing is written."""

import json
import logging
import os
import pickle
import shutil
import signal
import struct

import pytest
import torch
from cli_cases import fail, save_adapter, save_small_model, small_tokenizer, succeed, tree, write_corpus
from conversion_cases import edit_json, save_native
from gguf_cases import write_gguf
from native_families import native_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm import MiniLLMConfig, MiniLLMTokenizer
from minillm.conversion import convert, export, load

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Not found</title></head></html>\n"
DEEP = b"[" * 100_000
SECONDS = 20
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def at_once():
    """What hangs fails."""

    def late(*_):
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    save_native(root / "llama")
    small_tokenizer().save_pretrained(root / "llama")
    save_native(root / "sharded", max_shard_size="40KB")
    save_small_model(root / "ours")
    save_adapter(root / "ours", root / "adapter")
    write_gguf(root / "tiny.gguf", native_model("llama_gqa_tied"))
    return root


@pytest.fixture
def copy(sources, tmp_path):
    """Copies one of the sources; what is read is below `tmp_path / "in"`, and nothing else may come to stand there."""

    def copied(name):
        target = tmp_path / "in" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (sources / name).is_dir() else shutil.copy)(sources / name, target)
        return target

    return copied


def assert_one_line(words, call, *arguments):
    with pytest.raises((ValueError, OSError)) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def assert_refused(words, tmp_path, *arguments):
    """The command ends with one line of error and leaves nothing."""
    before = tree(tmp_path)
    told = fail(*arguments)
    for word in words:
        assert word in told, told
    assert tree(tmp_path) == before


def put(name, content):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return damage


def as_folder(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def as_circle(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return damage


def as_device(name):
    """A link to what never ends."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return damage


def as_pipe(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


# --- weights ---


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def pickled(content, **options):
    """In the place of safetensors: bytes, or what torch writes."""

    def damage(folder):
        (folder / WHOLE).unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin", **options)

    return damage


def cut(name, count=100):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def cut_bin(folder):
    pickled({"a": torch.ones(99)})(folder)
    cut("pytorch_model.bin")(folder)


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return put(WHOLE, struct.pack("<Q", len(header)) + header + data)


def tensor(*shape, begin=0, end=8):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


BIN = "pytorch_model.bin"
WEIGHTS = {
    "bin-pointer": (pickled(POINTER), (BIN, "Git LFS pointer")),
    "bin-page": (pickled(PAGE), (BIN, "a web page")),
    "bin-code": (pickled({"a": Code()}), (BIN, "asks for code (", "never run")),
    "bin-old-code": (pickled({"a": Code()}, _use_new_zipfile_serialization=False), (BIN, "asks for code (")),
    "bin-other-pickle": (pickled(pickle.dumps({"a": Code()})), (BIN, "no dictionary of tensors")),
    "bin-noise": (pickled(bytes(range(1, 200))), (BIN, "no dictionary of tensors")),
    "bin-empty": (pickled(b""), (BIN, "is empty")),
    "bin-cut": (cut_bin, (BIN, "damaged or cut off")),
    "bin-list": (pickled([torch.ones(2)]), (BIN, "of type list")),
    "bin-number": (pickled(3), (BIN, "of type int")),
    "bin-nested": (pickled({"state_dict": {"a": torch.ones(2)}}), (BIN, "'state_dict' is of type dict")),
    "bin-numbered": (pickled({1: torch.ones(2)}), (BIN, "no dictionary of tensors: 1 ")),
    "bin-meta": (pickled({"a": torch.ones(2, device="meta")}), (BIN, "lacks the content of `a`")),
    "bin-expanded": (pickled({"a": torch.ones(1).expand(10**6, 10**6)}), (BIN, "lacks the content of `a`")),
    "pointer": (put(WHOLE, POINTER), (WHOLE, "Git LFS pointer")),
    "page": (put(WHOLE, PAGE), (WHOLE, "a web page")),
    "empty": (put(WHOLE, b""), (WHOLE, "is empty")),
    "cut": (cut(WHOLE), (WHOLE, "damaged or cut off")),
    "long-header": (put(WHOLE, struct.pack("<Q", 2**62) + b"{}"), (WHOLE, "damaged or cut off")),
    "list-header": (safetensors([1]), (WHOLE, "damaged or cut off")),
    "overlap": (safetensors({"a": tensor(2), "b": tensor(2, begin=4, end=12)}, bytes(12)), (WHOLE, "damaged")),
    "wide": (safetensors({"a": tensor(10**12, 10**12)}, bytes(8)), (WHOLE, "damaged or cut off")),
    "none": (safetensors({}), (WHOLE, "holds no tensors")),
    "folder": (as_folder(WHOLE), (WHOLE, "is a folder")),
    "circle": (as_circle(WHOLE), (WHOLE, "a link to nowhere")),
    "pipe": (as_pipe(WHOLE), (WHOLE, "is no file")),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, words = WEIGHTS[case]
    native, ours = copy("llama"), copy("ours")
    damage(native)
    damage(ours)
    assert_one_line(words, load, native)
    assert_refused(words, tmp_path, "convert", "--from", native, "--to", tmp_path / "out")
    assert_refused(words, tmp_path, "generate", ours, "a")


def shard(folder, number):
    return sorted(folder.glob("model-*.safetensors"))[number]


def index(**changes):
    return lambda folder: edit_json(folder / INDEX, **changes)


INDICES = {
    "list": (index(weight_map=[]), (INDEX, "holds no `weight_map`")),
    "empty": (index(weight_map={}), (INDEX, "holds no `weight_map`")),
    "absent": (index(weight_map=...), (INDEX, "holds no `weight_map`")),
    "null": (index(weight_map=None), (INDEX, "holds no `weight_map`")),
    "outside": (index(weight_map={"a": "../other.safetensors"}), (INDEX, "`a` in '../other.safetensors'")),
    "absolute": (index(weight_map={"a": "/etc/passwd"}), (INDEX, "'/etc/passwd'")),
    "number": (index(weight_map={"a": 3}), (INDEX, "`a` in 3")),
    "pickle": (index(weight_map={"a": "a.bin"}), (INDEX, "no .safetensors file")),
    "json-list": (put(INDEX, b"[]"), (INDEX, "holds no mapping")),
    "facts": (index(metadata=5), (INDEX, "`metadata=5` must be a mapping")),
    "no-facts": (index(metadata=None), (INDEX, "`metadata=None` must be a mapping")),
    "deep": (put(INDEX, DEEP), (INDEX, "nested too deeply")),
    "missing-shard": (lambda folder: shard(folder, 0).unlink(), (INDEX, "names model-00001-of", "lacks")),
    "same-tensors": (lambda folder: shutil.copy(shard(folder, 0), shard(folder, 1)), ("stands in", "-00002-of-")),
    "cut-shard": (lambda folder: cut(shard(folder, 0).name)(folder), ("model-00001-of", "damaged or cut off")),
}


@pytest.mark.parametrize("case", INDICES)
def test_shards(case, copy, tmp_path):
    damage, words = INDICES[case]
    folder = copy("sharded")
    damage(folder)
    assert_one_line(words, load, folder)
    assert_refused(words, tmp_path, "convert", "--from", folder, "--to", tmp_path / "out")


# --- config.json ---

JSON = {
    "broken": (b"{", "cannot be read"),
    "empty": (b"", "is empty"),
    "list": (b"[1]", "holds no mapping"),
    "empty-list": (b"[]", "holds no mapping"),
    "null": (b"null", "holds no mapping"),
    "number": (b"3", "holds no mapping"),
    "page": (PAGE, "a web page"),
    "pointer": (POINTER, "Git LFS pointer"),
    "latin": ('{"a": "é"}'.encode("latin1"), "cannot be read"),
    "deep": (DEEP, "nested too deeply"),
}
PLACES = {
    "folder": (as_folder, "is a folder"),
    "circle": (as_circle, "a link to nowhere"),
    "pipe": (as_pipe, "no file"),
    "device": (as_device, "no file"),
}


def damaged_json(name):
    """Cases of a JSON file by name: what damages it, and words of the error."""
    found = {case: (put(name, content), (name, words)) for case, (content, words) in JSON.items()}
    return found | {case: (make(name), (name, words)) for case, (make, words) in PLACES.items()}


@pytest.mark.parametrize("case", [*JSON, *PLACES])
def test_a_config_that_cannot_be_read(case, copy, tmp_path):
    damage, words = damaged_json("config.json")[case]
    native, ours = copy("llama"), copy("ours")
    damage(native)
    damage(ours)
    assert_one_line(words, load, native)
    assert_refused(words, tmp_path, "convert", "--from", native, "--to", tmp_path / "out")
    assert_refused(words, tmp_path, "export", ours, tmp_path / "out", "--as", "llama")
    for arguments in (("info", ours), ("generate", ours, "a"), ("export", ours, tmp_path / "out")):
        assert_refused(words, tmp_path, *arguments)
    assert_one_line([str(ours)], MiniLLMConfig.from_pretrained, ours)
    if case in PLACES or JSON[case][1] == "holds no mapping":
        assert_one_line(words, MiniLLMConfig.from_pretrained, ours)


def test_a_config_of_no_kind_of_model_is_refused_before_transformers_remarks_on_it(copy, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = copy("ours")
    edit_json(folder / "config.json", model_type=5)
    assert_one_line([str(folder), "model_type=5"], MiniLLMConfig.from_pretrained, folder)
    assert not caplog.messages


def test_a_config_that_is_missing_is_called_so(tmp_path):
    assert_one_line([str(tmp_path), "has no config.json"], MiniLLMConfig.from_pretrained, tmp_path)


NATIVE_VALUES = {
    "zero-heads": {"num_attention_heads": 0},
    "no-code-for-a-dtype": {"dtype": "os.system"},
    "a-module-for-a-dtype": {"dtype": "nn"},
    "dtypes": {"dtype": ["float32"]},
    "old-dtype": {"dtype": ..., "torch_dtype": "os.system"},
    "billion-layers": {"num_hidden_layers": 10**9},
    "many-layers": {"num_hidden_layers": 5000},
    "layers-in-words": {"num_hidden_layers": "two"},
    "half-layers": {"num_hidden_layers": 2.5},
    "wide": {"hidden_size": 6 * 10**9},
    "vocabulary": {"vocab_size": 10**18},
    "nan": {"vocab_size": float("nan")},
    "nan-base": {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
    "model-types": {"model_type": ["llama"]},
    "labels": {"num_labels": 10**9},
    "labels-in-words": {"id2label": "a"},
    "layer-configs": {"per_layer_config": 3},
    "quantization": {"quantization_config": "x"},
    "end-in-words": {"eos_token_id": "a"},
}
OWN_VALUES = NATIVE_VALUES | {
    "billion-rows": {"vocab_size": 10**9},
    "experts": {"mlp_type": "moe", "num_local_experts": 10**9},
    "positions": {"position_embedding_type": "learned", "max_position_embeddings": 10**18, "rope_parameters": None},
    "norm": {"norm_eps": float("nan")},
    "schema": {"schema_version": "a"},
    "turns": {"turn_token_ids": ["a"]},
}


def named_key(changes):
    return next(key for key, value in changes.items() if value is not ...)


@pytest.mark.parametrize("case", NATIVE_VALUES)
def test_values_of_a_native_config(case, copy, tmp_path):
    folder, changes = copy("llama"), NATIVE_VALUES[case]
    edit_json(folder / "config.json", **changes)
    words = ["config.json", "quantiz" if case == "quantization" else named_key(changes)]
    if case in ("wide", "vocabulary"):
        words = ["config.json", "sides" if case == "vocabulary" else "has shape"]
    assert_one_line(words, load, folder)
    assert_refused(words, tmp_path, "convert", "--from", folder, "--to", tmp_path / "out")


@pytest.mark.parametrize("case", OWN_VALUES)
def test_values_of_our_config(case, copy, tmp_path):
    folder, changes = copy("ours"), OWN_VALUES[case]
    edit_json(folder / "config.json", **changes)
    assert_one_line(["config.json"], export, folder, tmp_path / "out", "llama")
    assert_refused([str(folder)], tmp_path, "export", folder, tmp_path / "out")


@pytest.mark.parametrize(
    "case", sorted({"billion-layers", "zero-heads", "no-code-for-a-dtype", "vocabulary", "labels"})
)
def test_values_without_weights(case, copy, tmp_path):
    """`info`, and Python, read a config alone."""
    folder, changes = copy("ours"), OWN_VALUES[case]
    edit_json(folder / "config.json", **changes)
    words = [str(folder), named_key(changes)]
    assert_refused(words, tmp_path, "info", folder)
    assert_refused(words, tmp_path, "info", folder / "config.json")
    assert_one_line(words, MiniLLMConfig.from_pretrained, folder)
    assert_one_line(words[1:], AutoModelForCausalLM.from_pretrained, folder)


GENERATED = {
    "text": ({"initializer_range": float("inf")}, "initializer_range=inf"),
    "rope": ({"rope_parameters": 5}, "'rope_parameters'"),
    "rope-base": ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "['rope_theta']=nan"),
    "rope-type": ({"rope_parameters": {"rope_type": ["x"], "rope_theta": "a"}}, "['rope_type']=['x']"),
    "rope-factor": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 64}},
        "['factor']=1e+308",
    ),
    "newer": ({"schema_version": 99}, "schema_version=99"),
    "code": ({"auto_map": 5}, "auto_map=5"),
    "class": ({"auto_map": {"AutoConfig": 5}}, "auto_map['AutoConfig']=5"),
}


@pytest.mark.parametrize("case", GENERATED)
def test_values_of_a_config_beside_a_tokenizer(case, copy, tmp_path):
    """The config is to blame, in one line, whatever is loaded first."""
    folder, (changes, words) = copy("ours"), GENERATED[case]
    edit_json(folder / "config.json", **changes)
    (tmp_path / "text.txt").write_text("a b c " * 99, "utf-8")
    words = [str(folder / "config.json"), words]
    assert_refused(words, tmp_path, "generate", folder, "a")
    assert_refused(words, tmp_path, "info", folder)
    assert_refused(words, tmp_path, "info", folder / "config.json")
    assert_refused(words, tmp_path, "tokenizer", "report", folder, tmp_path / "text.txt")


# --- what stands beside ---

CARRIED = {
    **{f"generation-{case}": found for case, found in damaged_json("generation_config.json").items()},
    **{f"tokenizer-config-{case}": found for case, found in damaged_json("tokenizer_config.json").items()},
    "generation-end": (put("generation_config.json", b'{"eos_token_id": {"a": 1}}'), ("generation_config", "eos_")),
    "generation-length": (put("generation_config.json", b'{"max_length": "a"}'), ("generation_config", "max_length")),
    "generation-nan": (put("generation_config.json", b'{"temperature": NaN}'), ("generation_config", "temperature")),
    "class": (put("tokenizer_config.json", b'{"tokenizer_class": 3}'), ("tokenizer_config", "tokenizer_class=3")),
    "code": (put("tokenizer_config.json", b'{"auto_map": 3}'), ("tokenizer_config", "auto_map=3")),
    "template": (put("chat_template.jinja", b"\xff\xfe"), ("chat_template.jinja", "no text")),
    "template-syntax": (
        put("chat_template.jinja", b"{% for a in b %}\n{{"),
        ("chat_template.jinja does not compile",),
    ),
    "template-filter": (put("chat_template.jinja", b"{{ a | zzz }}"), ("does not compile", "'zzz'")),
    "template-folder": (as_folder("chat_template.jinja"), ("chat_template.jinja", "is a folder")),
    "special": (put("special_tokens_map.json", b"{"), ("special_tokens_map.json", "cannot be read")),
}
TOKENIZERS = {
    "broken": (put("tokenizer.json", b"{"), ("tokenizer.json",)),
    "pointer": (put("tokenizer.json", POINTER), ("tokenizer.json",)),
    "list": (put("tokenizer.json", b"[]"), ("tokenizer.json",)),
    "latin": (put("tokenizer.json", b"\xff\xfe{}"), ("tokenizer.json",)),
    "folder": (as_folder("tokenizer.json"), ("tokenizer.json", "is a folder")),
    "circle": (as_circle("tokenizer.json"), ("tokenizer.json", "a link to nowhere")),
    "pipe": (as_pipe("tokenizer.json"), ("tokenizer.json", "is no file")),
    "device": (as_device("tokenizer.json"), ("tokenizer.json", "is no file")),
}


@pytest.mark.parametrize("case", CARRIED)
def test_settings_of_generation_and_tokenizer(case, copy, tmp_path):
    damage, words = CARRIED[case]
    native, ours = copy("llama"), copy("ours")
    damage(native)
    damage(ours)
    assert_one_line(words, convert, native, tmp_path / "out")
    assert_one_line(words, export, ours, tmp_path / "out", "llama")
    assert_refused(words, tmp_path, "generate", ours, "a")


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case, copy, tmp_path):
    damage, words = TOKENIZERS[case]
    native, ours = copy("llama"), copy("ours")
    damage(native)
    damage(ours)
    (tmp_path / "text.txt").write_text("a b c " * 99, "utf-8")
    assert_one_line(words, convert, native, tmp_path / "out")
    assert_one_line(words, MiniLLMTokenizer.from_pretrained, ours)
    assert_one_line(words, export, ours, tmp_path / "out", "llama")
    assert_refused(words, tmp_path, "generate", ours, "a")
    assert_refused(words, tmp_path, "tokenizer", "report", ours, tmp_path / "text.txt")


def test_a_tokenizer_config_that_is_no_mapping_is_named_in_python(copy):
    folder = copy("ours")
    put("tokenizer_config.json", b"[1]")(folder)
    assert_one_line(["tokenizer_config.json", "no mapping"], MiniLLMTokenizer.from_pretrained, folder)


def test_a_template_that_does_not_compile_is_refused_with_the_tokenizer(copy, tmp_path):
    folder, out = copy("ours"), tmp_path / "out"
    (folder / "additional_chat_templates").mkdir()
    put("additional_chat_templates/tool.jinja", b"{% if %}")(folder)
    (tmp_path / "text.txt").write_text("a b c " * 99, "utf-8")
    words = [str(folder / "additional_chat_templates" / "tool.jinja"), "does not compile"]
    assert_refused(words, tmp_path, "tokenizer", "report", folder, tmp_path / "text.txt")
    assert_refused(words, tmp_path, "tokenizer", "extend", folder, tmp_path / "text.txt", "--num-new", 2, "--out", out)


def test_a_template_that_is_no_text_is_named_in_python(copy):
    folder = copy("ours")
    put("chat_template.jinja", b"\xff\xfe")(folder)
    assert_one_line(["chat_template.jinja", "is damaged"], MiniLLMTokenizer.from_pretrained, folder)


# --- adapters ---

ADAPTER = "adapter_model.safetensors"


def adapter(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def every_tensor(change):
    def damage(folder):
        tensors = {name: change(tensor) for name, tensor in load_file(folder / ADAPTER).items()}
        save_file(tensors, folder / ADAPTER, {"format": "pt"})

    return damage


def adapter_of_code(folder):
    (folder / ADAPTER).unlink()
    torch.save({"a": Code()}, folder / "adapter_model.bin")


ADAPTERS = {
    "rank": (adapter(r=10**8), ("adapter_config.json", "r=100000000")),
    "rank-in-words": (adapter(r="a"), ("adapter_config.json", "r='a'")),
    "alpha": (adapter(lora_alpha="x"), ("adapter_config.json", "lora_alpha='x'")),
    "nan": (adapter(lora_alpha=float("nan")), ("adapter_config.json", "lora_alpha=nan")),
    "types": (adapter(peft_type=["LORA"]), ("adapter_config.json", "peft_type")),
    "base": (adapter(base_model_name_or_path=3), ("adapter_config.json", "base_model_name_or_path=3")),
    "targets": (adapter(target_modules=3), ("adapter_config.json", "target_modules=3")),
    "type": (adapter(peft_type="OS"), ("OS",)),
    "cut": (cut(ADAPTER), (ADAPTER, "damaged or cut off")),
    "pointer": (put(ADAPTER, POINTER), (ADAPTER, "Git LFS pointer")),
    "page": (put(ADAPTER, PAGE), (ADAPTER, "a web page")),
    "empty": (put(ADAPTER, b""), (ADAPTER, "is empty")),
    "none": (lambda folder: (folder / ADAPTER).unlink(), ("holds no weights", ADAPTER)),
    "folder": (as_folder(ADAPTER), (ADAPTER, "is a folder")),
    "code": (adapter_of_code, ("adapter_model.bin", "asks for code (")),
    "whole-numbers": (every_tensor(lambda tensor: tensor.to(torch.int8)), ("I8", "no original weights")),
    "shapes": (every_tensor(lambda tensor: torch.zeros(3, 3)), ("adapter",)),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, copy, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, words = ADAPTERS[case]
    folder = copy("adapter")
    damage(folder)
    assert_refused(words, tmp_path, "generate", folder, "a")
    assert_refused(words, tmp_path, "export", sources / "ours", tmp_path / "out", "--adapter", folder)


@pytest.mark.parametrize("case", [*JSON, *PLACES])
def test_an_adapter_config_that_cannot_be_read(case, copy, sources, tmp_path):
    damage, words = damaged_json("adapter_config.json")[case]
    folder = copy("adapter")
    damage(folder)
    for arguments in (("info", folder), ("generate", folder, "a"), ("export", folder, tmp_path / "out")):
        assert_refused(words, tmp_path, *arguments)
    assert_refused(words, tmp_path, "export", sources / "ours", tmp_path / "out", "--adapter", folder)


# --- what a run left ---

LEFT = {
    "options": ("options.json", b"{", "cannot be read"),
    "options-list": ("options.json", b"[1]", "holds no mapping"),
    "state": ("checkpoint-1/trainer_state.json", b"{}", "holds no `global_step`"),
    "config": ("checkpoint-1/config.json", b"{", "cannot be read"),
    "weights": ("checkpoint-1/model.safetensors", bytes(99), "damaged or cut off"),
    "no-weights": ("checkpoint-1/model.safetensors", b"", "is empty"),
    "optimizer": ("checkpoint-1/optimizer.pt", b"x" * 99, "damaged or cut off"),
    "scheduler": ("checkpoint-1/scheduler.pt", b"", "is empty"),
    "random": ("checkpoint-1/rng_state.pth", POINTER, "Git LFS pointer"),
}


@pytest.fixture(scope="module")
def interrupted(sources, tmp_path_factory):
    """The command that goes on with a run that did not come to its end, and its folder of checkpoints."""
    root = tmp_path_factory.mktemp("run")
    corpus = write_corpus(root / "corpus", files=6)
    data = ("--data", corpus, "--max-steps", 1, "--batch-size", 1, "--max-length", 16)
    command = ("train", "--model", sources / "ours", *data, "--out", root / "out")
    succeed(*command)
    shutil.rmtree(root / "out")
    return command, root / "out-checkpoints"


@pytest.mark.parametrize("case", LEFT)
def test_a_checkpoint_of_a_run(case, interrupted):
    (command, folder), (name, content, words) = interrupted, LEFT[case]
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        assert_refused([str(folder / name), words], folder.parent, *command)
    finally:
        (folder / name).write_bytes(whole)


# --- GGUF ---


def edited(find, skip, form, value):
    """Writes a number behind some bytes of the file."""

    def damage(file):
        data = bytearray(file.read_bytes())
        struct.pack_into(form, data, data.find(find) + len(find) + skip, value)
        file.write_bytes(data)

    return damage


def gguf_with(**settings):
    named = {f"llama.{key.replace('__', '.')}": value for key, value in settings.items()}
    return lambda file: write_gguf(file, native_model("llama_gqa_tied"), **named)


EMBEDDING = b"token_embd.weight"
TYPES = b"tokenizer.ggml.token_type"
TOKENS = b"tokenizer.ggml.tokens"
GGUF = {
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "page": (lambda file: file.write_bytes(PAGE), "a web page"),
    "pointer": (lambda file: file.write_bytes(POINTER), "Git LFS pointer"),
    "other": (lambda file: file.write_bytes(b"x" * 99), "no GGUF file"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-5000]), "after the file"),
    "cut-header": (lambda file: file.write_bytes(file.read_bytes()[:300]), "damaged or cut off"),
    "eight-bytes": (lambda file: file.write_bytes(file.read_bytes()[:8]), "damaged or cut off"),
    "version": (edited(b"GGUF", 0, "<I", 99), "version 99"),
    "tensors": (edited(b"GGUF", 4, "<Q", 10**15), "1,000,000,000,000,000 tensors"),
    "settings": (edited(b"GGUF", 12, "<Q", 10**15), "1,000,000,000,000,000 settings"),
    "long-name": (edited(b"GGUF", 20, "<Q", 2**62), "bytes of text"),
    "many-texts": (edited(TOKENS, 8, "<Q", 10**15), "1,000,000,000,000,000 values"),
    "many-numbers": (edited(TYPES, 8, "<Q", 10**15), "1,000,000,000,000,000 values"),
    "overflow": (edited(TYPES, 8, "<Q", 2**63 + 5), "values of `tokenizer.ggml.token_type`"),
    "kind-of-value": (edited(TYPES, 0, "<I", 77), "type 77"),
    "rows": (edited(EMBEDDING, 12, "<Q", 10**15), "after the file"),
    "no-rows": (edited(EMBEDDING, 12, "<Q", 0), "has shape"),
    "dimensions": (edited(EMBEDDING, 0, "<I", 10**9), "1,000,000,000 dimensions"),
    "kind-of-tensor": (edited(EMBEDDING, 20, "<I", 999), "(999)"),
    "offset": (edited(EMBEDDING, 24, "<Q", 2**40), "after the file"),
    "overlap": (edited(EMBEDDING, 24, "<Q", 64), "overlap"),
    "layers": (gguf_with(block_count=10**9), "llama.block_count=1000000000"),
    "heads": (gguf_with(attention__head_count=0), "llama.attention.head_count=0"),
    "key-heads": (gguf_with(attention__head_count_kv=0), "llama.attention.head_count_kv=0"),
    "heads-in-words": (gguf_with(attention__head_count="a"), "llama.attention.head_count='a'"),
    "wide": (gguf_with(embedding_length=6 * 10**8), "weights"),
    "inner": (gguf_with(feed_forward_length=10**9), "weights"),
    "vocabulary": (gguf_with(vocab_size=2 * 10**9), "weights"),
    "nan": (gguf_with(attention__layer_norm_rms_epsilon=float("nan")), "epsilon=nan"),
    "base": (gguf_with(rope__freq_base=float("nan")), "llama.rope.freq_base=nan"),
    "infinite-base": (gguf_with(rope__freq_base=float("inf")), "llama.rope.freq_base=inf"),
    "end": (edited(b"tokenizer.ggml.eos_token_id", 4, "<I", 2**31), "tokenizer.ggml.eos_token_id=2147483648"),
    "tensor-name": (edited(EMBEDDING, -3, "<B", 0xFF), "is 'token_embd.wei\\ufffdht'"),
    "key": (edited(b"llama.block_count", -3, "<B", 7), "is 'llama.block_co\\x07nt'"),
    "folder": (lambda file: (file.unlink(), file.mkdir()), "is a folder"),
    "pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "no file"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(case, copy, tmp_path):
    damage, words = GGUF[case]
    file = copy("tiny.gguf")
    damage(file)
    assert_one_line(["tiny.gguf", words], load, file)
    assert_refused(["tiny.gguf", words], tmp_path, "convert", "--from", file, "--to", tmp_path / "out")
