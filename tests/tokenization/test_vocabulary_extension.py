"""Extended vocabularies: what is promised of ids, encodings and pieces, for every layout of tokenizer."""

import functools
import itertools
import json
import logging
import random
from collections import Counter

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast
from vocabulary_cases import (
    BPE_LAYOUTS,
    CHINESE,
    ENGLISH,
    LAYOUTS,
    TEXTS,
    UNIGRAM_LAYOUTS,
    chinese_tokenizer,
    english_tokenizer,
    minillm_tokenizer,
)

from minillm.tokenization import extend_vocabulary, spell_new_tokens

SOURCES = ["texts", "pieces_from"]
NUMBER = 60


@functools.cache
def extended(layout, source):
    given = {"texts": CHINESE} if source == "texts" else {"pieces_from": chinese_tokenizer(layout)}
    return extend_vocabulary(english_tokenizer(layout), **given, num_new_tokens=NUMBER)


@pytest.fixture(params=itertools.product(LAYOUTS, SOURCES), ids="-".join)
def pair(request):
    layout, source = request.param
    return english_tokenizer(layout), extended(layout, source)


@pytest.fixture(params=itertools.product(BPE_LAYOUTS, SOURCES), ids="-".join)
def bpe_pair(request):
    layout, source = request.param
    return english_tokenizer(layout), extended(layout, source)


def random_texts(count):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    letters = "".join(CHINESE) + "the of and language  \n\t.,1\u2581é😀<|tool|>"
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(60))) for _ in range(count)]


def new_pieces(old, new):
    vocabulary = new.get_vocab()
    return {piece: index for piece, index in vocabulary.items() if piece not in old.get_vocab()}


def alone(tokenizer, piece):
    return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(piece)]


def test_old_tokens_keep_their_ids_and_new_ones_follow(pair):
    old, new = pair
    before, after = old.get_vocab(), new.get_vocab()
    assert before.items() <= after.items()
    assert before["ChatGLM"] == max(before.values()) and "<|tool|>" in before
    added = sorted(new_pieces(old, new).values())
    # The Chinese text is short: not all layouts find as many pieces in it.
    assert 30 <= len(added) <= NUMBER and added == list(range(len(before), len(after)))
    assert len(new) == len(after)
    assert new.encode("ChatGLM<|tool|>", add_special_tokens=False)[-1] == before["<|tool|>"]


def test_the_class_and_its_settings_stay(pair):
    old, new = pair
    assert type(new) is type(old)
    assert new.special_tokens_map == old.special_tokens_map and new.all_special_ids == old.all_special_ids
    assert new.get_added_vocab() == old.get_added_vocab()
    assert (new.chat_template, new.padding_side, new.name_or_path) == (
        old.chat_template,
        old.padding_side,
        old.name_or_path,
    )
    assert new("the", "the")["input_ids"] == old("the", "the")["input_ids"]


def test_text_comes_back_as_before(pair):
    old, new = pair
    for text in TEXTS + random_texts(100):
        expected = old.decode(old.encode(text))
        found = new.decode(new.encode(text))
        assert found == expected or (old.unk_token and old.unk_token in expected)


def test_text_comes_back_exactly(pair):
    """Where the old tokenizer is exact, the new one is; LLaMA's drops one blank at the front and puts it back."""
    old, new = pair
    for text in TEXTS + random_texts(100):
        if old.decode(old.encode(text, add_special_tokens=False)) == text:
            assert new.decode(new.encode(text, add_special_tokens=False)) == text


def test_new_ids_spelled_out_are_the_old_encoding(bpe_pair):
    old, new = bpe_pair
    spelling = spell_new_tokens(old, new)
    for text in TEXTS + random_texts(200):
        ids = new.encode(text)
        assert [part for index in ids for part in spelling.get(index, [index])] == old.encode(text)


def test_chinese_gets_shorter_and_english_no_longer(pair):
    old, new = pair
    for text in CHINESE:
        # T5's layout writes one unknown token for a whole run of characters.
        before = len(text) if old.unk_token_id in old.encode(text) else len(old.encode(text))
        assert len(new.encode(text)) < 0.9 * before
    for text in ENGLISH:
        assert new.encode(text) == old.encode(text)


