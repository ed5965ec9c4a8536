"""`minillm train`: every objective, LoRA, options from files, going on after an interruption, and what it refuses."""

import functools
import json
import math
import re

import pytest
import torch
import yaml
from cli_cases import (
    assert_same_weights,
    fail,
    invoke,
    save_small_model,
    small_tokenizer,
    succeed,
    tree,
    weights,
    write_answers,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from minillm import MiniLLMForCausalLM
from minillm.cli.training_run import LogitFreeTrainer
from minillm.configuration.presets import PRESETS, Preset
from minillm.data import load_corpus, split_corpus, tokenize_documents
from minillm.evaluation import perplexity
from minillm.training import DataCollatorForCausalLM, DataCollatorForGLM, DataCollatorForPrefixLM, pack_dataset

SHORT = ("--max-steps", 6, "--batch-size", 4)
FAST = ("--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_small_model(root / name, name) for name in ("causal", "prefix")}
    small_tokenizer().save_pretrained(root / "tokenizer")
    return folders | {"tokenizer": root / "tokenizer"}


@pytest.fixture
def tiny_preset(monkeypatch):
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "made up", fields))
    monkeypatch.setitem(PRESETS, "tiny-prefix", Preset("tiny", "made up", fields | {"attention_type": "prefix"}))
    return "tiny"


def losses(told):
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]


def reported_perplexity(told):
    value, tokens = re.search(r"held-out perplexity ([\d.]+) on ([\d,]+) tokens", told).groups()
    return float(value), int(tokens.replace(",", ""))


