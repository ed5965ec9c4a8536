"""Training on documents: packed into rows, and one a row with padding behind it."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.models import Contender, Shape, build, start_afresh
from benchmarks.steps import training_step
from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, make_ready, summarise
from minillm.training import DataCollatorForCausalLM, DataCollatorForPrefixLM

WAYS = ("packed", "padded")


class Plan(NamedTuple):
    """`tokens`: of the documents of a step, at most; none is longer than a row of the shape's `length`."""

    shape: Shape
    tokens: int
    own: tuple[Contender, ...]
    rival: Contender


OWN = tuple(Contender(f"MiniLLM {kind}") for kind in ("causal", "prefix", "alibi"))
PLANS = {
    "cpu": Plan(Shape(16384, 256, 8, 8, 512), 2560, OWN, Contender("Llama")),
    "cuda": Plan(
        Shape(32000, 2048, 16, 16, 2048, tie_word_embeddings=False),
        8192,
        tuple(contender._replace(attention="flex_attention", compiled=True) for contender in OWN),
        Contender("Llama", "sdpa"),
    ),
    "tiny": Plan(Shape(128, 32, 2, 2, 32), 64, OWN, Contender("Llama")),
}


def document_lengths(plan: Plan) -> list[int]:
    """Log-normal, with a median of 148 tokens in rows of 512, up to the first that would be too much."""
    draws = np.random.default_rng(0).lognormal(np.log(plan.shape.length * 148 / 512), 1.0, plan.tokens)
    lengths = np.clip(draws.astype(int), 2, plan.shape.length)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), plan.tokens, side="right"))].tolist()


def collate(plan: Plan, name: str, way: str, lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    """A batch of random documents of the given lengths; prefixes are half of a document."""
    rng = np.random.default_rng(seed)
    documents = [{"input_ids": rng.integers(3, plan.shape.vocab_size, length)} for length in lengths]
    options: dict[str, Any] = {"max_length": plan.shape.length, "pad_token_id": 0, "packing": way == "packed"}
    if name == "MiniLLM prefix":
        return DataCollatorForPrefixLM(prefix_fraction=(0.5, 0.5), **options)(documents)
    batch = DataCollatorForCausalLM(**options)(documents)
    if name == "Llama" and way == "packed":
        # transformers tells documents apart by positions alone.
        return {key: batch[key] for key in ("input_ids", "labels", "position_ids")}
    return batch


def rotating_batches(
    plan: Plan, name: str, way: str, lengths: list[int], device: str
) -> Iterator[dict[str, torch.Tensor]]:
    batches = [collate(plan, name, way, lengths, seed) for seed in range(4)]
    return cycle([{key: value.to(device) for key, value in batch.items()} for batch in batches])


def prepare(plan: Plan, contender: Contender, way: str, lengths: list[int], device: str) -> Callable[[], None]:
    """Trains a contender on batches of the given lengths."""
    batches = rotating_batches(plan, contender.model, way, lengths, device)
    return training_step(build(contender, plan.shape, device), batches)


def measure(options: Options) -> dict[str, Any]:
    """Packed against padded: the target is that no slot which packing saves costs time."""
    plan = PLANS[options.size]
    lengths = document_lengths(plan)
    slots = {way: collate(plan, "MiniLLM causal", way, lengths, 0)["input_ids"].numel() for way in WAYS}
    settings = {**plan.shape._asdict(), "document_lengths": lengths, "slots": slots}
    what = f"training step, {len(lengths)} documents of {sum(lengths):,} tokens"
    result: dict[str, Any] = {"settings": settings, "rows": [], "comparisons": [], "not_measured": []}
    stopwatch = Stopwatch(options.device, options.clock)
    for contender in plan.own:
        rivals = (plan.rival,) if contender == plan.own[0] else ()
        if options.out_of_time():
            result["not_measured"].append({"what": what, "contender": contender.name, "reason": "no time was left"})
            continue
        start_afresh()
        makers = {
            f"{each.name}, {way}": partial(prepare, plan, each, way, lengths, options.device)
            for each in (contender, *rivals)
            for way in WAYS
        }
        runs = make_ready(makers)
        times = interleave(runs, stopwatch, options)
        del runs
        for name in makers:
            values = times.get(name)
            if not values:
                lacking = {"what": what, "contender": name, "reason": "the device's memory did not suffice"}
                result["not_measured"].append(lacking)
                continue
            summary = summarise(values)
            speed = {"tokens_per_second": sum(lengths) / summary["median"]}
            result["rows"].append({"what": what, "contender": name, "unit": "s", **summary, **speed})
        packed, padded = (f"{contender.name}, {way}" for way in WAYS)
        least = slots["padded"] / slots["packed"]
        result["comparisons"] += compare(what, times, Comparison(packed, padded, at_least=least))
        for rival in rivals:
            for way in WAYS:
                result["comparisons"] += compare(what, times, Comparison(packed, f"{rival.name}, {way}"))
    return result
