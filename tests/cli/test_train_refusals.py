"""What `minillm train` refuses, before anything is written."""

import re

import pytest
from cli_cases import fail, save_small_model, small_tokenizer, succeed, tree, write_answers, write_corpus
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_small_model(root / name, name) for name in ("causal", "prefix", "bidirectional")}
    small_tokenizer().save_pretrained(root / "tokenizer")
    return folders | {"tokenizer": root / "tokenizer"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", files=12)


def contradictory(models):
    model, prefix = ("--model", models["causal"]), ("--model", models["prefix"])
    return {
        "preset-and-model": ([*model, "--preset", "gpt2"], "exactly one of --preset"),
        "neither": ([], "exactly one of --preset"),
        "no-tokenizer": (["--preset", "gpt2"], "--preset needs --tokenizer"),
        "lora-from-scratch": (["--preset", "gpt2", "--tokenizer", models["tokenizer"], "--lora"], "give --model"),
        "prefix-on-causal": ([*model, "--objective", "prefix"], "attention_type='prefix'; this one is 'causal'"),
        "glm-on-causal": ([*model, "--objective", "glm"], "attention_type='prefix'; this one is 'causal'"),
        "causal-on-prefix": ([*prefix, "--objective", "causal"], "attention_type='causal'; this one is 'prefix'"),
        "bidirectional": (["--model", models["bidirectional"]], "a bidirectional model sees"),
        "unknown-preset": (["--preset", "gtp2", "--tokenizer", models["tokenizer"]], "unknown preset 'gtp2'"),
        "no-model": (["--model", "nowhere"], "nowhere is no folder here"),
        "no-tokenizer-there": ([*model, "--tokenizer", "nowhere"], "nowhere is no folder here"),
    }


CONTRADICTIONS = (
    "preset-and-model neither no-tokenizer lora-from-scratch prefix-on-causal causal-on-prefix bidirectional "
    "unknown-preset no-model no-tokenizer-there"
).split()


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictory_options_are_refused_before_anything_is_written(case, models, corpus, tmp_path):
    arguments, words = contradictory(models)[case]
    assert words in fail("train", "--data", corpus, "--out", tmp_path / "out", *arguments)
    assert tree(tmp_path) == []


def test_out_and_data_are_needed(models, corpus, tmp_path):
    assert "--out is missing" in fail("train", "--model", models["causal"], "--data", corpus)
    assert "--data is missing" in fail("train", "--model", models["causal"], "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_stepps: 3", "unknown options ['max_stepps']"),
        ("max_steps: ten", "the option max_steps is 'ten'"),
        ("max_steps: 0", "the option max_steps is 0: "),
        ("max_steps: true", "the option max_steps is True; it must be one value"),
        ("batch_size: 2.5", "the option batch_size is 2.5"),
        ("learning_rate: fast", "the option learning_rate is 'fast'"),
        ("learning_rate: .nan", "the option learning_rate is nan"),
        ("learning_rate: -1", "the option learning_rate is -1"),
        ("lora: 'no'", "the option lora is 'no'; it must be true or false"),
        ("objective: bert", "'bert' is not one of 'causal', 'prefix', 'glm', 'sft'"),
        ("model: [a]", "the option model is ['a']; it must be one value"),
        ("- a", "must hold a mapping of options"),
        ("", "must hold a mapping of options"),
        ("a: b: c", "is neither YAML nor JSON"),
    ],
)
def test_a_wrong_file_of_options_is_refused(text, words, models, corpus, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(text, "utf-8")
    # A flag would win over the file's own value.
    model = [] if text.startswith("model") else ["--model", models["causal"]]
    told = fail("train", "--config", file, "--data", corpus, "--out", tmp_path / "out", *model)
    assert words in told and tree(tmp_path) == ["options.yaml"]


def test_a_missing_or_binary_file_of_options_is_named(models, tmp_path):
    assert "nowhere.yaml" in fail("train", "--config", tmp_path / "nowhere.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    assert "binary is neither YAML nor JSON" in fail("train", "--config", tmp_path / "binary")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3 is no JSON"),
        ("7", "line 3 holds 7; needed: an object with named fields"),
        (
            '{"question": "a"}',
            "line 3 has the keys ['question']; needed: text; or prompt and completion; or instruction",
        ),
        ('{"prompt": "a", "completion": 3}', "line 3: completion must be a string, not 3"),
        ('{"messages": "a"}', "line 3 holds no messages that can be read"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "unknown role 'wizard'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 3: no message of the assistant"),
    ],
    ids=["no-json", "number", "wrong-keys", "wrong-type", "no-messages", "unknown-role", "no-answer"],
)
def test_a_bad_line_of_answers_is_named(line, words, models, tmp_path):
    data = write_answers(tmp_path / "data.jsonl", "prompts", 1)
    data.write_text(data.read_text("utf-8") + "\n" + line + "\n", "utf-8")
    told = fail("train", "--model", models["causal"], "--objective", "sft", "--data", data, "--out", tmp_path / "out")
    assert words in told and tree(tmp_path) == ["data.jsonl"]


