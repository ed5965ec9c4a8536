"""Tokenizers under any text of Unicode and any added tokens: what comes back is what went in."""

import copy
import functools
import tempfile

from hypothesis import assume
from hypothesis import strategies as st
from random_cases import random_test
from tokenizer_cases import EXACT
from tokenizers import AddedToken

from minillm import MiniLLMTokenizer
from minillm.tokenization import extend_vocabulary

CORPUS = [
    "Hello there, be brief and say goodbye. <0x41> ## 1",
    "你好，再见！今天天气很好。",
    "def f(x):\n\treturn x",
] * 20
PIECES = [
    *["\u2581", "\u2581\u2581", "<0x41>", "<0x", "\ufdd0", "\ufdd01", "Ġ", "##", "[MASK]", "<|user|>", "<|", "|>"],
    *["<|endoftext|>", " ", "  ", "\n", "\r\n", "\u3000", "e\u0301", "é", "你好", "Hello", "\U0010ffff", "\x00"],
]
"""What tokenizers use as signs, and what looks like them."""
PARTS = st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
TEXTS = st.lists(PARTS).map("".join)


@functools.cache
def trained(model):
    return MiniLLMTokenizer.train_from_iterator(CORPUS * 20, vocab_size=420, model=model, show_progress=False)


@functools.cache
def loaded(model):
    with tempfile.TemporaryDirectory() as folder:
        trained(model).save_pretrained(folder)
        return MiniLLMTokenizer.from_pretrained(folder)


def literally(tokenizer, text):
    return tokenizer(text, split_special_tokens=True)["input_ids"]


@random_test(quick=150, full=15000, model=st.sampled_from(EXACT), texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_any_text_comes_back(model, texts):
    tokenizer = trained(model)
    batch = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(batch) == texts
    assert batch == loaded(model)(texts)["input_ids"] == [tokenizer.encode(text) for text in texts]
    for text in texts:
        ids = literally(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert not set(tokenizer.all_special_ids) & set(ids)
        # Those that are read are in the text, at the place that the offsets name.
        read = tokenizer(text, return_offsets_mapping=True)
        for token, (start, stop) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            if token in tokenizer.all_special_ids:
                assert text[start:stop] == tokenizer.convert_ids_to_tokens(token)


NEW_TOKENS = st.lists(PARTS, min_size=1, max_size=3).map("".join)


@random_test(
    quick=100,
    full=8000,
    model=st.sampled_from(EXACT),
    tokens=st.lists(NEW_TOKENS, min_size=1, max_size=3, unique=True),
    special=st.booleans(),
    normalized=st.booleans(),
    between=st.lists(TEXTS, min_size=2, max_size=4),
    data=st.data(),
)
def test_added_tokens_come_back_or_are_refused_whole(model, tokens, special, normalized, between, data):
    tokenizer = copy.deepcopy(trained(model))
    before = tokenizer.backend_tokenizer.to_str(), len(tokenizer)
    try:
        tokenizer.add_tokens([AddedToken(token, normalized=normalized) for token in tokens], special_tokens=special)
    except ValueError as error:
        assert "do not come back from decode()" in str(error)
        assert (tokenizer.backend_tokenizer.to_str(), len(tokenizer)) == before
        return
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert len(set(ids)) == len(tokens) and [tokenizer.decode([each]) for each in ids] == tokens
    text = between[0] + "".join(data.draw(st.sampled_from(tokens)) + part for part in between[1:])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(literally(tokenizer, text)) == text
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        assert MiniLLMTokenizer.from_pretrained(folder).encode(text) == tokenizer.encode(text)


CONTENTS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=4).map(
    lambda turns: [{"role": role, "content": content} for role, content in turns]
)


@random_test(quick=60, full=5000, model=st.sampled_from(EXACT), chat=CONTENTS)
def test_contents_of_a_chat_are_literal(model, chat):
    tokenizer, expected = trained(model), []
    for message in chat:
        expected += [
            tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"),
            *literally(tokenizer, message["content"]),
        ]
        expected += [tokenizer.eos_token_id] * (message["role"] == "assistant")
    found = tokenizer.apply_chat_template(chat, return_dict=False)
    assert found == expected
    assert tokenizer.decode(found) == tokenizer.apply_chat_template(chat, tokenize=False)


@random_test(
    quick=10,
    full=600,
    model=st.sampled_from(EXACT),
    corpus=st.lists(TEXTS, min_size=1, max_size=8),
    text=TEXTS,
    size=st.integers(330, 500),
)
def test_a_tokenizer_of_any_corpus_writes_any_text(model, corpus, text, size):
    characters = set("".join(corpus))
    # Without a character beside white space there is nothing to learn, and unigram ends texts at zero bytes.
    assume("".join(characters - {"\0"}).strip())
    try:
        tokenizer = MiniLLMTokenizer.train_from_iterator(corpus, vocab_size=size, model=model, show_progress=False)
    except ValueError as error:
        # 256 byte pieces, 12 special tokens and the signs for blanks, of which each takes an id.
        assert "raise vocab_size" in str(error) and len(characters) + 256 + 12 + 4 > size
        return
    assert len(tokenizer) <= size and sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    for each in (*corpus, text):
        assert tokenizer.decode(literally(tokenizer, each)) == each


@random_test(quick=10, full=600, model=st.sampled_from(EXACT), corpus=st.lists(TEXTS, min_size=1), text=TEXTS)
def test_an_extended_vocabulary_keeps_what_was_there(model, corpus, text):
    tokenizer = trained(model)
    assume("".join(corpus).strip())
    larger = extend_vocabulary(tokenizer, [part * 3 for part in corpus], num_new_tokens=5)
    assert larger.convert_ids_to_tokens(list(range(len(tokenizer)))) == tokenizer.convert_ids_to_tokens(
        list(range(len(tokenizer)))
    )
    for each in (*corpus, text):
        assert larger.decode(literally(larger, each)) == each
        assert len(literally(larger, each)) <= len(literally(tokenizer, each)) or model == "unigram"
