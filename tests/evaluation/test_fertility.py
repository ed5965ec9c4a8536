"""The fertility report: counts by hand, against naive loops, and what it refuses."""

import itertools
import json
import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vocabulary_cases import CHINESE, ENGLISH, MIXED, chinese_tokenizer, english_tokenizer, minillm_tokenizer

from minillm.data import TextDocument
from minillm.tokenization import extend_vocabulary, measure_fertility
from minillm.tokenization.fertility import count_words, cut_segments, line_bucket


@pytest.mark.parametrize(
    ("line", "bucket"),
    [
        ("今天天气很好。", "chinese"),
        ("The cat sat.", "latin"),
        ("Größe, naïve, Ångström", "latin"),
        ("用Python写代码", "chinese"),
        # 6 Latin letters and 2 Chinese characters: 2 * 2 < 6.
        ("用Python写", "latin"),
        ("ab中", "chinese"),
        ("〇", "chinese"),
        ("これは日本語です", "other"),
        ("한국어 (Korean)", "latin"),
        ("Привет, мир", "other"),
        ("ab аб", "other"),
        ("123 + 456 = ?!", None),
        ("\n", None),
        ("", None),
        ("龘\U00020000", "chinese"),
        ("ＡＢＣ", "latin"),
    ],
)
def test_the_language_of_a_line(line, bucket):
    assert line_bucket(line) == bucket


def test_stretches_of_one_language():
    text = "1.\n\nHello\n---\nworld\n你好\n\n世界\nПривет\n"
    assert cut_segments("", text) == [
        ("latin", "1.\n\nHello\n---\nworld\n"),
        ("chinese", "你好\n\n世界\n"),
        ("other", "Привет\n"),
    ]
    assert cut_segments("", "12\n34") == [("other", "12\n34")]
    assert cut_segments("", "") == [] == cut_segments("a.py", "")


@pytest.mark.parametrize(
    ("name", "bucket"),
    [
        ("a.py", "code"),
        ("deep/er/a.C", "code"),
        ("a.py#3", "code"),
        ("notes.txt", "latin"),
        ("c", "latin"),
        ("", "latin"),
        ("py", "latin"),
        ("a.py.txt", "latin"),
    ],
)
def test_code_is_told_by_its_name(name, bucket):
    assert cut_segments(name, "one two\n") == [(bucket, "one two\n")]


def test_stretches_make_up_the_text():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["a", "中", "я", "\n", "\r\n", "1", " ", "\u2028"]) for _ in range(30))
        segments = cut_segments("", text)
        assert "".join(segment.text for segment in segments) == text
        assert all(one.bucket != other.bucket for one, other in itertools.pairwise(segments))


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("don't stop, now - 3.5!", 4), ("你好，世界", 4), ("用Python3写", 3), ("--- ***", 0), ("a\n\tb", 2)],
)
def test_words(text, words):
    assert count_words(text) == words


def tiny_tokenizer():
    """Letters and "ab", the blank, "中", and an unknown token; ids in this order, then a special token."""
    pieces = ["<unk>", "a", "b", "ab", " ", "中", "z", "\n", "<0x41>"]
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("a", "b")], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert tokenizer.eos_token_id == 9
    return tokenizer


def test_counts_by_hand():
    report = measure_fertility(tiny_tokenizer(), ["ab ba ab\n中中é\n"], name="tiny", rare_below=3, list_rarest=4)
    # "ab", " ", "b", "a", " ", "ab", "\n" and "中", "中", unknown, "\n"; é has two bytes, 中 three.
    latin, chinese = report.buckets["latin"], report.buckets["chinese"]
    assert list(report.buckets) == ["chinese", "latin"]
    assert (latin.tokens, latin.characters, latin.words, latin.bytes) == (7, 9, 3, 9)
    assert (chinese.tokens, chinese.characters, chinese.words, chinese.bytes) == (4, 4, 3, 9)
    assert (latin.unknown_tokens, chinese.unknown_tokens, chinese.byte_tokens) == (0, 1, 0)
    assert latin.rates() == {
        "tokens_per_character": 7 / 9,
        "tokens_per_word": 7 / 3,
        "bytes_per_token": 9 / 7,
        "unknown_rate": 0.0,
        "byte_rate": 0.0,
    }
    assert chinese.rates()["unknown_rate"] == 1 / 4 and report.total.tokens == 11
    # a 1, b 1, ab 2, blank 2, 中 2, z 0, line break 2; neither <unk>, </s> nor the byte piece counts.
    use = report.vocabulary
    assert (use.size, use.pieces, use.used, use.never, use.rare) == (10, 7, 6, 1, 7)
    assert use.rarest == [(6, "z", 0), (2, "b", 1), (1, "a", 1), (7, "\n", 2)]
    assert use.frequencies == [2, 2, 2, 2, 1, 1, 0] and use.share_used == 6 / 7