def test_data_that_cannot_be_used_is_named(models, tmp_path):
    def refused(data, *arguments):
        told = fail("train", "--model", models["causal"], "--data", data, "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out-checkpoints").exists()
        return told

    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    assert "nowhere does not exist" in refused(tmp_path / "nowhere", "--objective", "sft")
    (tmp_path / "folder").mkdir()
    assert "holds no text" in refused(tmp_path / "folder")
    assert "folder holds no text" in refused(tmp_path / "folder", "--objective", "sft")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    assert "binary is not UTF-8 text" in refused(tmp_path / "binary", "--objective", "sft")
    (tmp_path / "short.txt").write_text("a few words", "utf-8")
    assert "cannot be split into training and held-out text" in refused(tmp_path / "short.txt")
    one = write_answers(tmp_path / "one.jsonl", "prompts", 1)
    assert "holds 1 samples; at least 2" in refused(one, "--objective", "sft")


def test_models_that_cannot_be_trained_are_named(models, corpus, tmp_path):
    out = tmp_path / "out"
    config = LlamaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    small_tokenizer().save_pretrained(tmp_path / "llama")
    told = fail("train", "--model", tmp_path / "llama", "--data", corpus, "--out", out)
    assert "holds a 'llama' model; only MiniLLM's are trained" in told
    small_tokenizer(400).save_pretrained(tmp_path / "large")
    told = fail(
        "train", "--model", models["causal"], "--tokenizer", tmp_path / "large", "--data", corpus, "--out", out
    )
    assert re.search(r"the tokenizer has \d+ tokens, the model only 320", told)
    succeed(
        "train",
        "--model",
        models["causal"],
        "--data",
        corpus,
        "--out",
        tmp_path / "adapter",
        "--lora",
        "--max-steps",
        1,
    )
    told = fail("train", "--model", tmp_path / "adapter", "--data", corpus, "--out", out)
    assert "is an adapter: merge it with `minillm export" in told
    assert not out.exists()


@pytest.mark.parametrize(("scheme", "rows"), [("learned", 64), ("glm_2d", 65)])
def test_rows_longer_than_a_table_of_positions_are_refused_before_any_work(scheme, rows, corpus, tmp_path):
    model = save_small_model(tmp_path / "model", position_embedding_type=scheme)
    out = tmp_path / "out"
    # The data are not even read.
    arguments = ("train", "--model", model, "--out", out, "--data", tmp_path / "nowhere", "--max-length")
    told = fail(*arguments, rows + 1)
    assert f"max_length is {rows + 1}, but the model has a table of {rows} learned positions" in told
    assert "nowhere does not exist" in fail(*arguments, rows)
    assert not out.exists() and not (tmp_path / "out-checkpoints").exists()
    options = ("--max-steps", 1, "--batch-size", 1, "--max-length")
    succeed("train", "--model", model, "--out", out, "--data", corpus, *options, rows)
    # Schemes without a table take any length.
    other = save_small_model(tmp_path / "other", position_embedding_type="alibi")
    succeed("train", "--model", other, "--out", tmp_path / "long", "--data", corpus, *options, rows + 1)