def test_every_new_piece_is_one_token(pair):
    old, new = pair
    for piece, index in new_pieces(old, new).items():
        assert alone(new, piece) == [index]


def test_one_file_holds_it_and_loads(pair, tmp_path):
    _, new = pair
    new.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".jinja", ".py"}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(new) and loaded.get_vocab() == new.get_vocab()
    for text in TEXTS:
        assert loaded.encode(text) == new.encode(text)


def test_the_old_tokenizer_is_not_changed():
    old = english_tokenizer("minillm_byte_bpe")
    before = old.backend_tokenizer.to_str()
    extend_vocabulary(old, CHINESE, num_new_tokens=5)
    assert old.backend_tokenizer.to_str() == before and len(old) == 502


def test_an_extension_can_be_extended():
    old = english_tokenizer("llama_normalizer")
    once = extended("llama_normalizer", "texts")
    twice = extend_vocabulary(once, ["語言模型語言模型語言模型"], num_new_tokens=4)
    assert once.get_vocab().items() <= twice.get_vocab().items()
    spelling = spell_new_tokens(old, twice)
    for text in [*TEXTS, "語言模型 language 语言模型"]:
        ids = twice.encode(text)
        assert [part for index in ids for part in spelling.get(index, [index])] == old.encode(text)


# A BPE model small enough to work out by hand.


