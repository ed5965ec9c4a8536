"""Peak memory of a training step with a large vocabulary, where logits outweigh everything else; on CUDA of long texts
too, where attention does."""

from typing import Any, NamedTuple

from benchmarks.models import Contender, Shape
from benchmarks.timing import Comparison, Options, compare, summarise
from benchmarks.training_worker import TrainingCase, run_cases


class Case(NamedTuple):
    """Rows of tokens that contenders train on.

    Args:
        repeats: how many processes measure each contender.
        of_step: what the step takes on top of weights and optimiser; False: the peak with them.
    """

    shape: Shape
    rows: int
    length: int
    contenders: tuple[Contender, ...]
    comparisons: tuple[Comparison, ...] = ()
    repeats: int = 1
    of_step: bool = True


NAMES = ("Llama", "MiniLLM causal", "MiniLLM prefix", "MiniLLM alibi")
PLAIN = tuple(Contender(name) for name in NAMES)
A_THIRD = tuple(Comparison(name, "Llama", at_most=1 / 3) for name in NAMES[1:])

BILLION = Shape(32000, 2048, 16, 16, 32768, tie_word_embeddings=False)
COMPILED = tuple(Contender(name, "flex_attention", compiled=True) for name in NAMES)
BLOOM, MPT = Contender("Bloom", compiled=True), Contender("MPT")

PLANS = {
    "cpu": (Case(Shape(128_000, 128, 2, 4, 1024), 8, 1024, PLAIN, A_THIRD, repeats=2),),
    "cuda": (
        Case(Shape(128_000, 2048, 8, 16, 1024, tie_word_embeddings=False), 8, 1024, PLAIN, A_THIRD),
        Case(
            BILLION,
            8,
            2048,
            (BLOOM, COMPILED[3]),
            (Comparison(COMPILED[3].name, BLOOM.name, at_most=0.5),),
            of_step=False,
        ),
        *(Case(BILLION, 1, length, (*COMPILED, BLOOM, MPT), of_step=False) for length in (8192, 32768)),
    ),
    "tiny": (Case(Shape(65_536, 32, 2, 2, 128), 8, 128, PLAIN[:2], A_THIRD[:1]),),
}


def measure(options: Options) -> dict[str, Any]:
    """Peak bytes and seconds; who has no row did not find memory enough, or time."""
    cases = PLANS[options.size]
    settings = {"shapes": [case.shape._asdict() for case in cases]}
    result: dict[str, Any] = {"settings": settings, "rows": [], "comparisons": [], "not_measured": []}
    for case in cases:
        what = f"training step, {case.rows} x {case.length} tokens, vocabulary {case.shape.vocab_size:,}"
        names = [contender.name for contender in case.contenders]
        taken: dict[str, list[float]] = {name: [] for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        lacking: dict[str, str] = {}
        for index in range(min(case.repeats, options.steps)):
            if index and options.out_of_time():
                break
            for contender in case.contenders:
                name = contender.name
                if not index and options.out_of_time():
                    lacking[name] = "no time was left"
                if name in lacking:
                    continue
                # The first step of a compiled one is its compiler's.
                step = TrainingCase(contender, case.shape, case.rows, case.length, 2 if contender.compiled else 1)
                [told] = run_cases([step], options.device, options.clock)
                if told is None:
                    lacking[name] = "the memory did not suffice"
                    taken[name].clear()
                    continue
                taken[name].append(told["peak"] - (told["before"] if case.of_step else told["start"]))
                seconds[name] += told["seconds"]
        for name in names:
            if not taken[name]:
                result["not_measured"].append({"what": what, "contender": name, "reason": lacking[name]})
                continue
            result["rows"] += [
                {"what": f"{what}: memory", "contender": name, "unit": "B", **summarise(taken[name])},
                {"what": f"{what}: time", "contender": name, "unit": "s", **summarise(seconds[name])},
            ]
        for comparison in case.comparisons:
            result["comparisons"] += compare(what, taken, comparison, "memory")
    return result
