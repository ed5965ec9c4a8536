"""`minillm train` on data of every kind: what it learns from them, what it says, and what it refuses."""

import csv
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_cases import TEMPLATES_OF_TRL, TWO_TURNS, chat_tokenizer, shown
from cli_cases import fail, python_source, save_small_model, small_tokenizer, succeed, tree
from transformers import AutoTokenizer, GenerationConfig

from minillm.cli.training_data import infer_objective, read_samples
from minillm.data import TextDocument, chat_template, split_corpus, tokenize_documents

TEXTS = [python_source(number, functions=1) for number in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("models") / "causal")


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr("minillm.cli.training_data.say", lines.append)
    return lines


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def options(data, **others):
    return SimpleNamespace(**{"data": data, "special_tokens": False, "model": None} | others)


def write_texts(tmp_path, kind):
    """The same texts in a file of some kind, and the name of each."""
    path = tmp_path / f"data.{kind}"
    records = [{"content": text, "text": text, "id": number} for number, text in enumerate(TEXTS)]
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in records).encode()))
    elif kind == "json":
        path.write_text(json.dumps(records), "utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("objective", ["causal", "prefix", "glm"])
@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "csv"])
def test_texts_in_records_are_learned_as_texts(kind, objective, tmp_path, told):
    path = write_texts(tmp_path, kind)
    tokenizer = small_tokenizer()
    train, held_out = read_samples(options(path), objective, tokenizer)
    found = sorted(sample["input_ids"] for part in (train, held_out) for sample in part)
    assert found == sorted(sample["input_ids"] for sample in tokenize_documents(TEXTS, tokenizer, objective != "glm"))
    if kind != "csv":
        documents = [TextDocument(f"{path.name}#{number}", text) for number, text in enumerate(TEXTS, 1)]
        for part, expected in zip((train, held_out), split_corpus(documents), strict=True):
            assert list(part) == tokenize_documents(expected, tokenizer, objective != "glm")
    assert told == [] and 1 <= len(held_out) < 10


def test_columns_and_encoding(tmp_path, told):
    lines = ["问题,回答"] + [f"{n} 加 1 等于,{n + 1}" for n in range(40)]
    (tmp_path / "a.csv").write_bytes("\n".join(lines).encode("gbk"))
    tokenizer = small_tokenizer()
    given = options(tmp_path / "a.csv", columns="prompt=问题,completion=回答", encoding="gbk")
    train, held_out = read_samples(given, "sft", tokenizer)
    assert len(train) == 38 and len(held_out) == 2
    assert [tokenizer.decode(sample["prompt_ids"]) for sample in held_out] == ["38 加 1 等于", "39 加 1 等于"]
    assert [tokenizer.decode(sample["completion_ids"]) for sample in train][:2] == ["1<|endoftext|>", "2<|endoftext|>"]
    assert told == ["data: 40 prompts with completions; the answers alone are learned"]


def test_a_conversation_is_held_out_with_all_its_rows(tmp_path, told):
    other = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    data = write(tmp_path / "a.jsonl", [{"messages": other}] * 39 + [{"messages": TWO_TURNS}])
    tokenizer = chat_tokenizer()
    train, held_out = read_samples(options(data, training_template=Path("baichuan2")), "sft", tokenizer)
    assert len(train) == 38 and [shown(tokenizer, sample) for sample in held_out] == [
        "<reserved_106>Hi<reserved_107>[[Ho</s>]]",
        "<reserved_106>Where is Peking?<reserved_107>[[In China.</s>]]",
        "<reserved_106>Where is Peking?<reserved_107>In China.<reserved_106>And Rome?<reserved_107>"
        "[[In Italy, of course.</s>]]",
    ]
    assert told == [
        "data: 40 conversations; the answers alone are learned",
        "39 conversations: one rendering by the chat template baichuan2, in which starts and ends of answers are "
        "verified (whole)",
        "1 conversation: a row for each answer, the start of which is verified, by the chat template baichuan2 (rows)",
        "the tokenizer had no chat template; it gets baichuan2, by which the model is to be asked",
    ]
    assert tokenizer.chat_template == chat_template("baichuan2")


@pytest.mark.parametrize("theirs", ["qwen3_training", "llama3"])
def test_a_template_that_asks_otherwise_is_told_of(theirs, tmp_path, told):
    tokenizer = chat_tokenizer((TEMPLATES_OF_TRL / "qwen3.jinja").read_text("utf-8"))
    before = tokenizer.chat_template
    data = write(tmp_path / "a.jsonl", [{"messages": TWO_TURNS}] * 2)
    read_samples(options(data, training_template=TEMPLATES_OF_TRL / f"{theirs}.jinja"), "sft", tokenizer)
    said = [line for line in told if "keeps its chat template" in line]
    # A variant for training differs in how it marks answers alone.
    assert len(said) == (theirs == "llama3") and tokenizer.chat_template == before


