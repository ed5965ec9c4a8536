"""Text to train on: reading, splitting, docstrings, and clear errors for what cannot be used."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from minillm import MiniLLMTokenizer
from minillm.data.corpus import (
    CorpusError,
    TextDocument,
    docstring_prose,
    load_corpus,
    split_corpus,
    standard_library,
    tokenize_documents,
)


def numbered(count):
    return [TextDocument(f"folder/{number}.txt", f"text {number}") for number in range(count)]


@pytest.mark.slow
def test_standard_library_is_a_corpus():
    documents = standard_library()
    names = {document.name for document in documents}
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py"} <= names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert sum(len(document.text) for document in documents) > 8_000_000
    train, held_out = split_corpus(documents)
    assert len(train) + len(held_out) == len(documents)
    assert 0.02 < len(held_out) / len(documents) < 0.08
    assert sum(len(document.text) for document in docstring_prose(documents)) > 1_000_000


def test_folder_is_read_recursively_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "2.txt").write_bytes("\ufeffzwei 二\r\nlines".encode())
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / ".hidden" / "3.txt").write_text("three")
    (tmp_path / ".4.txt").write_text("four")
    assert load_corpus(tmp_path) == [TextDocument("1.txt", "one"), TextDocument("b/2.txt", "zwei 二\nlines")]


def test_binary_and_empty_files_of_a_folder_are_skipped_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\x00\x01")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "d.txt").write_text(" \n")
    logging.enable_propagation()
    try:
        assert [document.name for document in load_corpus(str(tmp_path))] == ["a.txt"]
    finally:
        logging.disable_propagation()
    assert "3 files of the corpus" in caplog.text
    assert "b.bin is binary (a zero byte at 0)" in caplog.text


def test_lone_file_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"line {number}\n" for number in range(5000))
    path.write_text(text)
    documents = load_corpus(path)
    assert [document.name for document in documents] == [f"book.txt#{number}" for number in range(len(documents))]
    assert len(documents) > 3
    assert all(document.text.endswith("\n") for document in documents)
    assert "".join(document.text for document in documents) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"ab\x00c", r"is binary \(a zero byte at 2\)"),
        (b"ab\xff\xfe", r"is not UTF-8 text \(byte 2\)"),
    ],
    ids=["empty", "blank", "zero", "encoding"],
)
def test_useless_file_is_named(tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="corpus.txt " + message):
        load_corpus(path)
    with pytest.raises(CorpusError, match="holds no text; 1 files were skipped, the first because .*" + message):
        load_corpus(tmp_path)


def test_empty_folder_missing_path_and_unreadable_file(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match=r"holds no text$"):
        load_corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the corpus .*nowhere does not exist"):
        load_corpus(tmp_path / "nowhere")
    file = tmp_path / "a.txt"
    file.write_text("text", "utf-8")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    # A permission bit would not stop the tests of a super-user.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CorpusError, match=r"a.txt cannot be read: Permission denied"):
        load_corpus(tmp_path)


def test_what_is_no_file_is_skipped_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text", "utf-8")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    # Reading it would wait for a writer for ever.
    os.mkfifo(tmp_path / "pipe")
    logging.enable_propagation()
    try:
        assert [document.name for document in load_corpus(tmp_path)] == ["a.txt", "link.txt"]
    finally:
        logging.disable_propagation()
    assert "2 files of the corpus" in caplog.text and "gone.txt is no file but a broken link" in caplog.text
    with pytest.raises(CorpusError, match="pipe is neither a file nor a folder"):
        load_corpus(tmp_path / "pipe")


def test_a_file_name_need_not_be_utf_8(tmp_path):
    for name in (b"gr\xf6sser.txt", b"a.txt"):
        (tmp_path / os.fsdecode(name)).write_text("text", "utf-8")
    train, held_out = split_corpus(load_corpus(tmp_path))
    assert sorted(os.fsencode(document.name) for document in train + held_out) == [b"a.txt", b"gr\xf6sser.txt"]


def test_split_depends_on_names_alone():
    documents = numbered(400)
    train, held_out = split_corpus(documents, held_out=0.1)
    assert train + held_out != documents and sorted(train + held_out) == sorted(documents)
    assert 20 < len(held_out) < 60
    again, _ = split_corpus([TextDocument(name, "other") for name, _ in reversed(documents)], held_out=0.1)
    assert {name for name, _ in again} == {name for name, _ in train}
    # A larger corpus leaves every document on its side.
    more, _ = split_corpus(numbered(800), held_out=0.1)
    assert {name for name, _ in train} <= {name for name, _ in more}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_split_of_few_documents_leaves_neither_side_empty(count, held_out):
    train, held = split_corpus(numbered(count), held_out=held_out)
    assert train and held


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(CorpusError, match=r"a corpus of 1 document\(s\) cannot be split"):
        split_corpus(numbered(1))
    with pytest.raises(ValueError, match="`held_out` is 0"):
        split_corpus(numbered(5), held_out=0)


SOURCE = '''"""Module text that is long enough."""
class A:
    """Class text that is long enough."""
    def f(self):
        """short"""
async def g():
    """Function text

        that is long enough.
    """
    return "a string that is long enough but no docstring"
'''


def test_docstrings_in_order_of_the_source():
    documents = [TextDocument("a.py", SOURCE), TextDocument("b.py", "x = 1"), TextDocument("c.txt", "no source (")]
    assert docstring_prose(documents, shortest=20) == [
        TextDocument(
            "a.py",
            "Module text that is long enough.\n\nClass text that is long enough.\n\n"
            "Function text\n\nthat is long enough.\n",
        )
    ]
    with pytest.raises(CorpusError, match="no Python source with docstrings"):
        docstring_prose(documents[1:])


def test_documents_get_begin_and_end_tokens():
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenize_documents([TextDocument("x", "a b"), "b"], tokenizer) == [
        {"input_ids": [0, 2, 3, 1]},
        {"input_ids": [0, 3, 1]},
    ]
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenize_documents(["a b"], bare) == [{"input_ids": [2, 3]}]
    with pytest.raises(CorpusError, match="there are no documents to tokenize"):
        tokenize_documents([], tokenizer)


def test_special_tokens_in_documents_are_text_unless_asked_otherwise():
    tokenizer = MiniLLMTokenizer.train_from_iterator(["a b"], vocab_size=267, show_progress=False)
    text = "a<|endoftext|>"
    literal = tokenizer.encode(text, split_special_tokens=True)
    assert tokenize_documents([text], tokenizer) == [{"input_ids": [1, *literal, 2]}]
    assert tokenizer.decode(literal) == text and 2 not in literal
    read = [{"input_ids": [1, *tokenizer.encode("a"), 2, 2]}]
    assert tokenize_documents([text], tokenizer, special_tokens_in_text=True) == read
