"""Training a tokenizer: options, files, and what is refused."""

import json
import logging
from pathlib import Path

import pytest
from tokenizer_cases import MODELS

from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "敏捷的棕色狐狸跳过了懒狗。\n"] * 30


def train(texts=TEXTS, vocab_size=400, **options):
    return MiniLLMTokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False, **options)


def train_files(paths, vocab_size=400, **options):
    return MiniLLMTokenizer.train_from_files(paths, vocab_size=vocab_size, show_progress=False, **options)


def assert_trained_alike(first, second):
    """BPE repeats exactly; the other trainers break ties in any order, so there only the round numbers are held."""
    assert len(first) == len(second)
    if json.loads(first.backend_tokenizer.to_str())["model"]["type"] == "BPE":
        assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    else:
        assert {c for c in first.get_vocab() if len(c) == 1} == {c for c in second.get_vocab() if len(c) == 1}


@pytest.mark.parametrize("model", MODELS)
def test_batches_and_generators_equal_a_list(model):
    expected = train(model=model)
    assert_trained_alike(train([TEXTS[:10], tuple(TEXTS[10:])], model=model), expected)
    assert_trained_alike(train((text for text in TEXTS), model=model, length=len(TEXTS)), expected)


@pytest.mark.parametrize("model", MODELS)
def test_files_equal_texts(model, tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_bytes("".join(TEXTS[:7]).encode())
    paths[1].write_bytes("".join(TEXTS[7:]).encode())
    expected = train(["".join(TEXTS[:7]), "".join(TEXTS[7:])], model=model)
    assert_trained_alike(train_files(paths, model=model), expected)
    assert_trained_alike(train_files([str(path) for path in paths], model=model), expected)


def test_a_long_file_is_read_whole(tmp_path):
    path = tmp_path / "long.txt"
    lines = [f"line {number} 你好\r\n" for number in range(20_000)]
    path.write_bytes("".join(lines).encode())
    assert train_files(path).get_vocab() == train(["".join(lines)]).get_vocab()


def test_special_tokens_may_be_renamed_and_added():
    tokenizer = train(special_tokens={"eos_token": "</s>"}, extra_special_tokens=["<tool>"])
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert tokenizer.extra_special_tokens == ["<|system|>", "<|user|>", "<|assistant|>", "<tool>"]
    assert tokenizer.encode("<tool></s>") == [11, 2]


def test_options_reach_the_tokenizer():
    tokenizer = train(model_max_length=64, padding_side="left", chat_template="{{ messages }}")
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (64, "left")
    assert tokenizer.chat_template == "{{ messages }}"


def test_bos_and_eos_on_request_survive_saving(tmp_path):
    train(add_bos_token=True, add_eos_token=True).save_pretrained(tmp_path)
    ids = MiniLLMTokenizer.from_pretrained(tmp_path).encode("fox")
    assert ids == [1, *train().encode("fox"), 2]


def test_min_frequency_bounds_the_merges():
    texts = ["abab cdcd", "abab"]
    assert "abab" in train(texts, min_frequency=2).get_vocab()
    assert "Ġcdcd" in train(texts).get_vocab() and "Ġcdcd" not in train(texts, min_frequency=2).get_vocab()


@pytest.mark.parametrize(
    ("model", "limit", "decoded"),
    [("sentencepiece_bpe", 3, "敏a"), ("wordpiece", 2, "<|unk|> a")],
    ids=["sentencepiece_bpe", "wordpiece"],
)
def test_limit_alphabet_keeps_the_most_frequent_characters(model, limit, decoded):
    tokenizer = train(["abab abab"] * 5 + ["敏捷的棕色狐狸跳过了懒狗"], model=model, limit_alphabet=limit)
    assert {"a", "b"} <= set(tokenizer.get_vocab()) and "敏" not in tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer.encode("敏a")) == decoded


def test_a_small_corpus_gives_fewer_tokens_and_a_warning(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        tokenizer = train(["hello"], vocab_size=5000)
    finally:
        logger.removeHandler(caplog.handler)
    assert len(tokenizer) < 300
    assert f"only {len(tokenizer)} tokens of the 5000" in caplog.text


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"model='bpe' is unknown.*byte_bpe.*wordpiece"):
        train(model="bpe")


@pytest.mark.parametrize(
    ("model", "smallest"), [("byte_bpe", 267), ("sentencepiece_bpe", 268), ("unigram", 269), ("wordpiece", 13)]
)
def test_vocabulary_that_cannot_hold_the_fixed_tokens_is_refused(model, smallest):
    def unread():
        raise AssertionError("refused before a text is read")
        yield ""

    with pytest.raises(ValueError, match=rf"vocab_size={smallest - 1} is too small.* at least {smallest}$"):
        train(unread(), vocab_size=smallest - 1, model=model)


