"""What `minillm train` trains on: samples from a corpus, or prompts and answers from lines of JSON."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from minillm.cli.console import one_line, say
from minillm.data import load_corpus, split_corpus, tokenize_documents
from minillm.tokenization.literal_text import apply_template_literally


def read_samples(options: Any, objective: str, tokenizer: Any) -> tuple[list, list]:
    """Samples to train on and held-out ones."""
    if objective != "sft":
        train, held_out = split_corpus(load_corpus(options.data))
        train, held_out = (
            tokenize_documents(part, tokenizer, objective != "glm", special_tokens_in_text=options.special_tokens)
            for part in (train, held_out)
        )
        return train, held_out
    samples = [
        read_answer_line(line, number, tokenizer, options.special_tokens) for number, line in jsonl_lines(options.data)
    ]
    count = max(1, len(samples) // 20)
    if len(samples) < 2:
        raise ValueError(f"{options.data} holds {len(samples)} samples; at least 2 are needed, one to hold out")
    return samples[:-count], samples[-count:]


def jsonl_lines(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise ValueError(f"{path} is no file; --objective sft reads lines of JSON from one")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    # Not `splitlines`: JSON allows U+2028 and its like inside a string.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_answer_line(line: str, number: int, tokenizer: Any, special_tokens: bool = False) -> dict[str, list[int]]:
    """A line `{"prompt": ..., "completion": ...}` or `{"messages": [...]}` as a sample for the SFT collator.

    The strings of special tokens in it are text unless `special_tokens` has them read.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if isinstance(record, dict) and "messages" in record:
        try:
            encoded = apply_template_literally(
                tokenizer,
                record["messages"],
                special_tokens_in_content=special_tokens,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except (TemplateError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"line {number} holds no messages that can be read: {one_line(error)}") from error
        if not any(encoded["assistant_masks"]):
            raise ValueError(f"line {number}: no message of the assistant to learn")
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}
    if not isinstance(record, dict) or not {"prompt", "completion"} <= set(record):
        found = f"has the keys {sorted(record)}" if isinstance(record, dict) else f"holds {record!r:.40}"
        raise ValueError(f"line {number} {found}; needed: prompt and completion, or messages")
    for name in ("prompt", "completion"):
        if not isinstance(record[name], str):
            raise ValueError(f"line {number}: {name} must be a string, not {record[name]!r:.40}")
    options = {"add_special_tokens": False, "split_special_tokens": not special_tokens}
    prompt, completion = (tokenizer(record[name], **options)["input_ids"] for name in ("prompt", "completion"))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {"prompt_ids": prompt, "completion_ids": completion + end}


def say_of_turns(samples: list[dict[str, list[int]]]) -> None:
    """Says that `generate()` will not tell the answers of a conversation, where no token does."""
    if any(sum(pair == (0, 1) for pair in pairwise(sample.get("assistant_masks", []))) > 1 for sample in samples):
        say(
            "the chat template of this tokenizer starts answers with no token of their own: `generate()` will read a "
            "conversation, earlier answers too, as one prompt, unlike this training; pass it a `prefix_mask`"
        )
