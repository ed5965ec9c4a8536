"""Sentence ends found from token ids, in every kind of subword model."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from minillm import MiniLLMTokenizer
from minillm.data.sentence_ends import ListedEnds, SentenceEnds, special_ids

TEXT = (
    'Pi is 3.14 today. "Really?" he said. See self.name... Then (so it goes.) Next line\n'
    "last one! 你好。再见！他说“好。”And this"
)
SENTENCES = [
    "Pi is 3.14 today.",
    ' "Really?"',
    " he said.",
    " See self.name...",
    " Then (so it goes.)",
    " Next line\n",
    "last one!",
    " 你好。",
    "再见！",
    "他说“好。”",
    "And this",
]


def tokenizer_of(model):
    return MiniLLMTokenizer.train_from_iterator([TEXT] * 3, vocab_size=420, model=model, show_progress=False)


def cut(tokenizer, ids):
    ends = SentenceEnds(tokenizer)(np.array(ids))
    return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ends) + 1)]


@pytest.mark.parametrize("model", ["byte_bpe", "sentencepiece_bpe"])
def test_sentences_of_a_text(model):
    tokenizer = tokenizer_of(model)
    assert cut(tokenizer, tokenizer(TEXT)["input_ids"]) == SENTENCES


@pytest.mark.parametrize("model", ["byte_bpe", "sentencepiece_bpe", "unigram", "wordpiece"])
def test_sentences_make_up_the_text_again(model):
    tokenizer = tokenizer_of(model)
    ids = tokenizer(TEXT)["input_ids"]
    ends = SentenceEnds(tokenizer)(np.array(ids))
    assert ends.dtype == bool and ends.shape == (len(ids),)
    assert 7 <= ends.sum() <= 13
    marks = {tokenizer.decode([ids[place]]).strip()[-1:] for place in np.flatnonzero(ends)}
    assert marks <= set('.!?。！？\n")”') | {""}


def test_without_white_space_in_the_vocabulary_every_mark_ends_a_sentence():
    tokenizer = tokenizer_of("wordpiece")
    assert cut(tokenizer, tokenizer("said he. Pi is 3.14")["input_ids"]) == ["said he .", "Pi is 3 .", "14"]


def test_special_tokens_end_what_stands_before_them():
    tokenizer = tokenizer_of("byte_bpe")
    ids = tokenizer("he said.")["input_ids"]
    ends = SentenceEnds(tokenizer)(np.array([*ids, tokenizer.eos_token_id, *ids]))
    assert np.flatnonzero(ends).tolist() == [len(ids) - 1]


@pytest.mark.parametrize("ids", [[], [5], [10**6, 10**6]], ids=["none", "one", "unknown"])
def test_smallest_texts(ids):
    ends = SentenceEnds(tokenizer_of("byte_bpe"))(np.array(ids, np.int64))
    assert ends.tolist() == [False] * len(ids)


def test_any_tokenizer_of_transformers_will_do():
    vocabulary = {"<s>": 0, "[UNK]": 1, "a": 2, ".": 3, ")": 4, "b": 5}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="<s>")
    assert special_ids(tokenizer) == {0, 1}
    assert SentenceEnds(tokenizer)(np.array([0, 2, 3, 4, 5, 3, 3, 2, 3])).tolist() == [
        *[False, False, False, True, False, False, True, False, False]
    ]


def test_listed_ids_end_sentences():
    assert ListedEnds([3, 7])(torch.tensor([3, 4, 7, 8, 3]).numpy()).tolist() == [True, False, True, False, True]
    assert not ListedEnds([])(np.array([0, 1])).any()