def by_hand(merges, letters="abcd", decoder="metaspace", **model):
    """BPE over `letters` and the blank's sign with byte fallback; ids: bytes, letters, products of merges."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters, *("".join(merge) for merge in merges)]
    options = {"byte_fallback": True, **model}
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, **options))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def names(old, new):
    return sorted(new_pieces(old, new), key=new.get_vocab().get)


def test_what_saves_most_comes_first():
    # SentencePiece's rules leave the words abc, _abc 2, _ab 2, 中, _中 2, é 2, _é 2. Tokens saved: "中" 3 times 2 = 6,
    # "ab" 5, "é" 4 times 1 = 4, as many as _ab (a tie that goes by the strings); then _é, _中 and _abc 2 each. abc is
    # left once, which is below the least frequency.
    old = by_hand([])
    new = extend_vocabulary(old, ["abc abc abc ab ab", "中é 中é 中 é é"], num_new_tokens=100)
    assert names(old, new) == ["中", "ab", "é", "\u2581ab", "\u2581é", "\u2581中", "\u2581abc"]
    fewer = extend_vocabulary(old, ["abc abc abc ab ab", "中é 中é 中 é é"], num_new_tokens=4)
    assert names(old, fewer) == names(old, new)[:4]


def test_old_merges_go_first_and_pieces_are_reached_around_them():
    # The other tokenizer makes abc from ab + c; the old one has joined bc before anything else.
    old = by_hand([("b", "c")])
    other = by_hand([("a", "b"), ("ab", "c")])
    new = extend_vocabulary(old, pieces_from=other)
    assert names(old, new) == ["ab", "abc"]
    assert [new.tokenize(text) for text in ("abc", "ab", "bc", "dabc")] == [["abc"], ["ab"], ["bc"], ["d", "abc"]]
    merges = json.loads(new.backend_tokenizer.to_str())["model"]["merges"]
    assert merges == [["b", "c"], ["a", "b"], ["a", "bc"]]


def test_pieces_on_the_way_are_added():
    # abcd comes first, by its id, and the old model leaves four letters of it: ab and abc are needed on the way.
    old = by_hand([])
    state = json.loads(by_hand([("a", "b"), ("ab", "c"), ("abc", "d")]).backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["abcd"], vocabulary["ab"] = vocabulary["ab"], vocabulary["abcd"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert names(old, extend_vocabulary(old, pieces_from=other)) == ["ab", "abc", "abcd"]
    # With room for two, abcd is passed over, and abc with what it needs is taken.
    assert names(old, extend_vocabulary(old, pieces_from=other, num_new_tokens=2)) == ["ab", "abc"]


def test_a_piece_that_exists_gets_no_second_way():
    # "ab" stands in the vocabulary without a merge: it is never produced, and stays so, else old texts would change.
    state = json.loads(by_hand([]).backend_tokenizer.to_str())
    state["model"]["vocab"]["ab"] = len(state["model"]["vocab"])
    old = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    new = extend_vocabulary(old, ["abab abab abc"], num_new_tokens=10)
    assert old.tokenize("ab") == new.tokenize("ab") == ["a", "b"]
    assert "ab" not in names(old, new) and "ba" in names(old, new)


def test_bytes_never_join_and_characters_that_save_nothing_stay_bytes():
    old = by_hand([])
    new = extend_vocabulary(old, ["中中中中\n\n\n\n\n", "ax ax ax"], num_new_tokens=50)
    # A line break and "x" are one byte each: pieces for them would save nothing, so nothing is joined with them.
    assert set(names(old, new)) == {"中", "中中", "\u2581a"}


def test_min_frequency_bounds_what_is_learned():
    old = by_hand([])
    texts = ["中中国 ab"]
    assert names(old, extend_vocabulary(old, texts, num_new_tokens=9)) == ["中"]
    assert "国" in names(old, extend_vocabulary(old, texts, num_new_tokens=9, min_frequency=1))


def test_pieces_that_no_text_can_lead_to_are_left_out():
    # MiniLLM's tokenizers cut digits apart; LLaMA's layout here does not.
    old = minillm_tokenizer("sentencepiece_bpe", ENGLISH, 400)
    other = LAYOUTS["llama_normalizer"](["in 2023 and 2024 in 2023 "] * 5, 300)
    assert {"\u2581in", "\u25812023"} <= set(other.get_vocab())
    new = extend_vocabulary(old, pieces_from=other)
    assert not [piece for piece in new_pieces(old, new) if sum(map(str.isdigit, piece)) > 1]
    assert all(alone(new, piece) == [index] for piece, index in new_pieces(old, new).items())


def test_scripts_digits_and_signs_do_not_mix_where_the_tokenizer_does_not_cut():
    new = extend_vocabulary(
        english_tokenizer("llama_normalizer"), ["语言model12。语言model12。" * 9], num_new_tokens=30
    )
    added = new_pieces(english_tokenizer("llama_normalizer"), new)
    assert "语言" in added
    kinds = [
        {
            "han" if "一" <= c <= "鿿" else "letter" if c.isalpha() else "digit" if c.isdigit() else "sign"
            for c in piece
        }
        for piece in (piece.strip("\u2581") for piece in added)
    ]
    assert max(map(len, kinds)) == 1


# Against slow and obvious versions.


def naive_encode(word, merges):
    """BPE as Sennrich et al. write it: the earliest merge that applies, again and again."""
    symbols = list(word)
    for left, right in merges:
        position = 0
        while position < len(symbols) - 1:
            if symbols[position : position + 2] == [left, right]:
                symbols[position : position + 2] = [left + right]
            position += 1
    return symbols


@pytest.mark.parametrize("layout", ["minillm_byte_bpe", "gpt2", "GPT2Tokenizer"])
def test_encoding_is_what_the_merges_say(layout):
    new = extended(layout, "texts").backend_tokenizer
    merges = json.loads(new.to_str())["model"]["merges"]
    for text in CHINESE + ENGLISH[1:]:
        for word, _ in new.pre_tokenizer.pre_tokenize_str(text):
            assert [token.value for token in new.model.tokenize(word)] == naive_encode(word, merges)


def naive_learner(tokenizer, texts, number, min_frequency):
    """The same learning with everything counted anew for each piece."""
    backend = tokenizer.backend_tokenizer
    taken = set(tokenizer.get_vocab())
    known = {piece for piece in taken if len(piece) == 1}
    fallback = json.loads(backend.to_str())["model"]["byte_fallback"]
    words = []
    for text in texts:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            symbols = [
                symbol
                for is_known, run in itertools.groupby(word, known.__contains__)
                for symbol in (
                    [token.value for token in backend.model.tokenize("".join(run))] if is_known else list(run)
                )
            ]
            words.append(symbols)
    learned = []
    while len(learned) < number:
        counts = Counter()
        for symbols in words:
            counts.update((symbol,) for symbol in symbols if symbol not in taken)
            counts.update(
                two for two in itertools.pairwise(symbols) if taken.issuperset(two) and "".join(two) not in taken
            )
        weights = {
            merge: count * (len(merge[0].encode()) - 1 if len(merge) == 1 and fallback else 1)
            for merge, count in counts.items()
            if count >= min_frequency
        }
        weights = {merge: weight for merge, weight in weights.items() if weight > 0}
        if not weights:
            break
        best = min(weights, key=lambda merge: (-weights[merge], merge))
        learned.append("".join(best))
        taken.add(learned[-1])
        words = [naive_join(symbols, best) for symbols in words]
    return learned


def naive_join(symbols, merge):
    joined = list(symbols)
    position = 0
    while len(merge) == 2 and position < len(joined) - 1:
        if joined[position : position + 2] == list(merge):
            joined[position : position + 2] = ["".join(merge)]
        position += 1
    return joined


@pytest.mark.parametrize("min_frequency", [1, 2, 3])
@pytest.mark.parametrize("layout", ["minillm_byte_bpe", "llama3", "by_hand"])
def test_learning_equals_counting_anew_each_time(layout, min_frequency):
    old = by_hand([("b", "c")]) if layout == "by_hand" else english_tokenizer(layout)
    texts = [*CHINESE[1:3], "abcabc aaaa aaa abc bcbc", "中中中中 中中国"] if layout == "by_hand" else CHINESE[:2]
    texts = [cut for text in texts for cut in separate(text)] if layout == "by_hand" else texts
    new = extend_vocabulary(old, texts, num_new_tokens=40, min_frequency=min_frequency)
    assert names(old, new) == naive_learner(old, texts, 40, min_frequency)


def separate(text):
    """The text cut where SentencePiece's rules cut, so that only the learning is compared."""
    cut = pre_tokenizers.Split(Regex(r"\p{Han}+|[\p{L}&&[^\p{Han}]]+|[^\p{L} ]+| +"), "isolated")
    return [part for part, _ in cut.pre_tokenize_str(text)]


