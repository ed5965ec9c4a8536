"""Random records through every kind of file, and random conversations through every way of telling answers."""

import csv
import gzip
import json
import tempfile
from functools import cache
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from chat_cases import TEMPLATES_OF_TRL, chat_tokenizer, end_ids
from hypothesis import assume
from hypothesis import strategies as st
from random_cases import random_test

from minillm.data import ChatEncoder, ConversationError, chat_template, load_corpus, read_records
from minillm.tokenization.tokenization_minillm import CHAT_TEMPLATE

PIECES = [
    "\n",
    "\r\n",
    "\r",
    '"',
    '""',
    ",",
    "\t",
    "\\",
    "\u2028",
    "\x85",
    "\ufeff",
    " ",
    "中文",
    "[INST]",
    "NA",
    "007",
]
PIECES += [
    "<|im_end|>",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<|user|>",
    "<|assistant|>",
    "</",
    "s>",
    "<think>",
    "In China.",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)).map("".join)
# A zero byte is refused as binary, and JSON lines escape it.
PLAIN = TEXTS.map(lambda text: text.replace("\0", ""))


@random_test(quick=25, full=3000, rows=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=5))
def test_records_come_back_from_any_file(rows):
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
        (folder / "a.jsonl").write_bytes(lines.encode())
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (folder / "c.json").write_bytes(json.dumps(records, ensure_ascii=False).encode())
        with (folder / "d.csv").open("w", encoding="utf-8", newline="") as file:
            # A bare line feed in quotes is one of the text; a row of one empty cell would be an empty line.
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([["prompt", "completion"], *rows])
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), folder / "e.parquet")
        for path in sorted(folder.iterdir()):
            assert [dict(record.fields) for record in read_records(path)] == records, path.name


@random_test(quick=25, full=3000, text=PLAIN, repeats=st.integers(1, 3000))
def test_the_parts_of_a_text_are_the_text(text, repeats):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes((text * repeats).encode())
        expected = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        assume(expected.strip() and path.read_bytes().strip())
        parts = [document.text for document in load_corpus(path)]
        assert "".join(parts) == expected and all(len(part) >= 8192 for part in parts[:-1])


@cache
def encoders():
    templates = {name: chat_template(name) for name in ("chatml", "llama-2", "llama-3", "vicuna", "chatglm2", "glm-4")}
    templates |= {
        name: (TEMPLATES_OF_TRL / f"{name}.jinja").read_text("utf-8") for name in ("qwen3", "gemma_training")
    }
    found = {}
    for name, template in (templates | {"ours": CHAT_TEMPLATE}).items():
        tokenizer = chat_tokenizer(template)
        found[name] = ChatEncoder(tokenizer, end_token_ids=end_ids(tokenizer), apart=name == "chatglm2")
    return found


@random_test(
    quick=60,
    full=6000,
    name=st.sampled_from("chatml llama-2 llama-3 vicuna chatglm2 glm-4 qwen3 gemma_training ours".split()),
    turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
)
def test_what_is_scored_is_what_the_assistant_says(name, turns):
    chat = encoders()[name]
    if name == "glm-4":
        # It passes over messages without a content.
        turns = [(asked or "?", said or "!") for asked, said in turns]
    pairs = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in turns]
    messages = [message for pair in pairs for message in pair]
    try:
        samples = chat(messages)
    except ConversationError as error:
        # Blanks beside a border; an empty answer, of which some templates write nothing; thoughts that are taken out.
        assert any(words in str(error) for words in ("stands across", "writes nothing", "leaves out")), error
        assert "<think>" in str(messages) or any(said != said.strip() or not said.strip() for _, said in turns), error
        return
    answers = []
    for sample in samples:
        start = 0
        for is_scored, group in groupby(sample["assistant_masks"]):
            stop = start + len(list(group))
            if is_scored:
                ids = sample["input_ids"][start:stop]
                # The one that ends it, and nothing else that a message could have forged.
                assert any(token in chat.ends for token in ids)
                assert sum(token in chat.special for token in ids) <= 1 + ids.count(chat.usual_end)
                answers.append(chat.tokenizer.decode(ids))
            start = stop
    assert len(answers) == len(turns)
    for answer, (_, said) in zip(answers, turns, strict=True):
        assert said.strip() in answer or "<think>" in said
    # What the messages hold is text: control tokens are as many as in a conversation of plain words.
    plain = [{**message, "content": "word"} for message in messages]
    counts = [
        sum(token in chat.special for sample in made for token in sample["input_ids"])
        for made in (samples, chat(plain))
    ]
    assert counts[0] == counts[1]
