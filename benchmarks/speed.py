"""Speed of training, of decoding and of attention alone, against transformers' own models in the same rounds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from benchmarks.models import Contender, Shape, build, rotating_ids, start_afresh
from benchmarks.steps import attention_layer, batches_of, copying, decoding, training_step
from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, make_ready, summarise

CAUSAL, PREFIX, ALIBI, MOE = (f"MiniLLM {kind}" for kind in ("causal", "prefix", "alibi", "moe"))


class Group(NamedTuple):
    """Contenders that are in memory, and timed, together."""

    contenders: tuple[Contender, ...]
    comparisons: tuple[Comparison, ...]


AGAINST_BLOOM = Comparison(ALIBI, "Bloom", at_least=1.5)
DENSE = Group(
    tuple(Contender(name) for name in ("Llama", "GLM", "Bloom", "MPT", "Falcon", CAUSAL, PREFIX, ALIBI)),
    (
        *(Comparison(own, "Llama", at_least=1.0) for own in (CAUSAL, PREFIX, ALIBI)),
        AGAINST_BLOOM,
        *(Comparison(ALIBI, rival) for rival in ("MPT", "Falcon")),
        Comparison(CAUSAL, "GLM"),
    ),
)
SPARSE = Group((Contender("Mixtral"), Contender(MOE)), (Comparison(MOE, "Mixtral"),))

ATTENTION = DENSE._replace(comparisons=tuple(comparison._replace(at_least=None) for comparison in DENSE.comparisons))

COPY = Contender("a copy of the weights")
"""What the device's memory allows: reads and writes of as many bytes as a token has weights read."""

PROMPTS = DENSE._replace(
    comparisons=tuple(each._replace(at_least=None) if each == AGAINST_BLOOM else each for each in DENSE.comparisons)
)
DECODING = Group((*DENSE.contenders, COPY), (*DENSE.comparisons, Comparison(CAUSAL, COPY.name)))

LLAMAS = (Contender("Llama", "sdpa"), Contender("Llama", "flex_attention", compiled=True))
CAUSALS = (Contender(CAUSAL, "sdpa"), Contender(CAUSAL, "flex_attention", compiled=True))
FLEX = tuple(Contender(name, "flex_attention", compiled=True) for name in (CAUSAL, PREFIX, ALIBI))
FOLDED = Contender(ALIBI, "sdpa")
"""In 16 bits its bias is folded into queries and keys."""
ALIBIS = (FLEX[2], FOLDED._replace(compiled=True))
BLOOM = Contender("Bloom", compiled=True)


def names_of(contenders: tuple[Contender, ...]) -> tuple[str, ...]:
    return tuple(contender.name for contender in contenders)


TRAINING_ON_CUDA = (
    Group((*LLAMAS, *CAUSALS), (Comparison(names_of(CAUSALS), names_of(LLAMAS), at_least=1.1),)),
    Group(
        (*FLEX[:2], *ALIBIS),
        (
            Comparison(FLEX[1].name, FLEX[0].name, at_least=0.95),
            Comparison(names_of(ALIBIS), FLEX[0].name, at_least=0.95),
        ),
    ),
    Group((FLEX[2], BLOOM), (Comparison(FLEX[2].name, BLOOM.name, at_least=1.5),)),
    SPARSE,
)


def decoding_on_cuda(ratio: float, of_copy: float | None) -> Group:
    """Static caches, for which transformers compiles the step.

    Args:
        ratio: how many times as fast as Llama MiniLLM is to be.
        of_copy: the part of the speed of copying the weights that it is to reach.
    """
    own = (CAUSAL, PREFIX, ALIBI)
    contenders = tuple(Contender(name, "sdpa") for name in ("Llama", *own))
    comparisons = tuple(Comparison(f"{name}, sdpa", "Llama, sdpa", at_least=ratio) for name in own)
    if of_copy is None:
        return Group(contenders, comparisons)
    limits = tuple(Comparison(f"{name}, sdpa", COPY.name, at_least=of_copy) for name in own)
    return Group((*contenders, COPY), (*comparisons, *limits))


def attention_on_cuda(least: float) -> tuple[Group, ...]:
    """SDPA's causal kernel against flex attention, and against ALiBi folded into it.

    Args:
        least: the part of the speed of SDPA's causal kernel that prefixes and ALiBi are to reach.
    """
    flex = tuple(contender._replace(compiled=False) for contender in FLEX)
    plain = CAUSALS[0].name
    return (
        Group(
            (LLAMAS[0], CAUSALS[0], *flex, FOLDED, Contender("Bloom")),
            (
                Comparison(plain, LLAMAS[0].name),
                Comparison(flex[0].name, plain),
                Comparison(flex[1].name, plain, at_least=least),
                Comparison((flex[2].name, FOLDED.name), plain, at_least=least),
                *(Comparison(own.name, flex[0].name) for own in flex[1:]),
                *(Comparison(own, rival) for own in (flex[2].name, FOLDED.name) for rival in (plain, "Bloom")),
            ),
        ),
    )


