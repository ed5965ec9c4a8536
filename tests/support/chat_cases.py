"""Conversations, a tokenizer that knows the special tokens of many families, and what of a sample is scored."""

from functools import cache
from itertools import groupby
from pathlib import Path

import trl

from minillm import MiniLLMTokenizer

TEMPLATES_OF_TRL = Path(trl.__file__).parent / "chat_templates"
SPECIAL = (
    "<|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|observation|> <sop> sop <|end|> "
    "<reserved_102> <reserved_103> <reserved_106> <reserved_107> <start_of_turn> <end_of_turn> <｜User｜> "
    "<｜Assistant｜> <｜end▁of▁sentence｜> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> "
    "<|CHATBOT_TOKEN|>"
).split()
ENDS = (
    "</s> <|im_end|> <|eot_id|> <|user|> <|observation|> <|end|> <end_of_turn> <｜end▁of▁sentence｜> "
    "<|END_OF_TURN_TOKEN|>"
)
TWO_TURNS = [
    {"role": "user", "content": "Where is Peking?"},
    {"role": "assistant", "content": "In China."},
    {"role": "user", "content": "And Rome?"},
    {"role": "assistant", "content": "In Italy, of course."},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TWO_TURNS]
# With pieces that hold a blank and the word behind it, which may stand across a border.
TEXTS = ["In China. And Rome? In Italy, of course. In", "Where is Peking? Be brief."] * 4


@cache
def shared_tokenizer():
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return MiniLLMTokenizer.train_from_iterator(
        TEXTS,
        vocab_size=256 + 11 + len(SPECIAL) + 60,
        special_tokens=names,
        extra_special_tokens=SPECIAL,
        show_progress=False,
    )


def chat_tokenizer(template=None):
    """A tokenizer with `<s>`, `</s>` and those of `SPECIAL`, and a chat template or none."""
    tokenizer = MiniLLMTokenizer(
        tokenizer_object=shared_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def end_ids(tokenizer, tokens=ENDS):
    return tokenizer.convert_tokens_to_ids(tokens.split())


def shown(tokenizer, sample):
    """The text of a sample with what is scored in double brackets."""
    parts = []
    pairs = zip(sample["input_ids"], sample["assistant_masks"], strict=True)
    for is_scored, group in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"[[{text}]]" if is_scored else text)
    return "".join(parts)