def test_the_ends_of_turns_are_those_of_the_generation_config(tmp_path, told):
    tokenizer = chat_tokenizer(chat_template("glm-4"))
    data = write(tmp_path / "a.jsonl", [{"messages": TWO_TURNS}] * 2)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|user|>", "<|observation|>"])
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path / "glm")
    GenerationConfig(eos_token_id=ends[0]).save_pretrained(tmp_path / "other")
    train, _ = read_samples(options(data, model=str(tmp_path / "glm")), "sft", tokenizer)
    assert shown(tokenizer, train[0]).count("<|user|>]]") == 2
    train, _ = read_samples(options(data, model=str(tmp_path / "other")), "sft", tokenizer)
    assert shown(tokenizer, train[0]).endswith("In China.</s>]]")
    # A folder without one, and nothing at all: the tokenizer's.
    for model in (str(tmp_path), None):
        assert list(read_samples(options(data, model=model), "sft", tokenizer)[0]) == list(train)


def test_answers_as_whole_texts_only_when_asked(tmp_path, told):
    tokenizer = small_tokenizer()
    records = {
        "messages": {"messages": TWO_TURNS},
        "prompt": {"prompt": "1 + 1 =", "completion": " 2"},
        "alpaca": {"instruction": "Say a.", "output": "a"},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    }
    for form, record in records.items():
        data = write(tmp_path / "a.jsonl", [record] * 3)
        assert infer_objective(options(data)) == "sft" and infer_objective(options(data, format=form)) is None
        with pytest.raises(
            ValueError, match=f"line 1: the data are .*; learn the answers with --objective sft.*{form}"
        ):
            read_samples(options(data), "causal", tokenizer)
        train, held_out = read_samples(options(data, format=form), "causal", tokenizer)
        assert len(train) + len(held_out) == 3 and list(train[0]) == ["input_ids"]
        assert told[-1].startswith("data: 3 ") or "generation" in told[-1] or told[-2].startswith("data: 3 ")
    assert tokenizer.decode(train[0]["input_ids"]) == "<|user|>Hi<|assistant|>Ho<|endoftext|>"
    texts = write(tmp_path / "t.jsonl", [{"text": "a"}] * 2)
    assert infer_objective(options(texts)) is None
    with pytest.raises(ValueError, match=r"t.jsonl line 1 holds a text; --objective sft learns answers"):
        read_samples(options(texts), "sft", tokenizer)


def test_a_model_is_trained_on_texts_in_records(model, tmp_path):
    out = tmp_path / "out"
    data = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    arguments = ("--max-steps", 4, "--batch-size", 4)
    told = succeed("train", "--model", model, "--data", data, "--out", out, *arguments)
    assert "objective causal" in told and "held-out perplexity" in told and (out / "config.json").exists()


def test_a_model_is_trained_on_alpaca(model, tmp_path):
    records = [{"instruction": f"Add 1 to {n}.", "input": "", "output": f"{n + 1}"} for n in range(20)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records), "utf-8")
    arguments = ("--objective", "sft", "--max-steps", 2, "--batch-size", 4)
    told = succeed(
        "train", "--model", model, "--data", tmp_path / "alpaca.json", "--out", tmp_path / "out", *arguments
    )
    assert "data: 20 conversations; the answers alone are learned" in told
    assert "20 conversations: the chat template of the tokenizer marks answers itself (generation)" in told
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_bad_data_are_one_line_before_any_work(model, tmp_path):
    def refused(*arguments):
        line = fail("train", "--model", model, "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out-checkpoints").exists()
        return line

    bad = write(tmp_path / "bad.jsonl", [{"text": "a"}, {"txt": "b"}])
    assert "bad.jsonl line 2 has the keys ['txt']; needed: text; or prompt and completion" in refused("--data", bad)
    answers = write(tmp_path / "answers.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    assert "learn the answers with --objective sft" in refused("--data", answers, "--objective", "causal")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:100])
    assert "cut.jsonl.gz is damaged" in refused("--data", tmp_path / "cut.jsonl.gz")
    assert "no data set that `datasets` can load" in refused("--data", "no/where")
    (tmp_path / "x.txt").write_text("x" * 100, "utf-8")
    assert "one text file of more than 8192 characters" in refused("--data", tmp_path / "x.txt")
    write(tmp_path / "empty.jsonl", [{"text": " "}])
    assert "holds no text but empty ones" in refused("--data", tmp_path / "empty.jsonl")


def test_tokenizers_are_trained_on_records_too(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text, "utf-8")
    for name, data in (("one", "a.jsonl"), ("two", "texts")):
        succeed("tokenizer", "train", tmp_path / data, "--out", tmp_path / name, "--vocab-size", 300)
    one, two = ((tmp_path / name / "tokenizer.json").read_text("utf-8") for name in ("one", "two"))
    assert one == two
    assert {"one", "two"} <= set(tree(tmp_path))
    write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    told = fail("tokenizer", "train", tmp_path / "b.jsonl", "--out", tmp_path / "three", "--vocab-size", 300)
    assert "b.jsonl line 1 holds no text but a prompt" in told
