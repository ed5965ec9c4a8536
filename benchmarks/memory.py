"""Peak memory of a training step with a large vocabulary, where logits outweigh everything else."""

from dataclasses import dataclass
from typing import Any

from benchmarks.models import Contender, Shape
from benchmarks.timing import Comparison, Options, compare, summarise
from benchmarks.training_worker import TrainingCase, run_cases


@dataclass(frozen=True)
class Plan:
    """The shape, the batch, how many processes measure each contender, and the contenders' names."""

    shape: Shape
    rows: int
    length: int
    repeats: int
    names: tuple[str, ...] = ("Llama", "MiniLLM causal", "MiniLLM prefix", "MiniLLM alibi")


PLANS = {
    "cpu": Plan(Shape(128_000, 128, 2, 4, 1024), 8, 1024, 2),
    "cuda": Plan(Shape(128_000, 2048, 8, 16, 1024, tie_word_embeddings=False), 8, 1024, 1),
    "tiny": Plan(Shape(65_536, 32, 2, 2, 128), 8, 128, 1, ("Llama", "MiniLLM causal")),
}


def measure(options: Options) -> dict[str, Any]:
    """Bytes that a training step takes on top of weights and optimiser: the peak less what was there before it."""
    plan = PLANS[options.size]
    what = f"training step, {plan.rows} x {plan.length} tokens, vocabulary {plan.shape.vocab_size:,}"
    result: dict[str, Any] = {"settings": plan.shape._asdict(), "rows": [], "comparisons": [], "not_measured": []}
    taken: dict[str, list[float]] = {name: [] for name in plan.names}
    seconds: dict[str, list[float]] = {name: [] for name in plan.names}
    for _ in range(min(plan.repeats, options.steps)):
        for name in plan.names:
            case = TrainingCase(Contender(name), plan.shape, plan.rows, plan.length)
            [told] = run_cases([case], options.device, options.clock)
            if told is not None:
                taken[name].append(told["peak"] - told["before"])
                seconds[name] += told["seconds"]
    for name in plan.names:
        if not taken[name]:
            result["not_measured"].append({"what": what, "contender": name, "reason": "the memory did not suffice"})
            continue
        result["rows"] += [
            {"what": f"{what}: memory", "contender": name, "unit": "B", **summarise(taken[name])},
            {"what": f"{what}: time", "contender": name, "unit": "s", **summarise(seconds[name])},
        ]
    for name in plan.names[1:]:
        result["comparisons"] += compare(what, taken, Comparison(name, "Llama", at_most=1 / 3), "memory")
    return result