def held_out_score(folder, corpus, collator_class, length=64, seed=0):
    """The perplexity of a saved model on the held-out documents, each row in a batch of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collator = collator_class(tokenizer, max_length=length, seed=seed)
    rows = pack_dataset(tokenize_documents(split_corpus(load_corpus(corpus))[1], tokenizer), collator)
    return perplexity(AutoModelForCausalLM.from_pretrained(folder), rows, collator, batch_size=1)


@pytest.mark.parametrize(
    ("preset", "collator"),
    [("tiny", DataCollatorForCausalLM), ("tiny-prefix", DataCollatorForPrefixLM)],
    ids=["causal", "prefix"],
)
def test_pre_training_from_a_preset(preset, collator, tiny_preset, models, corpus, tmp_path):
    out = tmp_path / "out"
    options = ("--tokenizer", models["tokenizer"], "--max-steps", 30, "--batch-size", 4, "--learning-rate", 0.01)
    told = succeed("train", "--preset", preset, "--data", corpus, "--out", out, *options)
    found = losses(told)
    assert len(found) == 30 and found[0] == pytest.approx(math.log(320), abs=0.3)
    assert sum(found[-5:]) / 5 < found[0] - 1.5
    assert f"objective {'prefix' if 'prefix' in preset else 'causal'}" in told
    score = held_out_score(out, corpus, collator)
    assert reported_perplexity(told) == (pytest.approx(score.perplexity, abs=0.006), score.num_tokens)
    config = AutoModelForCausalLM.from_pretrained(out).config
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert config.attention_type == ("prefix" if "prefix" in preset else "causal")
    assert [config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id] == [320, 1, 2, 0]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [1, 2, 0]
    assert not [path for path in tree(out) if path.endswith((".bin", ".pt", ".pkl"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-checkpoints", "out-run"]


@pytest.mark.parametrize("positions", ["rope", "glm_2d"])
def test_filling_blanks(positions, tiny_preset, models, corpus, tmp_path, monkeypatch):
    fields = PRESETS["tiny-prefix"].fields | {"position_embedding_type": positions}
    monkeypatch.setitem(PRESETS, "tiny-glm", Preset("tiny", "made up", fields))
    out = tmp_path / "out"
    options = ("--tokenizer", models["tokenizer"], "--max-steps", 20, "--batch-size", 4, "--learning-rate", 0.01)
    told = succeed("train", "--preset", "tiny-glm", "--objective", "glm", "--data", corpus, "--out", out, *options)
    assert "objective glm" in told and losses(told)[-1] < losses(told)[0] - 0.5
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    named = {name: getattr(tokenizer, name) for name in ("mask_token_id", "gmask_token_id", "smask_token_id")}
    assert {name: getattr(model.config, name) for name in named} == named
    assert model.config.sop_token_id == tokenizer.sop_token_id
    samples = tokenize_documents(split_corpus(load_corpus(corpus))[1], tokenizer, add_end=False)
    assert all(tokenizer.eos_token_id not in sample["input_ids"] for sample in samples)
    collator = DataCollatorForGLM(tokenizer, max_length=64, gmask_counts=positions == "rope")
    score = perplexity(model, pack_dataset(samples, collator, fixed_prefixes=True), collator)
    assert reported_perplexity(told) == (pytest.approx(score.perplexity, abs=0.006), score.num_tokens)
    filled = succeed("generate", out, "def[MASK](self):", "--max-new-tokens", 2)
    assert filled.startswith("def") and filled.rstrip("\n").endswith("(self):")


def test_the_real_preset_trains_and_length_is_the_presets(models, corpus, tmp_path):
    options = ("--tokenizer", models["tokenizer"], "--max-steps", 1, "--batch-size", 1, "--max-length", 48)
    told = succeed("train", "--preset", "minillm-causal-10m", "--data", corpus, "--out", tmp_path / "out", *options)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.max_position_embeddings == 48 and config.num_hidden_layers == 8
    assert losses(told)[0] == pytest.approx(math.log(320), abs=0.3)


def test_continued_training_starts_where_the_model_stood(models, corpus, tmp_path):
    arguments = ("--data", corpus, "--seed", 3, *SHORT)
    succeed("train", "--model", models["causal"], "--out", tmp_path / "a", *arguments, "--learning-rate", 0)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (models["causal"], tmp_path / "a"))
    assert_same_weights(weights(before), weights(after))
    told = succeed("train", "--model", models["causal"], "--out", tmp_path / "b", *arguments)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert not torch.equal(weights(before)["lm_head.weight"], weights(after)["lm_head.weight"])
    # The warm-up's first step is at a rate of 0, so the first loss is that of the model as it was.
    assert losses(told)[-1] < losses(told)[0]


@pytest.mark.parametrize("variant", ["causal", "prefix"])
@pytest.mark.parametrize("form", ["prompts", "messages"])
def test_answers_only(variant, form, models, tmp_path):
    data = write_answers(tmp_path / "data.jsonl", form)
    out = tmp_path / "out"
    told = succeed(
        "train", "--model", models[variant], "--data", data, "--objective", "sft", "--out", out, *SHORT, *FAST
    )
    tokenizer = AutoTokenizer.from_pretrained(models[variant])
    model = AutoModelForCausalLM.from_pretrained(out)
    # The last 2 of 40 samples are held out; by hand, one at a time.
    nll, count = 0.0, 0
    for number in (38, 39):
        question, answer = f"{number} plus 1 is", f" {number + 1}.\u2028"
        if form == "messages":
            question = f"<|user|>{question}<|assistant|>"
        prompt = tokenizer(question)["input_ids"]
        ids = torch.tensor([prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]])
        mask = {"prefix_mask": (torch.arange(ids.shape[1]) < len(prompt)).long()[None]} if variant == "prefix" else {}
        with torch.no_grad():
            scores = model(ids, **mask).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        nll -= scores[len(prompt) - 1 :].sum().item()
        count += ids.shape[1] - len(prompt)
    assert reported_perplexity(told) == (pytest.approx(math.exp(nll / count), abs=0.006, rel=1e-5), count)
    assert losses(told)[-1] < losses(told)[0]


@pytest.mark.parametrize("variant", ["causal", "prefix"])
def test_lora_writes_an_adapter_that_export_merges(variant, models, corpus, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    options = ("--lora", "--data", corpus, "--out", adapter, "--learning-rate", 0.05, *SHORT)
    told = succeed("train", "--model", models[variant], *options)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(tree(adapter))
    assert "model.safetensors" not in tree(adapter)
    succeed("export", models[variant], merged, "--adapter", adapter)
    base = AutoModelForCausalLM.from_pretrained(models[variant])
    before = weights(base)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(merged)
    assert_same_weights(weights(found), weights(expected))
    changed = {name for name, tensor in weights(found).items() if not torch.equal(tensor, before[name])}
    assert changed and all("_proj" in name for name in changed)
    collator = DataCollatorForPrefixLM if variant == "prefix" else DataCollatorForCausalLM
    score = held_out_score(merged, corpus, collator)
    assert reported_perplexity(told)[0] == pytest.approx(score.perplexity, rel=1e-4)
    assert score.nll < held_out_score(models[variant], corpus, collator).nll
    # `generate` takes the adapter's folder as it is.
    arguments = ("def value(line):", "--max-new-tokens", 8)
    assert succeed("generate", adapter, *arguments) == succeed("generate", merged, *arguments)


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_options_from_a_file_and_flags_that_win(form, models, corpus, tmp_path):
    options = {
        "model": str(models["causal"]),
        "data": str(corpus),
        "out": str(tmp_path / "from-file"),
        "max_steps": 2,
        "batch_size": 4,
        "lora": True,
        "seed": 5,
        "learning_rate": 1e-3,
    }
    text = json.dumps(options)
    if form == "yaml":
        # YAML 1.1 takes a number without a point for a string.
        text = yaml.safe_dump(options).replace("0.001", "1e-3")
        assert yaml.safe_load(text)["learning_rate"] == "1e-3"
    file = tmp_path / f"options.{form}"
    file.write_text(text, "utf-8")
    succeed("train", "--config", file)
    assert (tmp_path / "from-file" / "adapter_config.json").exists()
    told = succeed("train", "--config", file, "--no-lora", "--max-steps", 3, "--out", tmp_path / "flags")
    assert len(losses(told)) == 3
    by_flags = ("--model", models["causal"], "--data", corpus, "--max-steps", 3, "--batch-size", 4, "--seed", 5)
    same = succeed("train", *by_flags, "--learning-rate", 0.001, "--out", tmp_path / "same")
    assert losses(same) == losses(told)
    assert_same_weights(
        *(weights(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("flags", "same"))
    )


LITERAL = "the <|endoftext|> reader<|user|>"


@pytest.mark.parametrize("objective", ["causal", "sft"])
def test_special_tokens_in_the_data_are_text_unless_asked_otherwise(objective, models, tmp_path, monkeypatch):
    """Told by the samples that are packed, by flag and by file."""
    import minillm.cli.training_run as module

    if objective == "causal":
        data = tmp_path / "corpus"
        data.mkdir()
        for number in range(8):
            (data / f"{number}.txt").write_text(LITERAL, "utf-8")
    else:
        data = tmp_path / "data.jsonl"
        turns = [{"role": "user", "content": LITERAL}, {"role": "assistant", "content": LITERAL}]
        records = [{"prompt": LITERAL, "completion": LITERAL}, {"messages": turns}]
        data.write_text("".join(json.dumps(record) + "\n" for record in records * 4), "utf-8")
    samples = []

    def pack(part, *arguments, **options):
        samples.extend(part)
        return pack_dataset(part, *arguments, **options)

    monkeypatch.setattr(module, "pack_dataset", pack)
    tokenizer = AutoTokenizer.from_pretrained(models["causal"])
    arguments = ("train", "--model", models["causal"], "--data", data, "--objective", objective, "--max-steps", 2)
    config = tmp_path / "options.yaml"
    config.write_text("special_tokens: true", "utf-8")
    for number, (flags, split) in enumerate(
        [((), True), (("--special-tokens",), False), (("--config", config), False), (("--no-special-tokens",), True)]
    ):
        samples.clear()
        succeed(*arguments, *flags, "--out", tmp_path / str(number))
        text = tokenizer(LITERAL, split_special_tokens=split)["input_ids"]
        role, answer = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "assistant"))
        end = [tokenizer.eos_token_id]
        expected = {
            "causal": {(tokenizer.bos_token_id, *text, *end)},
            "sft": {tuple(text + text + end), (role, *text, answer, *text, *end)},
        }[objective]
        found = [sample.get("input_ids") or sample["prompt_ids"] + sample["completion_ids"] for sample in samples]
        assert {tuple(ids) for ids in found} == expected
        note = json.loads((tmp_path / f"{number}-checkpoints" / "options.json").read_text("utf-8"))
        assert note["special_tokens"] is not split


class Interruption(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt_at(step, monkeypatch):
    """Every later Trainer of the command is interrupted as by Ctrl-C once it has done so many steps."""
    import minillm.cli.training_run as module

    usual = module.LogitFreeTrainer

    def interrupted(*arguments, callbacks, **keywords):
        return usual(*arguments, callbacks=[*callbacks, Interruption(step)], **keywords)

    monkeypatch.setattr(module, "LogitFreeTrainer", interrupted)


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["whole", "lora"])
def test_an_interrupted_run_goes_on_to_the_same_end(lora, models, corpus, tmp_path, monkeypatch):
    arguments = ("train", "--model", models["prefix"], "--data", corpus, "--max-steps", 20, "--batch-size", 4, *lora)
    whole = succeed(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt_at(10, patch)
        result = invoke(*arguments, "--out", out)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: what was saved stays; the same command goes on from there\n"
    assert not out.exists()
    checkpoints = tmp_path / "broken-checkpoints"
    assert [path for path in tree(checkpoints) if "/" not in path] == ["checkpoint-8", "options.json"]
    # A checkpoint that was cut off while it was written is left aside.
    (checkpoints / "checkpoint-12").mkdir()
    (checkpoints / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    told = succeed(*arguments, "--out", out)
    assert f"going on from {checkpoints / 'checkpoint-8'}" in told
    assert losses(told) == losses(whole)[8:]
    assert reported_perplexity(told) == reported_perplexity(whole)
    loaded = [weights(AutoModelForCausalLM.from_pretrained(folder)) for folder in (tmp_path / "whole", out)]
    assert_same_weights(*loaded)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["none", "cut-off"])
def test_a_run_that_failed_before_its_first_checkpoint_does_not_bind(broken, models, corpus, tmp_path, monkeypatch):
    arguments = ("train", "--model", models["causal"], "--data", corpus, "--out", tmp_path / "out", *SHORT)
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        assert invoke(*arguments, "--seed", 1).exit_code == 130
    checkpoints = tmp_path / "out-checkpoints"
    assert tree(checkpoints) == ["options.json"]
    if broken:
        (checkpoints / "checkpoint-1").mkdir()
        (checkpoints / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    told = succeed(*arguments, "--seed", 2)
    assert len(losses(told)) == 6 and "going on" not in told
    assert json.loads((checkpoints / "options.json").read_text("utf-8"))["seed"] == 2


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["whole", "lora"])
def test_a_run_of_one_step_trains(lora, models, corpus, tmp_path):
    out = tmp_path / "out"
    options = ("--max-steps", 1, "--batch-size", 4, "--seed", 1, *lora)
    succeed("train", "--model", models["causal"], "--data", corpus, "--out", out, *options)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (models["causal"], out))
    if lora:
        # A fresh adapter's second matrices are zero.
        second = [tensor for name, tensor in weights(after).items() if "lora_B" in name]
        assert second and all(tensor.abs().max() > 0 for tensor in second)
    else:
        changed = {name for name, tensor in weights(after).items() if not torch.equal(tensor, weights(before)[name])}
        assert changed == set(weights(before))


def test_checkpoints_of_other_options_are_not_taken(models, corpus, tmp_path, monkeypatch):
    arguments = ("train", "--model", models["causal"], "--data", corpus, "--out", tmp_path / "out", *SHORT)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        assert invoke(*arguments).exit_code == 130
    before = tree(tmp_path)
    told = fail(*arguments, "--seed", 1)
    assert "was begun with other options (seed was 0 and is 1)" in told
    told = fail(*arguments, "--special-tokens", "--set", "use_cache=false")
    assert "(settings was {} and is {'use_cache': False}; special_tokens was False and is True)" in told
    assert tree(tmp_path) == before
    foreign = tmp_path / "other-checkpoints"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine", "utf-8")
    assert "is not empty" in fail(*arguments[:-6], "--out", tmp_path / "other", *SHORT)
    assert tree(foreign) == ["mine.txt"]


# Of memory, one pass before the first step.
STEPS_AND_PROBE = 7


@pytest.fixture
def logits_in_training(monkeypatch):
    """Whether logits were returned, of each forward in training from now on."""
    returned, forward = [], MiniLLMForCausalLM.forward

    @functools.wraps(forward)
    def watched(self, *arguments, **keywords):
        outputs = forward(self, *arguments, **keywords)
        if self.training:
            returned.append(outputs.logits is not None)
        return outputs

    monkeypatch.setattr(MiniLLMForCausalLM, "forward", watched)
    return returned


@pytest.mark.mostly_thorough("prefix", "lora")
@pytest.mark.parametrize(
    ("variant", "options"),
    [("causal", ()), ("prefix", ()), ("prefix", ("--lora",)), ("prefix", ("--objective", "glm"))],
    ids=["causal", "prefix", "lora", "glm"],
)
def test_steps_hold_no_logits_and_the_config_says_nothing(
    variant, options, models, corpus, tmp_path, logits_in_training
):
    out = tmp_path / "out"
    told = succeed("train", "--model", models[variant], "--data", corpus, "--out", out, *options, *SHORT)
    assert len(losses(told)) == 6 and logits_in_training == [False] * STEPS_AND_PROBE
    model = AutoModelForCausalLM.from_pretrained(out).train()
    assert model.config.skip_logits is False
    saved = [json.loads(path.read_text("utf-8")) for path in tmp_path.rglob("config.json")]
    assert not [config for config in saved if config["skip_logits"]]
    assert bool(saved) != ("--lora" in options)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(ids, labels=ids, prefix_mask=ids * 0 if variant == "prefix" else None).logits is not None


def test_a_head_that_needs_logits_is_told_of(models, corpus, tmp_path, monkeypatch, logits_in_training):
    import minillm.cli.training_run as module

    built = module.build_model

    def hooked(*arguments):
        model = built(*arguments)
        model.lm_head.register_forward_hook(lambda *call: None)
        return model

    monkeypatch.setattr(module, "build_model", hooked)
    told = succeed("train", "--model", models["causal"], "--data", corpus, "--out", tmp_path / "out", *SHORT)
    assert told.count("each step holds all logits, which takes memory: the head has hooks") == 1
    assert len(losses(told)) == 6 and logits_in_training == [True] * STEPS_AND_PROBE


def test_evaluation_in_between_has_logits(models, tmp_path, logits_in_training):
    model = AutoModelForCausalLM.from_pretrained(models["causal"])
    rows = [{"input_ids": list(range(5, 25)), "labels": list(range(5, 25))}] * 4
    shapes = []
    LogitFreeTrainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda prediction: shapes.append(prediction.predictions.shape) or {},
    ).train()
    assert shapes == [(4, 20, 320)] * 2 and logits_in_training == [False] * 2
