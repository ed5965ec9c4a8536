"""Added tokens: those that decoding would change are refused in every way in, and kept where they are already."""

import copy
import json
import logging

import pytest
from tokenizer_cases import MODELS
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minillm.tokenization import extend_vocabulary
from minillm.tokenization.tokenization_minillm import ESCAPE, MiniLLMTokenizer

TEXTS = ["Hello there, be brief and say goodbye. <0x41> ## 1", "你好，再见！今天天气很好。"] * 20
LOST = {
    "byte_bpe": ["café", "<é>", "Ġthe", "£", "<|ünk|>"],
    "sentencepiece_bpe": ["<▁>", "▁", "<0x0A>", ESCAPE, f"<{ESCAPE}1>"],
    "unigram": ["<▁>", "▁", "<0x0A>", ESCAPE, f"<{ESCAPE}0>"],
    "wordpiece": ["##zz", "##"],
}
FINE = {
    "byte_bpe": ["<tool>", "你好", "<▁>", "##x", "two words", "é你"],
    "sentencepiece_bpe": ["<tool>", "你好", "café", "##x", "two words", "Ġthe"],
    "unigram": ["<tool>", "你好", "café", "##x", "two words", "Ġthe"],
    "wordpiece": ["<tool>", "naïve", "café", "<▁>", "<0x0A>", "x##"],
}
EACH_LOST = [(model, token) for model, tokens in LOST.items() for token in tokens]
REFUSED = r"do not come back from decode\(\).*extend_vocabulary"


def train(model, **options):
    return MiniLLMTokenizer.train_from_iterator(TEXTS, vocab_size=420, model=model, show_progress=False, **options)


@pytest.fixture(scope="module")
def tokenizers():
    return {model: train(model) for model in MODELS}


@pytest.fixture
def caught(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def state(tokenizer):
    return tokenizer.backend_tokenizer.to_str(), repr(vars(tokenizer)), len(tokenizer)


def with_lost_token(tokenizer, token):
    """As an older version, or another program, may have left it."""
    holder = copy.deepcopy(tokenizer)
    holder.backend_tokenizer.add_special_tokens([token])
    return holder


WAYS = {
    "add_tokens": lambda tokenizer, token: tokenizer.add_tokens([token]),
    "add_tokens-one": lambda tokenizer, token: tokenizer.add_tokens(token),
    "add_tokens-special": lambda tokenizer, token: tokenizer.add_tokens([AddedToken(token)], special_tokens=True),
    "add_special_tokens": lambda tokenizer, token: tokenizer.add_special_tokens({"sep_token": token}),
    "add_special_tokens-list": lambda tokenizer, token: tokenizer.add_special_tokens(
        {"sep_token": "<sep>", "extra_special_tokens": ["<fine>", token]}
    ),
    "new_special_tokens": lambda tokenizer, token: tokenizer.train_new_from_iterator(
        TEXTS, 400, new_special_tokens=[token], show_progress=False
    ),
    "special_tokens_map": lambda tokenizer, token: tokenizer.train_new_from_iterator(
        TEXTS, 400, special_tokens_map={"[MASK]": token}, show_progress=False
    ),
    "constructor": lambda tokenizer, token: MiniLLMTokenizer(
        tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=[token]
    ),
    "constructor-named": lambda tokenizer, token: MiniLLMTokenizer(
        tokenizer_object=tokenizer.backend_tokenizer, sep_token=AddedToken(token)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("model", "token"), EACH_LOST)
def test_tokens_that_decoding_changes_are_refused_whole(way, model, token, tokenizers):
    tokenizer = copy.deepcopy(tokenizers[model])
    before = state(tokenizer)
    with pytest.raises(ValueError, match=REFUSED):
        WAYS[way](tokenizer, token)
    assert state(tokenizer) == before


@pytest.mark.parametrize(("model", "token"), EACH_LOST)
def test_training_refuses_them_before_a_text_is_read(model, token):
    def unread():
        raise AssertionError("refused before a text is read")
        yield ""

    for options in ({"extra_special_tokens": [token]}, {"special_tokens": {"eos_token": token}}):
        with pytest.raises(ValueError, match=rf"{REFUSED}|other than byte pieces"):
            MiniLLMTokenizer.train_from_iterator(unread(), vocab_size=420, model=model, **options)


@pytest.mark.parametrize("model", MODELS)
def test_other_tokens_come_back(model, tokenizers):
    for special in (False, True):
        tokenizer = copy.deepcopy(tokenizers[model])
        assert tokenizer.add_tokens(FINE[model], special_tokens=special) == len(FINE[model])
        for token in FINE[model]:
            ids = tokenizer.encode(f"a {token} b")
            assert tokenizer.convert_tokens_to_ids(token) in ids
            assert tokenizer.decode(ids) == f"a {token} b"


@pytest.mark.parametrize("loader", [MiniLLMTokenizer, AutoTokenizer], ids=["class", "auto"])
@pytest.mark.parametrize("model", MODELS)
def test_a_saved_tokenizer_that_holds_one_loads_with_a_warning(model, loader, tokenizers, tmp_path, caught):
    token = LOST[model][0]
    with_lost_token(tokenizers[model], token).save_pretrained(tmp_path)
    for _ in range(2):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.convert_tokens_to_ids(token) == len(tokenizers[model])
    assert caught.text.count(f"In {tmp_path} the added tokens {[token]} do not come back") == 1
    # What is there may be named again, copied, trained anew.
    loaded.add_special_tokens({"sep_token": token})
    assert len(copy.deepcopy(loaded)) == len(loaded) == len(tokenizers[model]) + 1
    loaded.train_new_from_iterator(TEXTS, 400, show_progress=False)


def test_tokens_that_only_the_config_names_load_too(tokenizers, tmp_path):
    tokenizers["byte_bpe"].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"sep_token": "<é>"}), "utf-8")
    loaded = MiniLLMTokenizer.from_pretrained(tmp_path)
    assert loaded.sep_token_id == len(tokenizers["byte_bpe"])
    with pytest.raises(ValueError, match=REFUSED):
        loaded.add_tokens(["café"])


