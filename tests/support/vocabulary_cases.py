"""Tokenizers of the layouts that can be extended, English text that they know, Chinese text that they do not."""

import functools
import inspect
import json
import textwrap

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from minillm import MiniLLMTokenizer

ENGLISH = [inspect.getsource(textwrap), "The quick brown fox jumps over the lazy dog; 1234 times, it's said.\n" * 5]
CHINESE = [
    "自然语言处理是计算机科学的一个重要领域。语言模型从左到右预测下一个词，词表决定一个汉字要用几个词元。",
    "中国的语言模型往往先扩充词表，再用中文语料继续训练。扩充词表以后，同样的中文文本只需要更少的词元。",
    "今天天气很好，我们去公园散步吧！公园里有很多人在散步，也有很多人在看书。",
    "训练语言模型需要很多中文文本，中文文本越多，语言模型越好。我们的模型很小，训练很快。",
]
MIXED = [
    "",
    " ",
    "用Python写代码 and 中文 mixed,no space。语言模型 (language model)",
    "  two blanks\n\n\tand 中国  中国\n",
    "😀 Привет 한국어 \u2581 龘靐齉 é",
    "def f(x):\n    return [x ** 2]  # 训练语言模型\n",
]
TEXTS = ENGLISH + CHINESE + MIXED
# Llama 3's rule for words.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama_backend(style, texts, vocab_size):
    """LLaMA's layout: bytes after the special tokens, no cut before the model, blanks marked by one of two parts."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Trained with words cut apart, as SentencePiece does; used without.
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first")
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 256, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    order = ["<unk>", "<s>", "</s>", *BYTE_PIECES]
    order += [piece for piece in sorted(vocabulary, key=vocabulary.get) if piece not in order]
    state["model"]["vocab"] = {piece: index for index, piece in enumerate(order)}
    backend = Tokenizer.from_str(json.dumps(state))
    if style == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def byte_backend(style, texts, vocab_size):
    """GPT-2's layout, or Llama 3's, whose whole words need no merges."""
    backend = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    if style == "llama3":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def unigram_backend(texts, vocab_size):
    """T5's layout: no byte fallback, and the special tokens' places in the list are their ids."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace("\u2581", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def plain(backend, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def in_class(cls, backend, **tokens):
    model = json.loads(backend.to_str())["model"]
    return cls(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **tokens)


LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BPE_LAYOUTS = {
    "minillm_byte_bpe": lambda texts, size: minillm_tokenizer("byte_bpe", texts, size),
    "minillm_sentencepiece_bpe": lambda texts, size: minillm_tokenizer("sentencepiece_bpe", texts, size),
    "llama_normalizer": lambda texts, size: plain(llama_backend("normalizer", texts, size), **LLAMA),
    "llama_metaspace": lambda texts, size: plain(llama_backend("metaspace", texts, size), **LLAMA),
    "LlamaTokenizer": lambda texts, size: in_class(LlamaTokenizer, llama_backend("metaspace", texts, size), **LLAMA),
    "gpt2": lambda texts, size: plain(byte_backend("gpt2", texts, size)),
    "GPT2Tokenizer": lambda texts, size: in_class(GPT2Tokenizer, byte_backend("gpt2", texts, size)),
    "llama3": lambda texts, size: plain(byte_backend("llama3", texts, size)),
}
UNIGRAM_LAYOUTS = {
    "minillm_unigram": lambda texts, size: minillm_tokenizer("unigram", texts, size),
    "t5": lambda texts, size: plain(
        unigram_backend(texts, size), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ),
}
LAYOUTS = BPE_LAYOUTS | UNIGRAM_LAYOUTS


def minillm_tokenizer(kind, texts, vocab_size):
    return MiniLLMTokenizer.train_from_iterator(texts, vocab_size=vocab_size, model=kind, show_progress=False)


@functools.cache
def english_tokenizer(layout):
    """A tokenizer that knows English, with a special and an ordinary token added behind its vocabulary."""
    tokenizer = LAYOUTS[layout](ENGLISH, 500)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(["ChatGLM"])
    return tokenizer


@functools.cache
def chinese_tokenizer(layout):
    return LAYOUTS[layout](CHINESE, 520)