@pytest.mark.parametrize("model", MODELS[1:])
def test_vocabulary_that_cannot_hold_the_alphabet_is_refused(model):
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 500)))]
    with pytest.raises(ValueError, match=r"vocab_size=300 is too small.*500 different characters"):
        train(texts, vocab_size=300, model=model)
    assert len(train(texts, vocab_size=1200, model=model)) <= 1200


@pytest.mark.parametrize("vocab_size", [True, 400.0, "400", None])
def test_vocab_size_must_be_an_integer(vocab_size):
    with pytest.raises(TypeError, match="vocab_size must be an integer"):
        train(vocab_size=vocab_size)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("texts", [[], [""], [[]], [" \n", "\t"]], ids=["none", "empty", "empty-batch", "blank"])
def test_empty_corpus_is_refused(texts, model):
    with pytest.raises(ValueError, match="the corpus is empty"):
        train(texts, model=model)


@pytest.mark.parametrize("texts", ["one string", b"bytes", 7, None])
def test_texts_must_be_an_iterable_of_strings(texts):
    with pytest.raises(TypeError, match="texts must be an iterable of strings"):
        train(texts)


@pytest.mark.parametrize("item", [3, b"bytes", ["a", 3], None, {"text": "a"}])
def test_an_item_that_is_not_text_is_named(item):
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string or a list of strings"):
        train(["fine", item])


def test_errors_of_the_users_generator_pass_through():
    def broken():
        yield "text"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(broken())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "unigram", "min_frequency": 2}, ValueError, "'unigram' has no option.*min_frequency"),
        ({"limit_alphabet": 100}, ValueError, "'byte_bpe' has no option.*limit_alphabet"),
        ({"min_frequency": 0}, ValueError, "from 1 on, not {'min_frequency': 0}"),
        ({"min_freq": 2}, TypeError, "unknown arguments.*min_freq"),
        ({"special_tokens": {"end_token": "x"}}, ValueError, "no token called.*end_token"),
        ({"special_tokens": {"eos_token": "[MASK]"}}, ValueError, r"\['\[MASK\]'\] stand for more than one"),
        ({"special_tokens": {"eos_token": ""}}, ValueError, "non-empty strings"),
        ({"extra_special_tokens": ["<|user|>"]}, ValueError, "stand for more than one"),
        ({"extra_special_tokens": ["<0x41>"]}, ValueError, "byte pieces"),
        ({"extra_special_tokens": "<tool>"}, TypeError, "must be a list of strings"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        train(**options)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.txt does not exist"):
        train_files([tmp_path / "gone.txt"])


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file: name text files"):
        train_files([tmp_path])


def test_no_files_are_refused():
    with pytest.raises(ValueError, match="paths is empty"):
        train_files([])


@pytest.mark.parametrize("content", ["", " \n\n"], ids=["empty", "blank"])
def test_files_without_text_are_refused(content, tmp_path):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match="the corpus is empty"):
        train_files([tmp_path / "empty.txt"])


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x00\x00", "text".encode("utf-16")], ids=["elf", "utf-16"])
def test_binary_file_is_named(content, tmp_path):
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "data.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.bin is binary"):
        train_files([tmp_path / "fine.txt", tmp_path / "data.bin"])


def test_wrong_encoding_is_named_with_its_place(tmp_path):
    good = "line\n" * 30_000
    (tmp_path / "gbk.txt").write_bytes(good.encode() + "你好".encode("gbk"))
    with pytest.raises(ValueError, match=rf"gbk\.txt is not text in UTF-8: byte {len(good)}:"):
        train_files([tmp_path / "gbk.txt"])


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"cannot be read \(Permission denied\).*secret\.txt"):
        train_files([path])


def test_a_corpus_of_zero_bytes_teaches_unigram_nothing():
    """Its trainer takes them for the ends of sentences."""
    options = {"vocab_size": 400, "model": "unigram", "show_progress": False}
    with pytest.raises(ValueError, match="the corpus holds nothing that model='unigram' could learn from"):
        MiniLLMTokenizer.train_from_iterator(["\x00"] * 3, **options)
    tokenizer = MiniLLMTokenizer.train_from_iterator(["\x00", "some text"], **options)
    assert tokenizer.decode(tokenizer.encode("\x00 text")) == "\x00 text"
