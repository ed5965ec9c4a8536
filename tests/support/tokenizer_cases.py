"""Kinds of tokenizers, what they are trained on, and texts that must come back."""

import inspect
import json
import textwrap

MODELS = ["byte_bpe", "sentencepiece_bpe", "unigram", "wordpiece"]


EXACT = MODELS[:3]


GLM_NAMES = ["mask_token", "gmask_token", "smask_token", "sop_token", "eop_token"]


CHINESE = [
    "自然语言处理是计算机科学的一个重要领域。",
    "今天天气很好，我们去公园散步吧！",
    "模型从左到右预测下一个词。",
]


TEXTS = [inspect.getsource(textwrap), inspect.getsource(json), *CHINESE * 20]


ROUND_TRIPS = {
    "empty": "",
    "english": "Hello, world! It's a test: don't 'quote' me on 3.14159 or 2,000.",
    "chinese": "你好，世界！自然语言处理（NLP）——很有趣。龘靐齉",
    "mixed": "用Python写代码 and 中文 mixed,no space",
    "code": "def f(x):\n\n    if x:\n\t\treturn  [x ** 2]  # two blanks\n    \n",
    "emoji": "😀👩‍👩‍👧 🇨🇳 ✌🏽",
    "newlines": "\n\n\na\r\nb\rc\u2028d\u0085",
    "blanks": "   a  b     c \t  ",
    "one-blank": " ",
    "combining": "e\u0301 é Å Å ﬁ ½ ２ Ⅷ",
    "scripts": "Привет שלום مرحبا नमस्ते ไทย 한국어 カタカナ",
    "space-sign": "\u2581a\u2581\u2581 \u2581",
    "escape-sign": "\ufdd0 \ufdd00 \ufdd01 \ufdd0\u25811\ufdd0",
    "byte-piece": "<0x41><0x0A> <0xe2> <0x+f> 0x41",
    "control": "\x00\x01\x7f\ufeff\u200b\uffff\U0010ffff",
}
