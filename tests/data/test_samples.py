"""Examples as samples of token ids, and samples that take little memory."""

import json

import numpy as np
import pytest
from chat_cases import TWO_TURNS, chat_tokenizer, shown
from cli_cases import small_tokenizer
from tokenizers import processors

from minillm.data import (
    ChatEncoder,
    CorpusError,
    ExampleEncoder,
    Samples,
    chat_template,
    read_examples,
    tokenize_documents,
)
from minillm.data.samples import BATCH_TEXTS
from minillm.training import DataCollatorForCausalLM, DataCollatorForSFT, pack_dataset


def examples(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return read_examples(path)


def encode(encoder, found):
    return [sample for _, samples in encoder.encode(found) for sample in samples]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("add_end", [False, True])
def test_texts_are_those_of_documents(add_end, special, tmp_path):
    texts = [f"Where is number {n}?</s>" for n in range(2 * BATCH_TEXTS + 1)]
    tokenizer = chat_tokenizer()
    encoder = ExampleEncoder(tokenizer, False, add_end=add_end, special_tokens_in_text=special)
    found = encode(encoder, examples(tmp_path, *({"text": text} for text in texts)))
    assert found == tokenize_documents(texts, tokenizer, add_end, special)


def test_prompts_begin_as_generate_gets_them(tmp_path):
    tokenizer = chat_tokenizer()
    record = {"prompt": "Where?", "completion": " Here.</s>"}
    prompt, completion = (tokenizer(text, split_special_tokens=True)["input_ids"] for text in record.values())
    expected = {"prompt_ids": prompt, "completion_ids": [*completion, tokenizer.eos_token_id]}
    assert encode(ExampleEncoder(tokenizer, True), examples(tmp_path, record)) == [expected]
    # As one text, where all of it is learned.
    whole = tokenizer("Where? Here.</s>", split_special_tokens=True)["input_ids"]
    ids = [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    assert encode(ExampleEncoder(tokenizer, False), examples(tmp_path, record)) == [{"input_ids": ids}]
    # Llama's tokenizers put a begin token before any text, and so before prompts.
    begin = ("<s>", tokenizer.bos_token_id)
    post = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[begin])
    tokenizer.backend_tokenizer.post_processor = post
    assert tokenizer("Where?")["input_ids"] == [begin[1], *prompt]
    expected["prompt_ids"] = [begin[1], *prompt]
    assert encode(ExampleEncoder(tokenizer, True), examples(tmp_path, record)) == [expected]


def test_conversations_by_the_tokenizers_template_or_a_named_one(tmp_path):
    tokenizer = chat_tokenizer(chat_template("llama-2"))
    encoder = ExampleEncoder(tokenizer, True)
    assert encode(encoder, examples(tmp_path, {"messages": TWO_TURNS})) == ChatEncoder(tokenizer)(TWO_TURNS)
    assert encoder.chat.report() == [
        "1 conversation: one rendering by the chat template of the tokenizer, in which starts and ends of answers "
        "are verified (whole)"
    ]
    encoder = ExampleEncoder(tokenizer, True, template="ziya")
    found = encode(encoder, examples(tmp_path, {"messages": TWO_TURNS}))
    assert len(found) == 2 and shown(tokenizer, found[0]) == "<s><human>:Where is Peking?\n<bot>:[[In China.</s>]]"
    assert encoder.chat.report() == [
        "1 conversation: a row for each answer, the start of which is verified, by the chat template ziya (rows)"
    ]
    encoder = ExampleEncoder(small_tokenizer(), True, template="glm-4")
    encode(encoder, examples(tmp_path, {"messages": TWO_TURNS}))
    assert "the tokenizer spells <sop>, <|observation|> of the template glm-4 in several" in encoder.report()[-1]
    (tmp_path / "my.jinja").write_text(chat_template("chatml"), "utf-8")
    encoder = ExampleEncoder(tokenizer, True, template=str(tmp_path / "my.jinja"))
    (found,) = encode(encoder, examples(tmp_path, {"messages": TWO_TURNS}))
    assert shown(tokenizer, found).endswith("assistant\n[[In Italy, of course.<|im_end|>]]\n")


def test_answers_that_nothing_asks_for_are_told_of(tmp_path):
    turns = [{"from": "gpt", "value": "Late."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    encoder = ExampleEncoder(chat_tokenizer(), True, template="vicuna")
    (found,) = encode(encoder, examples(tmp_path, {"conversations": turns}))
    assert shown(encoder.tokenizer, found).endswith("questions. USER: Hi ASSISTANT:[[ Ho</s>]]")
    assert encoder.report()[-1] == "1 of them began with an answer, which is left out: nothing asks for it"


def test_alpaca_has_its_own_template_where_the_tokenizer_has_none(tmp_path):
    tokenizer = chat_tokenizer()
    record = {"instruction": "Sort these.", "input": "b, a", "output": '"a, b"'}
    encoder = ExampleEncoder(tokenizer, True)
    (found,) = encode(encoder, examples(tmp_path, record))
    assert shown(tokenizer, found).endswith(
        '### Instruction:\nSort these.\n\n### Input:\nb, a\n\n### Response:[["a, b"</s>]]'
    )
    assert "by the chat template alpaca" in encoder.chat.report()[0]
    # The tokenizer's own, if it has one; Alpaca's then by name.
    tokenizer.chat_template = chat_template("llama-2")
    (found,) = encode(ExampleEncoder(tokenizer, True), examples(tmp_path, record))
    assert shown(tokenizer, found) == '<s>[INST] Sort these.\nb, a [/INST][[ "a, b" </s>]]'
    (found,) = encode(ExampleEncoder(tokenizer, True, template="alpaca"), examples(tmp_path, record))
    assert "### Input:" in shown(tokenizer, found)


def test_token_ids_are_taken_as_they_are(tmp_path):
    tokenizer = chat_tokenizer()
    records = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6], "assistant_masks": [0, 1]}
    found = Samples(encode(ExampleEncoder(tokenizer, True), examples(tmp_path, *records)))
    assert list(found) == list(records)
    rows = pack_dataset(found, DataCollatorForSFT(tokenizer, max_length=8))
    assert rows[0]["labels"] == [-100, 6, 7, -100, 6]
    with pytest.raises(CorpusError, match=r"line 1: input_ids hold 9999; the tokenizer has"):
        encode(ExampleEncoder(tokenizer, False), examples(tmp_path, {"input_ids": [9999]}))
    with pytest.raises(
        CorpusError, match=r"line 1 holds input_ids, no part of which is told to be an answer: give one of"
    ):
        encode(ExampleEncoder(tokenizer, True), examples(tmp_path, {"input_ids": [5, 6]}))


def test_what_cannot_be_encoded_is_named_by_its_line(tmp_path):
    tokenizer = chat_tokenizer(chat_template("llama-2"))
    encoder = ExampleEncoder(tokenizer, True)
    with pytest.raises(CorpusError, match=r"data.jsonl line 2: no message of the assistant"):
        encode(encoder, examples(tmp_path, {"messages": TWO_TURNS}, {"messages": TWO_TURNS[:1]}))
    with pytest.raises(CorpusError, match=r"data.jsonl line 1 holds a text, no part of which is told to be an answer"):
        encode(encoder, examples(tmp_path, {"text": "a"}))
    with pytest.raises(CorpusError, match=r"data.jsonl line 1: the tokenizer has no chat template"):
        encode(ExampleEncoder(chat_tokenizer(), True), examples(tmp_path, {"messages": TWO_TURNS}))


def test_samples_are_lists_in_few_bytes():
    rows = [
        {"input_ids": list(range(n, n + 1000)), "labels": [-100] * 500 + list(range(n + 500, n + 1000))}
        for n in range(9)
    ]
    samples = Samples(rows)
    assert list(samples) == rows and samples[-1] == rows[-1] and len(samples) == 9
    assert list(samples[2:5]) == rows[2:5] and list(samples[[7, 1]]) == [rows[7], rows[1]]
    assert isinstance(samples[0]["input_ids"][0], int)
    assert sum(values.nbytes for stored in samples._stored for values in stored.values()) == 9 * 1000 * (2 + 2)
    assert Samples([{"input_ids": np.array([70_000, 1]), "prompt_length": 1}])[0] == {
        "input_ids": [70_000, 1],
        "prompt_length": 1,
    }
    with pytest.raises(IndexError):
        samples[9]
    collator = DataCollatorForCausalLM(max_length=1000, pad_token_id=0)
    assert pack_dataset(samples, collator) == pack_dataset(rows, collator)


def test_samples_of_packing_into_a_folder(tmp_path):
    collator = DataCollatorForCausalLM(max_length=8, pad_token_id=0)
    rows = [{"input_ids": list(range(1, 2 + n % 7))} for n in range(50)]
    assert list(pack_dataset(Samples(rows), collator, folder=tmp_path / "rows")) == pack_dataset(rows, collator)
