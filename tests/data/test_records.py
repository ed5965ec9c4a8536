"""What the keys of records mean, and which records are refused."""

import json

import pytest
from transformers.utils import logging

from minillm.data import (
    FORMATS,
    Conversation,
    CorpusError,
    PromptWithCompletion,
    Text,
    TextDocument,
    load_corpus,
    parse_columns,
    read_examples,
)


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def read(path, *records, **options):
    return [example.content for example in read_examples(write(path, *records), **options)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.jsonl"


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_text_and_prompts(path):
    records = {"text": "a\n"}, {"prompt": "1 + 1 =", "completion": " 2", "id": 7}
    assert read(path, *records) == [Text("a\n"), PromptWithCompletion("1 + 1 =", " 2")]
    # A field that is null, as Arrow fills up records of unlike kinds, is none.
    records = {"text": "a", "prompt": None, "completion": None}, {"text": None, "prompt": "b", "completion": ""}
    assert read(path, *records) == [Text("a"), PromptWithCompletion("b", "")]


def test_alpaca(path):
    plain = {"instruction": "Name a color.", "input": "", "output": "Red."}
    with_input = {
        "instruction": "Sort.",
        "input": "b, a",
        "output": "a, b",
        "system": "Be brief.",
        "history": [["Hi", "Ho"]],
    }
    first, second = read(
        path,
        plain,
        with_input,
    )
    asked = {"role": "user", "content": "Name a color.", "instruction": "Name a color.", "input": ""}
    assert first == Conversation([asked, *said(("assistant", "Red."))], None, "alpaca")
    asked = {"role": "user", "content": "Sort.\nb, a", "instruction": "Sort.", "input": "b, a"}
    before = said(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"))
    assert second.messages == [*before, asked, *said(("assistant", "a, b"))]


def test_sharegpt(path):
    turns = [("human", "Where?"), ("gpt", "Here."), ("user", "And?"), ("assistant", "There.")]
    record = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], "system": "Be brief."}
    (found,) = read(path, record)
    expected = said(
        ("system", "Be brief."), ("user", "Where?"), ("assistant", "Here."), ("user", "And?"), ("assistant", "There.")
    )
    assert found == Conversation(expected, None, "sharegpt")
    assert read(
        path, {"conversations": [{"from": "gpt", "value": "Late."}, *record["conversations"]], "system": "Be brief."}
    ) == [found._replace(begins_late=True)]
    call = {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "Rome"}}'}
    record = {"conversations": [{"from": "human", "value": "Time?"}, call, {"from": "observation", "value": "ten"}]}
    (found,) = read(path, record | {"tools": '[{"name": "clock"}]'})
    assert found.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Rome"}}}
    ]
    assert found.messages[2] == {"role": "tool", "content": "ten"} and found.tools == [{"name": "clock"}]


def test_messages(path):
    messages = said(("user", "Where?"), ("assistant", "Here."))
    call = [{"type": "function", "function": {"name": "clock", "arguments": '{"zone": "Rome"}'}}]
    record = {"messages": [*messages, {"role": "assistant", "content": None, "tool_calls": call}], "tools": None}
    plain, with_call = read(path, {"messages": messages, "id": "x"}, record)
    assert plain == Conversation(messages)
    # Templates write arguments out as JSON themselves, and null fields are Arrow's.
    (function,) = [call["function"] for call in with_call.messages[-1]["tool_calls"]]
    assert function == {"name": "clock", "arguments": {"zone": "Rome"}} and "content" not in with_call.messages[-1]


def test_messages_in_a_cell(tmp_path):
    messages = said(("user", 'Say "a, b"'), ("assistant", "a, b"))
    cell = json.dumps(messages).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{cell}"\n', "utf-8")
    assert [example.content for example in read_examples(tmp_path / "a.csv")] == [Conversation(messages)]


def test_token_ids(path):
    (found,) = read(path, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "other": "x"})
    assert {name: values.tolist() for name, values in found.sample.items()} == {
        "input_ids": [5, 6, 7],
        "labels": [-100, 6, 7],
    }
    (found,) = read(path, {"input_ids": [5, 6, 7], "prompt_length": 1})
    assert found.sample["prompt_length"] == 1


def test_other_columns(path):
    record = {"question": "1 + 1 =", "answer": "2", "text": "noise", "prompt": "noise"}
    columns = parse_columns("prompt=question, completion=answer")
    assert columns == {"prompt": "question", "completion": "answer"}
    assert read(path, record, columns=columns) == [PromptWithCompletion("1 + 1 =", "2")]
    assert read(path, record, columns={"text": "question"}) == [Text("1 + 1 =")]
    assert (
        read(path, {"input": "Say a.", "target": "a"}, columns={"instruction": "input", "output": "target"})[
            0
        ].messages[0]["content"]
        == "Say a."
    )


def test_keys_that_fit_two_readings(path):
    record = {"instruction": "Say a.", "input": "", "output": "a", "text": "Below is an instruction ..."}
    with pytest.raises(CorpusError, match=r"data.jsonl line 1 fits several formats \(text, alpaca\).*--format"):
        read(path, record)
    assert read(path, record, format="text") == [Text("Below is an instruction ...")]
    assert read(path, record, format="alpaca")[0].messages[-1]["content"] == "a"