# Unigram.


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layout", UNIGRAM_LAYOUTS)
def test_unigram_keeps_texts_without_new_pieces(layout, source):
    old, new = english_tokenizer(layout), extended(layout, source)
    added = [piece.replace("\u2581", " ") for piece in new_pieces(old, new)]
    kept = 0
    for text in TEXTS + random_texts(300) + ["fox 龘 dog", "Привет the"]:
        if not any(piece in f" {text}" for piece in added):
            assert new.encode(text) == old.encode(text)
            kept += 1
    assert kept >= 4


def every_spelling(text, scores, unknown):
    if not text:
        return [0.0]
    ways = []
    for end in range(1, len(text) + 1):
        score = scores.get(text[:end], unknown if end == 1 else None)
        if score is not None:
            ways += [score + rest for rest in every_spelling(text[end:], scores, unknown)]
    return ways


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layout", UNIGRAM_LAYOUTS)
def test_unigram_pieces_beat_every_spelling(layout, source):
    old, new = english_tokenizer(layout), extended(layout, source)
    scores = dict(json.loads(new.backend_tokenizer.to_str())["model"]["vocab"])
    lowest = min(scores.values())
    assert lowest == min(score for _, score in json.loads(old.backend_tokenizer.to_str())["model"]["vocab"])
    for piece in new_pieces(old, new):
        rest = {other: score for other, score in scores.items() if other != piece}
        assert scores[piece] > max(every_spelling(piece, rest, lowest - 10))


# Edges.


def test_dropout_does_not_disturb_learning():
    old = by_hand([("b", "c"), ("a", "bc")], dropout=0.5)
    new = extend_vocabulary(old, ["abcd abcd abcd"], num_new_tokens=1)
    assert names(old, new) == ["abcd"]
    assert json.loads(new.backend_tokenizer.to_str())["model"]["dropout"] == 0.5


