"""Speed of `MiniLLMTokenizer` beside the `tokenizers` library with the same file."""

import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, summarise
from minillm import MiniLLMTokenizer
from minillm.data import standard_library

OWN, RAW, FAST = "MiniLLMTokenizer", "tokenizers", "PreTrainedTokenizerFast"


class Plan(NamedTuple):
    """Pieces of the vocabulary, documents to train on, documents to encode in a run, and different such runs."""

    vocab_size: int
    training: int
    documents: int
    buffers: int


PLANS = {"full": Plan(8192, 400, 40, 4), "tiny": Plan(400, 4, 2, 2)}


def contenders(folder: Path, texts: list[str], vocab_size: int) -> dict[str, Any]:
    """The tokenizer, the library's own object from its file, and transformers' wrapper of that."""
    tokenizer = MiniLLMTokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    tokenizer.save_pretrained(folder)
    file = str(folder / "tokenizer.json")
    return {
        OWN: MiniLLMTokenizer.from_pretrained(folder),
        RAW: Tokenizer.from_file(file),
        FAST: PreTrainedTokenizerFast(tokenizer_file=file),
    }


def one_by_one(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if isinstance(tokenizer, Tokenizer):
        return [tokenizer.encode(text).ids for text in texts]
    return [tokenizer(text)["input_ids"] for text in texts]


def together(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if isinstance(tokenizer, Tokenizer):
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return tokenizer(texts)["input_ids"]


def decoded(tokenizer: Any, texts: list[list[int]]) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]


def measure(options: Options) -> dict[str, Any]:
    """Tokens per second of documents one by one and together, and back to text.

    Raises:
        ValueError: the contenders do not agree.
    """
    plan = PLANS["tiny" if options.tiny else "full"]
    texts = [document.text for document in standard_library()[: plan.training + plan.documents * plan.buffers]]
    result: dict[str, Any] = {"settings": plan._asdict(), "rows": [], "comparisons": [], "not_measured": []}
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = contenders(Path(folder), texts[: plan.training], plan.vocab_size)
    rest = texts[plan.training :]
    batches = [rest[start :: plan.buffers] for start in range(plan.buffers)]
    encoded = [together(tokenizers[RAW], batch) for batch in batches]
    tokens = sum(len(ids) for batch in encoded for ids in batch) / plan.buffers
    for what, function, inputs, bound in (
        ("encode, one text at a time", one_by_one, batches, 0.95),
        ("encode, a batch of texts", together, batches, 0.95),
        ("decode, one text at a time", decoded, encoded, None),
    ):
        if any(
            function(tokenizer, inputs[0]) != function(tokenizers[RAW], inputs[0]) for tokenizer in tokenizers.values()
        ):
            raise ValueError(f"{what}: the tokenizers do not agree")
        runs = {name: over(function, tokenizer, cycle(inputs)) for name, tokenizer in tokenizers.items()}
        times = interleave(runs, Stopwatch("cpu", options.clock), options)
        for name, values in times.items():
            summary = summarise(values)
            speed = {"tokens_per_second": tokens / summary["median"]}
            result["rows"].append({"what": what, "contender": name, "unit": "s", **summary, **speed})
        result["comparisons"] += compare(what, times, Comparison(OWN, RAW, at_least=bound))
    return result


def over(function: Callable[[Any, Any], object], tokenizer: Any, inputs: Iterator[Any]) -> Callable[[], object]:
    return lambda: function(tokenizer, next(inputs))
