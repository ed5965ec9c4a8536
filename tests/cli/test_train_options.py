"""The options of `minillm train`: one description for flags, file, help and record, and what each of them does."""

import dataclasses
import json
import re

import pytest
import torch
import yaml
from cli_cases import assert_same_weights, fail, invoke, succeed, tree, weights
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.cli import training_plan, training_run
from minillm.cli.train_command import TrainOptions
from minillm.cli.training_checkpoints import Begun
from minillm.cli.training_options import read_options

SHORT = ("--max-steps", 2, "--batch-size", 2)
TINY = ("hidden_size=32", "num_hidden_layers=1", "num_attention_heads=4")


def sets(*pairs):
    return [argument for pair in pairs for argument in ("--set", pair)]


def settings_of(out):
    return json.loads((out.with_name(f"{out.name}-run") / "settings.json").read_text("utf-8"))


def test_every_option_and_every_default_stands_in_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    told = invoke("train", "--help").stdout
    for name, field in TrainOptions.__dataclass_fields__.items():
        flag = {"settings": "--set"}.get(name, f"--{name.replace('_', '-')}")
        assert flag in told
        # Long defaults are broken over lines.
        default = field.default
        if default is not None and not isinstance(default, bool):
            assert f"[default: {getattr(default, 'value', default)}]" in told
    assert told.count("[default:") >= 29


def test_a_config_of_any_settings_from_scratch(small, tmp_path):
    out = tmp_path / "out"
    fields = sets(*TINY, "position_embedding_type=alibi", "norm_type=layernorm", "mlp_type=mlp", "norm_eps=1e-4")
    start = ("--preset", "gpt2", "--tokenizer", small["tokenizer"], "--data", small["corpus"], "--max-length", 32)
    succeed("train", *start, "--out", out, *SHORT, *fields)
    config = AutoModelForCausalLM.from_pretrained(out).config
    found = (config.hidden_size, config.position_embedding_type, config.norm_type, config.norm_eps, config.vocab_size)
    assert found == (32, "alibi", "layernorm", 1e-4, 320)
    # The saved config, as a file, makes the same model with another tokenizer's ids; what it derived is derived anew.
    again = tmp_path / "again"
    start = ("--preset", out / "config.json", "--tokenizer", small["tokenizer"], "--data", small["corpus"])
    succeed("train", *start, "--out", again, *SHORT, "--set", "hidden_size=16")
    other = AutoModelForCausalLM.from_pretrained(again).config
    assert (other.hidden_size, other.intermediate_size, other.norm_eps) == (16, 64, 1e-4)
    assert other.position_embedding_type == "alibi" and other.max_position_embeddings == 32


def test_a_config_file_in_yaml(small, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "hidden_size: 32\nnum_hidden_layers: 1\nnum_attention_heads: 4\nnorm_eps: 1e-5\nmax_position_embeddings: 48",
        "utf-8",
    )
    start = ("train", "--tokenizer", small["tokenizer"], "--data", small["corpus"], "--out", tmp_path / "out", *SHORT)
    succeed(*start, "--preset", file)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.norm_eps, config.max_position_embeddings, config.num_hidden_layers) == (1e-5, 48, 1)
    for text, words in (
        ("hidden_size: wide", "hidden_size is 'wide'; it must be int"),
        ("model_type: llama", "of a 'llama' model"),
        ("- 1", "must hold a mapping"),
        ("hiden_size: 4", "hiden_size"),
    ):
        file.write_text(text, "utf-8")
        before = tree(tmp_path)
        told = fail(*start[:-5], tmp_path / "no", *SHORT, "--preset", file)
        assert words in told and tree(tmp_path) == before
    assert "nowhere.yaml" in fail(*start[:-5], tmp_path / "no", *SHORT, "--preset", tmp_path / "nowhere.yaml")


