"""Items and documents to judge models by, and scoring them the slow way: one row, one forward, no padding, float64."""

import random

import torch
from cli_cases import MIXED_TEXT, python_source, sentence, small_model, small_tokenizer
from variants import variants

from minillm.data.corpus import TextDocument
from minillm.evaluation.items import parse_item

VARIANTS = variants("causal prefix alibi prefix-alibi learned glm_2d-prefix rope_2d-prefix")
GLM = ("glm_2d-prefix", "rope_2d-prefix")


def evaluated_model(variant="causal", **fields):
    """A model of float64 and its tokenizer."""
    tokenizer = small_tokenizer()
    fields = {"max_position_embeddings": 400, **VARIANTS[variant], **fields}
    return small_model(tokenizer, **fields).double(), tokenizer


def documents(count=4):
    """Some longer than a window of 64 tokens, some shorter, one partly in Chinese."""
    texts = [python_source(number, functions=number) for number in range(count)]
    texts = [text[: 60 + 300 * number] for number, text in enumerate(texts)]
    return [TextDocument(f"{number}.py", text) for number, text in enumerate([*texts, MIXED_TEXT * 2])]


def item_records(seed=0, count=9):
    """Questions with two to four options of one to three words, in two groups; one in Chinese, one without options."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        options = [sentence(rng, rng.randint(1, 3)) for _ in range(2 + number % 3)]
        record = {"question": f"{sentence(rng, 5)}?", "options": options, "answer": rng.randrange(len(options))}
        records.append({**record, "group": "ab"[number % 2]})
    records.append({"question": "中国的首都是哪里？", "options": ["上海", "北京"], "answer": 1, "answers": ["Peking"]})
    return records


def items(**options):
    return [parse_item(record, number, "item") for number, record in enumerate(item_records(**options), 1)]


OPEN_ITEM = {"question": "What is 2 plus 2?", "answers": ["4", "four"], "group": "a"}


def naive_log_likelihood(model, context, continuation):
    """A forward for each token; to a prefix model the context is the prefix."""
    total, known = 0.0, list(context)
    for token in continuation:
        extra = {}
        if model.config.attention_type == "prefix":
            extra["prefix_mask"] = torch.tensor([[1] * len(context) + [0] * (len(known) - len(context))])
        with torch.no_grad():
            logits = model(torch.tensor([known]), use_cache=False, **extra).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        known.append(token)
    return total


def split_at(tokenizer, prompt, continuation):
    """Token ids of a prompt, and those that the whole has beyond them."""
    context, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + continuation)["input_ids"]
    assert whole[: len(context)] == context
    return context, whole[len(context) :]


def naive_option_scores(model, tokenizer, prompt, options, bare="Answer:"):
    """(way -> score of each option) of a prompt without shots, by the definitions."""
    found = {}
    for option in options:
        text = option if ord(option[0]) > 0x2E80 else " " + option
        context, ids = split_at(tokenizer, prompt, text)
        total = naive_log_likelihood(model, context, ids)
        alone = naive_log_likelihood(model, [tokenizer.bos_token_id], tokenizer(text)["input_ids"])
        after_bare = naive_log_likelihood(model, *split_at(tokenizer, bare, text))
        scores = {
            "sum": total,
            "token": total / len(ids),
            "char": total / len(option),
            "byte": total / len(option.encode()),
            "pmi": total - after_bare,
            "pmi_empty": total - alone,
        }
        for way, score in scores.items():
            found.setdefault(way, []).append(score)
    return found


def naive_answer(model, tokenizer, prompt, new_tokens=32):
    """Greedy, token by token, up to the end of a line or of the text."""
    context = tokenizer(prompt)["input_ids"]
    known = list(context)
    while len(known) < len(context) + new_tokens:
        extra = {}
        if model.config.attention_type == "prefix":
            extra["prefix_mask"] = torch.tensor([[1] * len(context) + [0] * (len(known) - len(context))])
        with torch.no_grad():
            token = model(torch.tensor([known]), use_cache=False, **extra).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        known.append(token)
        text = tokenizer.decode(known[len(context) :], skip_special_tokens=True)
        if "\n" in text:
            return text.split("\n")[0]
    return tokenizer.decode(known[len(context) :], skip_special_tokens=True)