def test_spelling_of_new_tokens_by_hand():
    old = by_hand([("a", "b")])
    new = extend_vocabulary(old, ["中ab 中ab"], num_new_tokens=1)
    new.add_tokens(["<cd>"])
    vocabulary = new.get_vocab()
    # "中" saves 4 tokens; "ab" is one token already, and what is left are "_ab" and "_中", once each.
    assert names(old, new) == ["中", "<cd>"]
    spelling = spell_new_tokens(old, new)
    # "中" is E4 B8 AD in UTF-8; "<" and ">" are bytes 3C and 3E.
    assert spelling[vocabulary["中"]] == [0xE4, 0xB8, 0xAD]
    assert spelling[vocabulary["<cd>"]] == [0x3C, old.get_vocab()["c"], old.get_vocab()["d"], 0x3E]
    assert list(spelling) == sorted(spelling) and set(spelling) == set(new_pieces(old, new).values())


def warned(caplog, call):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        call()
    finally:
        logger.removeHandler(caplog.handler)
    return caplog.text


def test_fewer_tokens_than_asked_for_are_a_warning(caplog):
    told = warned(caplog, lambda: extend_vocabulary(by_hand([]), ["ab ab"], num_new_tokens=9))
    assert "only 1 new tokens of the 9" in told


def wordpiece():
    return minillm_tokenizer("wordpiece", ENGLISH, 300)


OLD = lambda: english_tokenizer("minillm_byte_bpe")  # noqa: E731


@pytest.mark.parametrize(
    ("tokenizer", "arguments", "error", "message"),
    [
        (OLD, {}, ValueError, "exactly one of texts and pieces_from"),
        (OLD, {"texts": ["a"], "pieces_from": 1, "num_new_tokens": 1}, ValueError, "exactly one"),
        (OLD, {"texts": ["a"]}, ValueError, "num_new_tokens is missing"),
        (OLD, {"texts": ["a"], "num_new_tokens": 0}, ValueError, "num_new_tokens must be .* from 1 on, not 0"),
        (OLD, {"texts": ["a"], "num_new_tokens": True}, ValueError, "num_new_tokens must be .*, not True"),
        (OLD, {"texts": ["a"], "num_new_tokens": 2, "min_frequency": 0}, ValueError, "min_frequency must be"),
        (OLD, {"texts": "one", "num_new_tokens": 2}, TypeError, "texts must be an iterable of strings"),
        (OLD, {"texts": ["a", 3], "num_new_tokens": 2}, TypeError, r"texts\[1\] must be a string"),
        (OLD, {"texts": [" \n"], "num_new_tokens": 2}, ValueError, "the corpus is empty"),
        (OLD, {"pieces_from": "gpt2"}, TypeError, "pieces_from must be a fast tokenizer.*not str"),
        (lambda: None, {"texts": ["a"], "num_new_tokens": 2}, TypeError, "tokenizer must be a fast tokenizer"),
        (wordpiece, {"texts": ["a"], "num_new_tokens": 2}, ValueError, "other WordPiece cannot be extended"),
        (
            lambda: english_tokenizer("minillm_unigram"),
            {"texts": [""], "num_new_tokens": 2},
            ValueError,
            "the corpus is empty",
        ),
    ],
)
def test_bad_input_is_refused(tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        extend_vocabulary(tokenizer(), **arguments)


def test_kinds_must_agree():
    with pytest.raises(
        ValueError, match=r"tokenizer is of the kind byte-level BPE, pieces_from of the kind U\+2581 BPE"
    ):
        extend_vocabulary(OLD(), pieces_from=english_tokenizer("llama_metaspace"))
    with pytest.raises(ValueError, match=r"U.2581 Unigram, pieces_from of the kind U.2581 BPE"):
        extend_vocabulary(english_tokenizer("minillm_unigram"), pieces_from=english_tokenizer("llama_metaspace"))


def test_a_bpe_that_marks_the_ends_of_words_is_refused():
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(ValueError, match="end_of_word_suffix cannot be extended"):
        extend_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), ["a"], num_new_tokens=1)


def test_spelling_refuses_what_is_no_extension():
    with pytest.raises(ValueError, match=r"does not extend the old one: .* had the id"):
        spell_new_tokens(english_tokenizer("gpt2"), english_tokenizer("minillm_byte_bpe"))
    with pytest.raises(TypeError, match="old_tokenizer must be a fast tokenizer"):
        spell_new_tokens(BertTokenizer, english_tokenizer("gpt2"))
