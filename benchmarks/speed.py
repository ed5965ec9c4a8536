"""Speed of training, of decoding and of attention alone, against transformers' own models in the same rounds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.models import Contender, Shape, build, rotating_ids
from benchmarks.steps import attention_layer, decoding, training_step
from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, summarise

CAUSAL, PREFIX, ALIBI, MOE = (f"MiniLLM {kind}" for kind in ("causal", "prefix", "alibi", "moe"))


class Group(NamedTuple):
    """Contenders that are in memory, and timed, together."""

    contenders: tuple[Contender, ...]
    comparisons: tuple[Comparison, ...]


DENSE = Group(
    tuple(Contender(name) for name in ("Llama", "GLM", "Bloom", "MPT", "Falcon", CAUSAL, PREFIX, ALIBI)),
    (
        *(Comparison(own, "Llama", at_least=1.0) for own in (CAUSAL, PREFIX, ALIBI)),
        Comparison(ALIBI, "Bloom", at_least=1.5),
        *(Comparison(ALIBI, rival) for rival in ("MPT", "Falcon")),
        Comparison(CAUSAL, "GLM"),
    ),
)
SPARSE = Group((Contender("Mixtral"), Contender(MOE)), (Comparison(MOE, "Mixtral"),))

ATTENTION = DENSE._replace(comparisons=tuple(comparison._replace(at_least=None) for comparison in DENSE.comparisons))

LLAMAS = (Contender("Llama", "sdpa"), Contender("Llama", "flex_attention", compiled=True))
CAUSALS = (Contender(CAUSAL, "sdpa"), Contender(CAUSAL, "flex_attention", compiled=True))
FLEX = tuple(Contender(name, "flex_attention", compiled=True) for name in (CAUSAL, PREFIX, ALIBI))
BLOOM = Contender("Bloom", compiled=True)

TRAINING_ON_CUDA = (
    Group(
        (*LLAMAS, *CAUSALS),
        (Comparison(tuple(own.name for own in CAUSALS), tuple(llama.name for llama in LLAMAS), at_least=1.0),),
    ),
    Group(
        (*FLEX, BLOOM),
        (*(Comparison(own.name, FLEX[0].name) for own in FLEX[1:]), Comparison(FLEX[2].name, BLOOM.name)),
    ),
    SPARSE,
)
DECODING_ON_CUDA = (
    Group(
        tuple(Contender(name, "sdpa") for name in ("Llama", CAUSAL, PREFIX, ALIBI)),
        tuple(Comparison(f"{own}, sdpa", "Llama, sdpa", at_least=1.0) for own in (CAUSAL, PREFIX, ALIBI)),
    ),
)
FOLDED = Contender(ALIBI, "sdpa")
"""In 16 bits its bias is folded into queries and keys."""
ATTENTION_ON_CUDA = (
    Group(
        (LLAMAS[0], CAUSALS[0], *(own._replace(compiled=False) for own in FLEX), FOLDED, Contender("Bloom")),
        (
            Comparison(CAUSALS[0].name, LLAMAS[0].name),
            *(Comparison(f"{own}, flex", CAUSALS[0].name) for own in (PREFIX, ALIBI)),
            *(Comparison(FOLDED.name, rival) for rival in (CAUSALS[0].name, f"{ALIBI}, flex", "Bloom")),
            Comparison(f"{ALIBI}, flex", "Bloom"),
        ),
    ),
)


@dataclass(frozen=True)
class Plan:
    """What is measured on a device.

    Args:
        tokens: tokens of a training step; rows of `lengths` tokens each.
        decoding_batches: rows that are decoded at once; each ends at a length of `lengths`, with `new` new tokens.
        cache: transformers' `cache_implementation` in decoding; None: a cache that grows.
    """

    shape: Shape
    lengths: tuple[int, ...]
    tokens: int
    decoding_batches: tuple[int, ...]
    new: int
    cache: str | None
    training: tuple[Group, ...]
    decoding: tuple[Group, ...]
    attention: tuple[Group, ...]


PRESET = Shape(16384, 256, 8, 8, 1024)
"""That of the presets `minillm-causal-10m`, `minillm-prefix-10m` and `minillm-alibi-10m`."""

BOTH = (DENSE, SPARSE)
PLANS = {
    "cpu": Plan(PRESET, (256, 1024), 1024, (1, 8), 64, None, BOTH, BOTH, (ATTENTION,)),
    "cuda": Plan(
        Shape(32000, 2048, 16, 16, 8192, tie_word_embeddings=False),
        (2048, 8192),
        16384,
        (1, 16),
        128,
        "static",
        TRAINING_ON_CUDA,
        DECODING_ON_CUDA,
        ATTENTION_ON_CUDA,
    ),
    "tiny": Plan(Shape(128, 32, 2, 2, 32), (32,), 64, (2,), 4, None, BOTH, BOTH, (ATTENTION,)),
}

Runs = dict[str, Callable[[], object]]


class Case(NamedTuple):
    """One thing to time: a label, the contenders, how to make them ready, and tokens per run."""

    what: str
    group: Group
    prepare: Callable[[], Runs]
    tokens: int


def cases(plan: Plan, device: str, stopwatch: Stopwatch) -> Iterator[Case]:
    """All that a plan says, one after another. Nothing is built before it is asked for."""

    def ready(group: Group, make: Callable[[Contender], Callable[[], object]]) -> Callable[[], Runs]:
        return lambda: {contender.name: make(contender) for contender in group.contenders}

    for length in plan.lengths:
        rows = plan.tokens // length

        def train(contender: Contender, rows: int = rows, length: int = length) -> Callable[[], object]:
            ids = rotating_ids(plan.shape, rows, length, device)
            return training_step(build(contender, plan.shape, device), contender.model, ids)

        def attend(contender: Contender, rows: int = rows, length: int = length) -> Callable[[], object]:
            return attention_layer(contender, plan.shape, rotating_ids(plan.shape, rows, length, device), device)

        for group in plan.training:
            what = f"training step, {rows} x {length} tokens"
            yield Case(what, group, ready(group, train), plan.tokens)
        for group in plan.attention:
            what = f"attention layer, {rows} x {length} tokens"
            yield Case(what, group, ready(group, attend), plan.tokens)
        for batch in plan.decoding_batches:

            def decode(contender: Contender, batch: int = batch, length: int = length) -> Callable[[], object]:
                prompts = rotating_ids(plan.shape, batch, length - plan.new, device)
                model = build(contender, plan.shape, device)
                return decoding(model, prompts, plan.new, plan.cache, stopwatch)

            for group in plan.decoding:
                what = f"decoding, batch {batch}, up to {length} tokens"
                yield Case(what, group, ready(group, decode), batch * (plan.new - 1))


def measure(options: Options, plan: Plan | None = None) -> dict[str, Any]:
    """Rows of medians and comparisons; what there was no time or memory for is named under `not_measured`."""
    plan = PLANS[options.size] if plan is None else plan
    stopwatch = Stopwatch(options.device, options.clock)
    result: dict[str, Any] = {"settings": plan.shape._asdict(), "rows": [], "comparisons": [], "not_measured": []}
    for case in cases(plan, options.device, stopwatch):
        if options.out_of_time():
            result["not_measured"].append({"what": case.what, "reason": "no time was left"})
            continue
        runs = case.prepare()
        times = interleave(runs, stopwatch, options)
        del runs
        if options.device == "cuda":
            torch.cuda.empty_cache()
        for name, values in times.items():
            if not values:
                lacking = {"what": case.what, "contender": name, "reason": "the device's memory did not suffice"}
                result["not_measured"].append(lacking)
                continue
            summary = summarise(values)
            speed = case.tokens / summary["median"]
            row = {"what": case.what, "contender": name, "unit": "s", **summary, "tokens_per_second": speed}
            result["rows"].append(row)
        for comparison in case.group.comparisons:
            result["comparisons"] += compare(case.what, times, comparison)
    return result