@pytest.mark.parametrize("options", [{"sep_token": "<é>"}, {"extra_special_tokens": ["<é>"]}], ids=["named", "extra"])
def test_loading_does_not_bring_in_new_ones(options, tokenizers, tmp_path):
    tokenizers["byte_bpe"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        MiniLLMTokenizer.from_pretrained(tmp_path, **options)
    assert len(MiniLLMTokenizer.from_pretrained(tmp_path)) == len(tokenizers["byte_bpe"])


def test_an_extension_keeps_those_that_are_there(tokenizers, tmp_path):
    holder = with_lost_token(tokenizers["byte_bpe"], "<é>")
    larger = extend_vocabulary(holder, ["café crème"] * 5, num_new_tokens=3)
    assert larger.convert_tokens_to_ids("<é>") == holder.convert_tokens_to_ids("<é>")
    assert larger.decode(larger.encode("café crème")) == "café crème"


def test_a_checkpoint_of_another_class_loads(tokenizers, tmp_path):
    backend = with_lost_token(tokenizers["sentencepiece_bpe"], "▁<PRE>").backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="▁<PRE>").save_pretrained(tmp_path)
    loaded = MiniLLMTokenizer.from_pretrained(tmp_path)
    assert loaded.sep_token_id == len(tokenizers["sentencepiece_bpe"])


@pytest.mark.parametrize(
    ("model", "token"), [("unigram", "ENDTOKEN"), ("unigram", "###"), ("wordpiece", "ENDTOKEN"), ("byte_bpe", "x")]
)
def test_special_tokens_that_plain_text_spells_are_refused(model, token, tokenizers):
    with pytest.raises(ValueError, match=rf"\['{token}'\] are words that plain text may hold"):
        train(model, extra_special_tokens=[token])
    with pytest.raises(ValueError, match=rf"\['{token}'\] are words that plain text may hold"):
        tokenizers[model].train_new_from_iterator(TEXTS, 400, new_special_tokens=[token], show_progress=False)


@pytest.mark.parametrize("model", ["byte_bpe", "sentencepiece_bpe"])
def test_words_that_are_special_in_bpe_are_told_apart(model):
    tokenizer = train(model, extra_special_tokens=["ENDTOKEN"])
    end = tokenizer.convert_tokens_to_ids("ENDTOKEN")
    assert tokenizer.encode("ENDTOKEN") == [end]
    assert end not in tokenizer.encode("aENDTOKEN ENDTOKEN", split_special_tokens=True)
