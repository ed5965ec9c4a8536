"""What is written is compared with its source before it stands there: conversions, exports and merged adapters."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import fail, invoke, save_small_model, small_tokenizer, succeed, tree
from conversion_cases import edit_json, logits_of, save_native
from native_families import CASES
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm import MiniLLMForCausalLM
from minillm.conversion import ConversionError, comparison, convert, export
from minillm.conversion.families import LLAMA
from minillm.conversion.transforms import Transform

SOURCE = "minillm.conversion.comparison"
BIN = "pytorch_model.bin"
FIXTURES = Path(__file__).parents[1] / "families"


@pytest.fixture
def told(caplog):
    """What the log was told, as one text."""
    caplog.set_level(logging.INFO, "minillm.conversion")
    return lambda: " ".join(record.getMessage() for record in caplog.records if record.name == SOURCE)


# --- convert and export ---


@pytest.mark.mostly_thorough("bloom_odd_heads", "mixtral")
@pytest.mark.parametrize(
    "name", ["gpt2", "bloom_odd_heads", "llama_gqa_tied", "falcon_rw", "mpt_odd_heads", "mixtral"]
)
def test_conversions_both_ways_say_that_logits_agree(name, tmp_path, told):
    save_native(tmp_path / "native", name)
    convert(tmp_path / "native", tmp_path / "ours", dtype=torch.bfloat16)
    export(tmp_path / "ours", tmp_path / "back", CASES[name][0])
    assert told().count("agree with the source's") == 2, told()


def test_files_of_other_forms_are_compared_as_well(tmp_path, told):
    """Weights in `.bin`, a head that repeats tied embeddings, names without the prefix of the base model."""
    save_native(tmp_path / "native")
    file = tmp_path / "native" / "model.safetensors"
    tensors = load_file(file)
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file.with_name(BIN))
    file.unlink()
    convert(tmp_path / "native", tmp_path / "ours")
    save_native(tmp_path / "bare", "gpt2")
    file = tmp_path / "bare" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    convert(tmp_path / "bare", tmp_path / "gpt2", max_shard_size="60KB")
    assert told().count("agree with the source's") == 2, told()


def flip(tensors, config):
    return [tensor.flip(0) for tensor in tensors]


def spoil(monkeypatch):
    """Rows of a projection in another order: what a wrong rule of a family would do."""
    rules = list(LLAMA.tensors)
    number = next(i for i, rule in enumerate(rules) if "up_proj" in str(rule.native))
    rules[number] = rules[number]._replace(transform=Transform(flip, flip))
    monkeypatch.setitem(vars(LLAMA), "tensors", tuple(rules))


def test_a_config_that_asks_for_tuples_is_compared(tmp_path, told):
    save_native(tmp_path / "native", "llama")
    edit_json(tmp_path / "native" / "config.json", return_dict=False)
    convert(tmp_path / "native", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "llama")
    assert told().count("agree with the source's") == 2


def test_a_source_that_cannot_be_run_is_not_compared(tmp_path, told):
    """transformers builds such a Falcon, and then looks for norms that it has not made."""
    save_native(tmp_path / "native", "falcon_7b")
    edit_json(tmp_path / "native" / "config.json", num_ln_in_parallel_attn=2)
    convert(tmp_path / "native", tmp_path / "ours")
    assert "were not compared" in told()


@pytest.mark.mostly_thorough("torch.bfloat16")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_what_differs_is_refused_and_leaves_nothing(dtype, tmp_path, monkeypatch):
    save_native(tmp_path / "native", "llama")
    convert(tmp_path / "native", tmp_path / "ours", dtype=dtype)
    spoil(monkeypatch)
    with pytest.raises(ConversionError, match="differs from its source: logits of 24 tokens are off by"):
        convert(tmp_path / "native", tmp_path / "wrong", dtype=dtype)
    with pytest.raises(ConversionError, match="differs from its source"):
        export(tmp_path / "ours", tmp_path / "wrong", "llama")
    assert {path.name for path in tmp_path.iterdir()} == {"native", "ours"}
    assert "differs from its source" in fail("convert", "--from", tmp_path / "native", "--to", tmp_path / "wrong")
    assert {path.name for path in tmp_path.iterdir()} == {"native", "ours"}


def test_what_was_set_otherwise_is_put_aside(tmp_path, told, monkeypatch):
    """A field that changes the logits does not hide a wrong weight, nor is it taken for one."""
    native = save_native(tmp_path / "native", "llama")
    stretched = {"rope_theta": 7.0, "rope_type": "default"}
    convert(tmp_path / "native", tmp_path / "ours", rope_parameters=stretched)
    assert "agree with the source's" in told()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.config.rope_parameters["rope_theta"] == 7.0
    assert not torch.allclose(logits_of(loaded), logits_of(native), atol=1e-2)
    spoil(monkeypatch)
    with pytest.raises(ConversionError, match="differs from its source"):
        convert(tmp_path / "native", tmp_path / "wrong", rope_parameters=stretched)


def test_keys_vouched_for_are_put_aside_on_both_sides(tmp_path, told):
    save_native(tmp_path / "native", "bloom_odd_heads")
    edit_json(tmp_path / "native" / "config.json", slow_but_exact=True, pretraining_tp=2)
    convert(tmp_path / "native", tmp_path / "ours", ignore_keys=["slow_but_exact"])
    assert "agree with the source's" in told()


def test_a_request_for_attentions_is_no_difference(tmp_path, told):
    """With it transformers' Falcon computes without a mask."""
    save_native(tmp_path / "native", "falcon_7b")
    edit_json(tmp_path / "native" / "config.json", output_attentions=True)
    convert(tmp_path / "native", tmp_path / "ours")
    assert "agree with the source's" in told()