def test_byte_tokens_by_hand():
    # LLaMA's layout and MiniLLM's: 中 is unknown to an English vocabulary and becomes three bytes.
    tokenizer = english_tokenizer("minillm_sentencepiece_bpe")
    counts = measure_fertility(tokenizer, ["中中"]).buckets["chinese"]
    assert (counts.tokens, counts.byte_tokens, counts.unknown_tokens) == (6, 6, 0)
    # Byte-level: the same three bytes, none of which is a character; "a" is one.
    counts = measure_fertility(english_tokenizer("gpt2"), ["a中"]).buckets["chinese"]
    assert (counts.tokens, counts.byte_tokens) == (4, 3)
    # A piece of a whole character is no byte token.
    counts = measure_fertility(chinese_tokenizer("gpt2"), ["中"]).buckets["chinese"]
    assert (counts.tokens, counts.byte_tokens) == (1, 0)


@pytest.mark.parametrize("layout", ["minillm_byte_bpe", "minillm_unigram", "llama_normalizer", "llama3"])
def test_counts_equal_a_naive_loop(layout):
    tokenizer = english_tokenizer(layout)
    documents = [("a.py", ENGLISH[0]), *(("", text) for text in CHINESE + ENGLISH[1:]), TextDocument("b.c", "x = 1\n")]
    report = measure_fertility(tokenizer, documents, list_rarest=10**6)
    tokens, characters, seen = Counter(), Counter(), Counter()
    for name, text in documents:
        bucket = "code" if "." in name else "chinese" if text in CHINESE else "latin"
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens[bucket] += len(ids)
        characters[bucket] += len(text)
        seen.update(ids)
    assert {bucket: counts.tokens for bucket, counts in report.buckets.items()} == tokens
    assert {bucket: counts.characters for bucket, counts in report.buckets.items()} == characters
    assert all(times == seen[index] for index, _, times in report.vocabulary.rarest)
    assert len(report.vocabulary.rarest) == report.vocabulary.pieces
    assert report.vocabulary.never == sum(seen[index] == 0 for index, _, _ in report.vocabulary.rarest)
    special = set(tokenizer.all_special_ids)
    assert not special & {index for index, _, _ in report.vocabulary.rarest}


def test_an_extension_shows_in_the_language_it_was_made_for():
    old = english_tokenizer("minillm_byte_bpe")
    new = extend_vocabulary(old, CHINESE, num_new_tokens=60)
    before, after = (measure_fertility(tokenizer, CHINESE + ENGLISH) for tokenizer in (old, new))
    ratio = "tokens_per_character"
    assert after.buckets["chinese"].rates()[ratio] < 0.75 * before.buckets["chinese"].rates()[ratio]
    assert after.buckets["latin"] == before.buckets["latin"]
    assert after.vocabulary.size == before.vocabulary.size + 60


def test_the_strings_of_special_tokens_are_text():
    tokenizer = english_tokenizer("minillm_byte_bpe")
    text = "the <|endoftext|> of"
    expected = tokenizer.encode(text, split_special_tokens=True)
    assert measure_fertility(tokenizer, [text]).total.tokens == len(expected) > len(tokenizer.encode(text))


def test_what_is_reported_is_json():
    report = measure_fertility(english_tokenizer("gpt2"), MIXED, name="g")
    figures = json.loads(json.dumps(report.to_dict()))
    assert figures["tokenizer"] == "g" and figures["buckets"]["all"]["tokens"] == report.total.tokens
    assert figures["vocabulary"]["never"] == report.vocabulary.never and "frequencies" not in figures["vocabulary"]
    assert figures["buckets"]["all"]["tokens_per_word"] == report.total.rates()["tokens_per_word"]


def test_a_text_without_words_has_no_fertility():
    rates = measure_fertility(english_tokenizer("gpt2"), ["?!"]).total.rates()
    assert rates["tokens_per_word"] is None and rates["tokens_per_character"] > 0


def test_wordpiece_can_be_judged_too():
    report = measure_fertility(minillm_tokenizer("wordpiece", ENGLISH, 300), ["the 齉 the"])
    assert report.total.unknown_tokens == 1


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([], {}, ValueError, "the corpus is empty"),
        ([""], {}, ValueError, "the corpus is empty"),
        ("one text", {}, TypeError, "documents must be an iterable of texts, not one str"),
        (["a", 3], {}, TypeError, r"documents\[1\] must be a text or a pair"),
        ([("a", "b", "c")], {}, TypeError, r"documents\[0\] must be"),
        (["a"], {"rare_below": 0}, ValueError, "rare_below must be a whole number from 1 on, not 0"),
        (["a"], {"list_rarest": -1}, ValueError, "list_rarest must be a whole number from 0 on, not -1"),
        (["a"], {"rare_below": True}, ValueError, "rare_below must be"),
    ],
)
def test_bad_input_is_refused(documents, options, error, message):
    with pytest.raises(error, match=message):
        measure_fertility(english_tokenizer("gpt2"), documents, **options)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(TypeError, match="tokenizer must be a fast tokenizer"):
        measure_fertility(object(), ["a"])