@dataclass(frozen=True)
class Plan:
    """What is measured on a device.

    Args:
        tokens: tokens of a training step; rows of `lengths` tokens each.
        new: tokens that are decoded, up to a length of `lengths`.
        cache: transformers' `cache_implementation` in decoding; None: a cache that grows.
        decoding: by the number of rows that are decoded at once.
        prompts: how long one row has to wait for its first token.
        attention: by the number of heads.
    """

    shape: Shape
    lengths: tuple[int, ...]
    tokens: int
    new: int
    cache: str | None
    training: tuple[Group, ...]
    decoding: dict[int, tuple[Group, ...]]
    prompts: tuple[Group, ...]
    attention: dict[int, tuple[Group, ...]]


PRESET = Shape(16384, 256, 8, 8, 1024)
"""That of the presets `minillm-causal-10m`, `minillm-prefix-10m` and `minillm-alibi-10m`."""

BOTH = (DENSE, SPARSE)
PLANS = {
    "cpu": Plan(
        PRESET,
        (256, 1024),
        tokens=1024,
        new=64,
        cache=None,
        training=BOTH,
        decoding={1: (DECODING, SPARSE), 8: BOTH},
        prompts=(PROMPTS,),
        attention={8: (ATTENTION,)},
    ),
    "cuda": Plan(
        Shape(32000, 2048, 16, 16, 8192, tie_word_embeddings=False),
        (2048, 8192),
        tokens=16384,
        new=128,
        cache="static",
        training=TRAINING_ON_CUDA,
        decoding={1: (decoding_on_cuda(3.0, 0.6),), 16: (decoding_on_cuda(2.0, None),)},
        prompts=(decoding_on_cuda(1.0, None),),
        attention={16: attention_on_cuda(1 / 1.45), 32: attention_on_cuda(1 / 1.25)},
    ),
    "tiny": Plan(
        Shape(128, 32, 2, 2, 32),
        (32,),
        tokens=64,
        new=4,
        cache=None,
        training=BOTH,
        decoding={2: (DECODING, SPARSE)},
        prompts=(PROMPTS,),
        attention={2: (ATTENTION,)},
    ),
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
        return lambda: make_ready({contender.name: partial(make, contender) for contender in group.contenders})

    for length in plan.lengths:
        rows = plan.tokens // length

        def train(contender: Contender, rows: int = rows, length: int = length) -> Callable[[], object]:
            batches = batches_of(contender.model, rotating_ids(plan.shape, rows, length, device))
            return training_step(build(contender, plan.shape, device), batches)

        for group in plan.training:
            what = f"training step, {rows} x {length} tokens"
            yield Case(what, group, ready(group, train), plan.tokens)
        for heads, groups in plan.attention.items():
            shape = plan.shape._replace(num_attention_heads=heads)

            def attend(
                contender: Contender, rows: int = rows, length: int = length, shape: Shape = shape
            ) -> Callable[[], object]:
                return attention_layer(contender, shape, rotating_ids(shape, rows, length, device), device)

            for group in groups:
                what = f"attention layer, {rows} x {length} tokens, heads of {shape.hidden_size // heads}"
                yield Case(what, group, ready(group, attend), plan.tokens)

        def decode(contender: Contender, batch: int, new: int, length: int = length) -> Callable[[], object]:
            if contender == COPY:
                return copying(Contender(CAUSAL), plan.shape, device, new - 1)
            prompts = rotating_ids(plan.shape, batch, length - new, device)
            return decoding(build(contender, plan.shape, device), prompts, new, plan.cache, stopwatch)

        for group in plan.prompts:
            what = f"first token, after {length - 1} tokens"
            yield Case(what, group, ready(group, partial(decode, batch=1, new=1)), length - 1)
        for batch, groups in plan.decoding.items():
            for group in groups:
                what = f"decoding, batch {batch}, up to {length} tokens"
                run = partial(decode, batch=batch, new=plan.new)
                yield Case(what, group, ready(group, run), batch * (plan.new - 1))


def measure(options: Options, plan: Plan | None = None) -> dict[str, Any]:
    """Rows of medians and comparisons; what there was no time or memory for is named under `not_measured`."""
    plan = PLANS[options.size] if plan is None else plan
    stopwatch = Stopwatch(options.device, options.clock)
    result: dict[str, Any] = {"settings": plan.shape._asdict(), "rows": [], "comparisons": [], "not_measured": []}
    for case in cases(plan, options.device, stopwatch):
        if options.out_of_time():
            result["not_measured"].append({"what": case.what, "reason": "no time was left"})
            continue
        start_afresh()
        runs = case.prepare()
        times = interleave(runs, stopwatch, options)
        del runs
        for contender in case.group.contenders:
            name, values = contender.name, times.get(contender.name)
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