def test_a_model_too_large_for_memory_is_not_compared_and_it_is_said(tmp_path, told, monkeypatch):
    monkeypatch.setattr(comparison, "free_memory", lambda: 2 * 4 * 30_000)
    monkeypatch.setattr(comparison, "few_logits", None)
    save_native(tmp_path / "native", "llama")
    convert(tmp_path / "native", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "llama")
    assert told().count("not compared with its source's: its ") == 2 and "50% of the free memory" in told()


def test_free_memory_heeds_the_limit_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "CONTAINER", tmp_path)
    whole = comparison.free_memory()
    assert whole > 10**8
    for name, text in {"max": "1000\n", "current": "700\n", "stat": "anon 1\ninactive_file 200\nfile 3\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text, "utf-8")
    assert comparison.free_memory() == 500
    (tmp_path / "memory.max").write_text("max\n", "utf-8")
    assert comparison.free_memory() > 10**8


def test_families_that_transformers_lacks_say_so_in_and_are_read_back_out(tmp_path, told):
    folder = FIXTURES / "chatglm-6b"
    convert(folder, tmp_path / "ours")
    assert "transformers has no chatglm" in told() and "were not compared" in told()
    export(tmp_path / "ours", tmp_path / "back", "chatglm")
    assert "agree with the source's" in told()


def test_threads_modes_and_logging_are_left_alone(tmp_path):
    from transformers.utils import logging as stock

    model = save_native(tmp_path / "native").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    comparison.few_logits(model)
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2
    before = stock.get_verbosity(), stock.is_progress_bar_enabled()
    convert(tmp_path / "native", tmp_path / "ours")
    assert (stock.get_verbosity(), stock.is_progress_bar_enabled()) == before


def test_commands_say_whether_they_compared(tmp_path, monkeypatch):
    save_native(tmp_path / "native")
    assert "agree with the source's" in succeed("convert", "--from", tmp_path / "native", "--to", tmp_path / "ours")
    assert "agree with the source's" in succeed("export", tmp_path / "ours", tmp_path / "back", "--as", "llama")
    monkeypatch.setattr(comparison, "free_memory", lambda: 1000)
    printed = succeed("convert", "--from", tmp_path / "native", "--to", tmp_path / "more")
    assert "not compared" in printed and "written" in printed


# --- adapters ---

ADAPTERS = {
    "lm_head": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "kept_tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved_and_kept_tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "inside": {"target_modules": ["q_proj", "up_proj"]},
}
STAY_TIED = ("kept_tied", "saved_and_kept_tied", "tokens", "inside")


def save_adapter(base, folder, **options):
    """An adapter with weights large enough to be seen; returns the logits of the model with it."""
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False} | options
    adapted = get_peft_model(MiniLLMForCausalLM.from_pretrained(base), LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    # As it is read again: what counts is the saved adapter.
    return logits_of(PeftModel.from_pretrained(MiniLLMForCausalLM.from_pretrained(base), folder))


@pytest.mark.mostly_thorough("minillm-both", "minillm-kept_tied", "llama-inside")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("family", ["minillm", "llama"])
def test_merging_into_tied_tables_is_exact(name, family, tmp_path):
    save_small_model(tmp_path / "ours", tie_word_embeddings=True)
    expected = save_adapter(tmp_path / "ours", tmp_path / "adapter", **ADAPTERS[name])
    unadapted = logits_of(MiniLLMForCausalLM.from_pretrained(tmp_path / "ours"))
    assert (expected - unadapted).abs().max() > 0.1
    options = [] if family == "minillm" else ["--as", family]
    result = invoke("export", tmp_path / "ours", tmp_path / "out", "--adapter", tmp_path / "adapter", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(found), expected, atol=1e-4, rtol=1e-5)
    assert type(found).__name__ == {"minillm": "MiniLLMForCausalLM", "llama": "LlamaForCausalLM"}[family]
    assert found.config.tie_word_embeddings == (name in STAY_TIED)


def test_a_family_whose_tables_are_tied_refuses_an_adapter_on_one_of_them(tmp_path):
    """By the name of the field: GLM of the paper has one table."""
    convert(FIXTURES / "glm-10b", tmp_path / "ours")
    small_tokenizer().save_pretrained(tmp_path / "ours")
    save_adapter(tmp_path / "ours", tmp_path / "adapter", target_modules=["lm_head"])
    arguments = ("export", tmp_path / "ours", tmp_path / "out", "--as", "glm-infilling")
    assert "tie_word_embeddings=False" in fail(*arguments, "--adapter", tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merging_in_low_precision_is_within_its_rounding(dtype, tmp_path):
    save_small_model(tmp_path / "wide", tie_word_embeddings=True)
    assert invoke("export", tmp_path / "wide", tmp_path / "ours", "--dtype", dtype).exit_code == 0
    save_adapter(tmp_path / "wide", tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    result = invoke("export", tmp_path / "ours", tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert result.exit_code == 0, (result.output, result.exception)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_a_merge_that_is_not_exact_is_refused(tmp_path, monkeypatch):
    save_small_model(tmp_path / "ours", tie_word_embeddings=True)
    save_adapter(tmp_path / "ours", tmp_path / "adapter", target_modules=["lm_head"])
    monkeypatch.setattr("minillm.cli.merging.untie", lambda model: None)
    before = tree(tmp_path)
    for options in ([], ["--as", "llama"]):
        message = fail("export", tmp_path / "ours", tmp_path / "out", "--adapter", tmp_path / "adapter", *options)
        assert "cannot be merged" in message and "off by" in message
    assert tree(tmp_path) == before


def test_a_written_folder_that_differs_is_refused(tmp_path, monkeypatch):
    save_small_model(tmp_path / "ours")
    written = MiniLLMForCausalLM.save_pretrained

    def damaged(self, folder, *args, **kwargs):
        kept = self.lm_head.weight.data
        self.lm_head.weight.data = kept + 1
        written(self, folder, *args, **kwargs)
        self.lm_head.weight.data = kept

    monkeypatch.setattr(MiniLLMForCausalLM, "save_pretrained", damaged)
    before = tree(tmp_path)
    assert "computes other logits" in fail("export", tmp_path / "ours", tmp_path / "out")
    assert tree(tmp_path) == before


def test_an_adapter_without_weights_to_merge_is_named(tmp_path):
    save_small_model(tmp_path / "ours")
    base = MiniLLMForCausalLM.from_pretrained(tmp_path / "ours")
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "adapter"
    )
    message = fail("export", tmp_path / "ours", tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert "PREFIX_TUNING" in message and "cannot be merged" in message


PEAK = """
import sys
from minillm.conversion import comparison, convert

def peak():
    # Of this process alone: what getrusage tells is at least the peak of its parent.
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

comparison.free_memory = lambda: int(sys.argv[1])
before = peak()
convert("native", f"ours-{sys.argv[1]}", max_shard_size="5MB")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process")
@pytest.mark.slow
def test_where_memory_is_short_no_more_than_a_shard_and_a_layer_is_held(tmp_path):
    """The comparison does not break the promise of `convert`: without room for it, a model is never held whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1024, num_hidden_layers=60, num_attention_heads=8
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "native", max_shard_size="20MB")
    size = sum(file.stat().st_size for file in (tmp_path / "native").glob("*.safetensors"))
    peaks = []
    for free in (10**6, 10**12):
        command = [sys.executable, "-c", PEAK, str(free)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[0] < size / 2 < size < peaks[1]