MESSAGES = {"messages": said(("user", "a"), ("assistant", "b"))}
REFUSED = {
    "keys": ({"question": "a"}, {}, r"line 2 has the keys \['question'\]; needed: text; or prompt and completion; or"),
    "null": ({"text": None}, {}, r"line 2 has the keys \[\] \(and null in \['text'\]\)"),
    "half": ({"prompt": "a"}, {}, r"line 2 has the keys \['prompt'\]"),
    "type": ({"prompt": "a", "completion": 3}, {}, "line 2: completion must be a string, not 3"),
    "surrogate": ({"text": "a\ud800"}, {}, "line 2: text holds half of a surrogate pair at character 1"),
    "format": ({"text": "a"}, {"format": "messages"}, r"line 2 has the keys \['text'\]; needed: messages"),
    "column": ({"text": "a"}, {"columns": {"text": "content"}}, r"has no columns \['content'\]; it has \['text'\]"),
    "messages": ({"messages": "a"}, {}, "line 2 holds no messages that can be read: 'a'"),
    "message": ({"messages": ["a"]}, {}, "line 2 holds no messages that can be read: message 1 is 'a'"),
    "no-messages": ({"messages": []}, {}, "line 2 holds no messages that can be read: there are none"),
    "role": ({"messages": [{"content": "a"}]}, {}, "message 1 is {'content': 'a'}"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
        {},
        "line 2: the arguments of a call in message 1 are no JSON",
    ),
    "tools": ({**MESSAGES, "tools": [3]}, {}, r"line 2: tools must be JSON schemas, not \[3\]"),
    "speaker": (
        {"conversations": [{"from": "pope", "value": "a"}]},
        {},
        "turn 1 of conversations is from 'pope'; known: hum",
    ),
    "value": ({"conversations": [{"from": "human"}]}, {}, "the value of turn 1 must be a string, not None"),
    "call": ({"conversations": [{"from": "function_call", "value": "a"}]}, {}, "must be JSON with name and arguments"),
    "history": ({"instruction": "a", "output": "b", "history": ["c"]}, {}, "history must be a list of pairs"),
    "ids": ({"input_ids": [1.5]}, {}, "line 2: `input_ids` must be a flat list of integers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_record_that_cannot_be_used_is_named(case, path):
    record, options, words = REFUSED[case]
    first = (
        {"messages": MESSAGES["messages"]} if options.get("format") == "messages" else {"text": "a", "content": "a"}
    )
    with pytest.raises(CorpusError, match=words) as refused:
        path.write_text(json.dumps(first) + "\n" + json.dumps(record) + "\n", "utf-8")
        list(read_examples(path, **options))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "parquet"}, "the format 'parquet' is unknown: choose one of text, prompt, alpaca"),
        ({"columns": {"question": "a"}}, r"columns name the fields \['question'\], which no format has"),
        ({"columns": {"prompt": "a", "text": "b"}}, r"no format has all of the fields \['prompt', 'text'\]"),
        ({"columns": {"prompt": "a"}, "format": "text"}, r"the format text has no fields \['prompt'\]"),
    ],
)
def test_options_that_make_no_sense(options, words, path):
    with pytest.raises(CorpusError, match=words):
        read(path, {"text": "a"}, **options)


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=a", "prompt=a,prompt=b", "prompt=a,"])
def test_columns_are_pairs(text):
    with pytest.raises(CorpusError, match="needed: FIELD=COLUMN,FIELD=COLUMN"):
        parse_columns(text)


def test_no_key_belongs_to_two_formats_that_need_it():
    needed = [name for one in FORMATS.values() for name in one.needed]
    assert len(needed) == len(set(needed)) and parse_columns(None) == {}


def test_a_corpus_of_records(path, caplog):
    write(path, {"text": "one"}, {"text": " \n"}, {"text": "zwei\u2028 二"})
    logging.enable_propagation()
    try:
        found = load_corpus(path)
    finally:
        logging.disable_propagation()
    assert found == [TextDocument("data.jsonl#1", "one"), TextDocument("data.jsonl#3", "zwei\u2028 二")]
    assert "1 texts are empty and are left out, the first at" in caplog.text and "data.jsonl line 2" in caplog.text
    write(path, {"content": "one"}, {"content": "two"})
    assert load_corpus(path.parent, columns={"text": "content"}) == [
        TextDocument("data.jsonl#1", "one"),
        TextDocument("data.jsonl#2", "two"),
    ]
    write(path, {"prompt": "a", "completion": "b"})
    with pytest.raises(CorpusError, match=r"data.jsonl line 1 holds no text but a prompt.*text=COLUMN"):
        load_corpus(path)
    write(path, {"text": ""})
    with pytest.raises(CorpusError, match=r"data.jsonl holds nothing but white space"):
        load_corpus(path)


@pytest.mark.parametrize(
    "text", ["x" * 70_889, "some words and " * 4_726, "一个没有换行的文件。" * 7_089], ids=["x", "words", "zh"]
)
def test_a_file_without_line_breaks_is_cut_too(text, tmp_path):
    (tmp_path / "book.txt").write_text(text, "utf-8")
    parts = [document.text for document in load_corpus(tmp_path / "book.txt")]
    assert "".join(parts) == text and len(parts) >= 4
    assert all(8192 <= len(part) <= 2 * 8192 for part in parts[:-1]) and len(parts[-1]) <= 2 * 8192
    if " " in text or "。" in text:
        assert all(part[-1] in " 。" for part in parts)


def test_lines_that_are_not_too_long_stay_whole(tmp_path):
    text = ("y" * 16_000 + "\n") * 5
    (tmp_path / "book.txt").write_text(text, "utf-8")
    assert [document.text for document in load_corpus(tmp_path / "book.txt")] == ["y" * 16_000 + "\n"] * 5