def test_a_file_of_options_takes_mappings_and_lists_and_flags_win(small, tmp_path):
    options = {
        "model": str(small["causal"]),
        "data": str(small["corpus"]),
        "out": str(tmp_path / "out"),
        "max-steps": 2,
        "batch_size": 2,
        "set": {"attention_dropout": 0.25, "use_cache": False, "eos_token_id": [2, 3]},
        "trainer": {"max_grad_norm": 0.5, "adam_beta2": "0.9"},
        "seed": None,
    }
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(options), "utf-8")
    succeed("train", "--config", file, "--weight-decay", 0, "--set", "attention_dropout=0.5")
    settings = settings_of(tmp_path / "out")
    config, trainer = settings["config"], settings["trainer"]
    assert (config["attention_dropout"], config["eos_token_id"], config["use_cache"]) == (0.5, [2, 3], False)
    assert (trainer["max_grad_norm"], trainer["adam_beta2"], trainer["weight_decay"]) == (0.5, 0.9, 0.0)
    assert settings["options"]["settings"]["attention_dropout"] == 0.5


def test_the_record_repeats_the_run(small, tmp_path):
    start = ("--model", small["causal"], "--data", small["corpus"], *SHORT, "--set", "attention_dropout=0.1")
    succeed("train", *start, "--out", tmp_path / "a", "--trainer", "max_grad_norm=0.25", "--lora", "--lora-rank", 4)
    succeed("train", "--config", tmp_path / "a-run" / "options.yaml", "--out", tmp_path / "b")
    assert_same_weights(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"))
    one, other = (settings_of(tmp_path / name) for name in "ab")
    assert {**one["options"], "out": 0} == {**other["options"], "out": 0}
    assert one["trainer"]["max_grad_norm"] == other["trainer"]["max_grad_norm"] == 0.25


REFUSED = {
    "both-lengths": (("--max-steps", 3, "--epochs", 1), "give one of --max-steps 3 and --epochs 1"),
    "no-epochs": (("--epochs", 0), "--epochs 0 trains nothing"),
    "rank-alone": (("--lora-rank", 4), "--lora-rank needs --lora"),
    "dora-alone": (("--dora",), "--dora needs --lora"),
    "targets": (("--lora", "--lora-targets", "q_porj"), "no module is called q_porj; there are down_proj"),
    "no-targets": (("--lora", "--lora-targets", ","), "no module is called so"),
    "new-tokens": (("--lora", "--train-new-tokens"), "does not say which of its tokens are new"),
    "optimizer": (("--optimizer", "adam"), "--optimizer 'adam' is unknown; allowed: adamw_torch"),
    "no-package": (("--optimizer", "adamw_bnb_8bit"), "bitsandbytes"),
    "schedule": (("--schedule", "cosin"), "--schedule 'cosin' is unknown; allowed: linear, cosine"),
    "schedule-alone": (("--schedule", "cosine_with_min_lr"), "min_lr"),
    "fp16": (("--precision", "fp16"), "--precision fp16 needs an accelerator"),
    "device": (("--device", "tpu"), "--device tpu: there is no accelerator here"),
    "tracker": (("--report-to", "wandb"), "--report-to wandb needs a package that is missing: pip install wandb"),
    "closed": (("--set", "hidden_size=64"), "--set hidden_size: with --model"),
    "infinite": (("--learning-rate", "inf"), "the option learning_rate is inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(case, small, tmp_path, monkeypatch):
    arguments, words = REFUSED[case]
    monkeypatch.setattr(training_plan, "best_device", lambda: torch.device("cpu"))
    told = fail("train", "--model", small["causal"], "--data", small["corpus"], "--out", tmp_path / "out", *arguments)
    assert words in told and tree(tmp_path) == []


def options(**given):
    return read_options({"out": "out", "data": "data", "model": "m", **given})


def test_epochs_count_the_steps_that_read_every_row_once():
    for rows, batch, accumulate, epochs, steps in (
        (10, 2, 1, 1, 5),
        (10, 4, 1, 1, 3),
        (10, 2, 2, 1, 3),
        (10, 2, 2, 2.5, 8),
        (3, 8, 1, 0.1, 1),
    ):
        plan = training_plan.make_plan(options(batch_size=batch, accumulate=accumulate, epochs=epochs), rows)
        assert plan.total_steps == steps, (rows, batch, accumulate, epochs)
        assert plan.rows_per_step == batch * accumulate


def test_rates_follow_what_is_trained():
    rate = {
        "preset": training_plan.make_plan(options(model=None, preset="gpt2", tokenizer="t"), 8).learning_rate,
        "all": training_plan.make_plan(options(), 8).learning_rate,
        "lora": training_plan.make_plan(options(lora=True), 8).learning_rate,
    }
    assert rate == {"preset": 1e-3, "all": 5e-5, "lora": 2e-3}
    assert [training_plan.make_plan(options(warmup=w, max_steps=40), 8).warmup_steps for w in (0, 0.1, 1, 7)] == [
        0,
        4,
        1,
        7,
    ]


def test_accumulating_is_a_larger_batch(small, tmp_path):
    start = ("train", "--model", small["causal"], "--data", small["corpus"], "--epochs", 0.1, "--learning-rate", 0.01)
    for name, batch, accumulate in (("one", 4, 1), ("two", 2, 2)):
        succeed(*start, "--out", tmp_path / name, "--batch-size", batch, "--accumulate", accumulate)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0)
    before = load_file(small["causal"] / "model.safetensors")
    assert max((one[name] - before[name]).abs().max() for name in one) > 0.01


@pytest.mark.parametrize(
    ("supported", "device", "asked", "found"),
    [
        (True, "cuda", "auto", "bf16"),
        (False, "cuda", "auto", "fp32"),
        (True, "cpu", "auto", "fp32"),
        (True, "cuda", "fp16", "fp16"),
        (False, "cuda", "bf16", None),
        (False, "cpu", "bf16", "bf16"),
    ],
)
def test_precision_is_what_the_device_supports(supported, device, asked, found, monkeypatch):
    monkeypatch.setattr(training_plan, "best_device", lambda: torch.device(device))
    monkeypatch.setattr(training_plan, "supports_bf16", lambda name: supported)
    given = options(precision=asked)
    if found is None:
        with pytest.raises(ValueError, match="--precision bf16 is not supported by this cuda device"):
            training_plan.choose_machine(given, Begun())
    else:
        assert training_plan.choose_machine(given, Begun()) == (device, found)
    # A run that goes on keeps its own.
    kept = training_plan.choose_machine(
        dataclasses.replace(given, precision="auto"), Begun(None, {"precision": "fp32"})
    )
    assert kept == (device, "fp32")


def test_bf16_computes_in_16_bits_and_keeps_weights_in_32(small, tmp_path, monkeypatch):
    seen = []
    stock = training_run.LogitFreeTrainer.training_step

    def watched(self, model, *arguments, **keywords):
        linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        hook = linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        with hook:
            return stock(self, model, *arguments, **keywords)

    monkeypatch.setattr(training_run.LogitFreeTrainer, "training_step", watched)
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(small["causal"], dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(small["causal"]).save_pretrained(half)
    succeed(
        "train", "--model", half, "--data", small["corpus"], "--out", tmp_path / "out", *SHORT, "--precision", "bf16"
    )
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "out-checkpoints" / "options.json").read_text("utf-8"))["precision"] == "bf16"


def test_threads_are_those_asked_for_or_of_the_run_or_the_faster(monkeypatch):
    machine, timed, set_to = training_plan.Machine("cpu", "fp32"), [], []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(training_plan, "fastest_thread_count", lambda run, repeats: timed.append(run) or (3, 0.1))
    choose = training_plan.choose_threads
    assert choose(options(threads=5), Begun(), machine, None) == 5
    assert choose(options(), Begun(None, {"threads": 7}), machine, None) == 7
    # The user's word for all programs.
    assert choose(options(), Begun(), machine, None) == torch.get_num_threads() and not timed
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose(options(), Begun(), machine, None) == 3 and len(timed) == 1
    assert choose(options(), Begun(), training_plan.Machine("cuda", "bf16"), None) == torch.get_num_threads()
    assert len(timed) == 1 and set_to[:2] == [5, 7]


def test_an_adapter_is_made_as_asked(small, tmp_path):
    out = tmp_path / "out"
    asked = ("--lora-rank", 4, "--lora-alpha", 4, "--lora-targets", "q_proj, down_proj", "--dora")
    succeed("train", "--model", small["causal"], "--data", small["corpus"], "--out", out, *SHORT, "--lora", *asked)
    config = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 4.0, True)
    assert set(config["target_modules"]) == {"q_proj", "down_proj"}
    assert any("magnitude" in name for name in load_file(out / "adapter_model.safetensors"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_train_with_an_adapter_which_says_so(tied, small, tmp_path):
    from cli_cases import save_small_model

    base = save_small_model(tmp_path / "base", tie_word_embeddings=tied)
    corpus, extended, out = small["corpus"], tmp_path / "extended", tmp_path / "out"
    succeed("tokenizer", "extend", base, corpus, "--num-new", 8, "--model", base, "--out", extended)
    arguments = ("--data", corpus, "--max-steps", 3, "--lora", "--train-new-tokens", "--learning-rate", 0.01)
    told = succeed("train", "--model", extended, "--out", out, *arguments)
    assert "8 new tokens train with the adapter, from id 320 on" in told
    before = AutoModelForCausalLM.from_pretrained(extended)
    old = weights(before)
    merged = PeftModel.from_pretrained(before, out).merge_and_unload()
    tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name in tables:
        changed = (weights(merged)[name] != old[name]).any(1).nonzero()[:, 0].tolist()
        assert changed and set(changed) <= set(range(320, 328)), name
    where = "8 of embed_tokens" if tied else "8 of embed_tokens, 8 of lm_head"
    assert f"- **tokens whose rows are trained**: {where}\n" in (out / "README.md").read_text("utf-8")
    # What is exported computes the same, as the command itself compares.
    succeed("export", extended, tmp_path / "merged", "--adapter", out)


def test_data_options_reach_the_reader(small, tmp_path, monkeypatch):
    seen = []

    def read(given, objective, tokenizer):
        seen.append(given)
        return [{"input_ids": list(range(5, 60))}] * 8, [{"input_ids": list(range(5, 60))}] * 2

    monkeypatch.setattr(training_run, "read_samples", read)
    template = tmp_path / "template.jinja"
    asked = (
        "--objective",
        "causal",
        "--columns",
        "prompt=question",
        "--format",
        "alpaca",
        "--encoding",
        "gbk",
        "--training-template",
        template,
    )
    succeed("train", "--model", small["causal"], "--data", "user/data", "--out", tmp_path / "out", *SHORT, *asked)
    (given,) = seen
    found = (given.columns, given.format, given.encoding, given.training_template, str(given.data))
    assert found == ("prompt=question", "alpaca", "gbk", template, "user/data")


@pytest.mark.usefixtures("trackio_runs")
def test_trackio_is_reported_to(small, tmp_path, monkeypatch):
    reported = []
    import transformers.integrations.integration_utils as integrations

    monkeypatch.setattr(
        integrations.TrackioCallback, "setup", lambda self, *args, **kwargs: reported.append(kwargs or args)
    )
    monkeypatch.setattr(integrations.TrackioCallback, "on_log", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(integrations.TrackioCallback, "on_train_begin", lambda self, *a, **k: reported.append(1))
    monkeypatch.setattr(integrations.TrackioCallback, "on_train_end", lambda self, *args, **kwargs: None)
    start = ("--model", small["causal"], "--data", small["corpus"], "--out", tmp_path / "out", *SHORT)
    succeed("train", *start, "--report-to", "trackio")
    assert reported and "trackio" in settings_of(tmp_path / "out")["trainer"]["report_to"]


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_losses(small, tmp_path):
    start = ("train", "--model", small["causal"], "--data", small["corpus"], *SHORT, "--learning-rate", 1e-3)
    told = [succeed(*start, "--out", tmp_path / name, *more) for name, more in (("a", ()), ("b", ("--compile",)))]
    plain, compiled = ([float(loss) for loss in re.findall(r"loss ([\d.]+)", text)] for text in told)
    assert compiled == pytest.approx(plain, abs=2e-3) and len(plain) == 2
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
