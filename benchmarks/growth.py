"""How time and peak memory of a training step grow with length, batch, layers and vocabulary."""

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.models import Contender, Shape
from benchmarks.timing import Options
from benchmarks.training_worker import TrainingCase, run_cases

ON_CPU = tuple(Contender(name) for name in ("Llama", "Bloom", "MiniLLM causal", "MiniLLM prefix", "MiniLLM alibi"))
ON_CUDA = (
    Contender("Llama", "sdpa"),
    Contender("Bloom"),
    Contender("MiniLLM causal", "sdpa"),
    Contender("MiniLLM prefix", "flex_attention"),
    Contender("MiniLLM alibi", "flex_attention"),
)


@dataclass(frozen=True)
class Plan:
    """The point from which each axis grows by itself, and the values along each axis, in growing order."""

    shape: Shape
    batch: int
    axes: dict[str, tuple[int, ...]]
    contenders: tuple[Contender, ...]
    steps: int = 3


PLANS = {
    "cpu": Plan(
        Shape(4096, 128, 2, 4, 512),
        1,
        {
            "length": (256, 512, 1024, 2048, 4096, 8192),
            "batch": (1, 2, 4, 8, 16),
            "layers": (1, 2, 4, 8, 16),
            "vocabulary": (4096, 16384, 65536, 262144),
        },
        ON_CPU,
    ),
    "cuda": Plan(
        Shape(32768, 1024, 4, 16, 2048, tie_word_embeddings=False),
        1,
        {
            "length": (1024, 2048, 4096, 8192, 16384, 32768),
            "batch": (1, 2, 4, 8, 16),
            "layers": (1, 2, 4, 8, 16),
            "vocabulary": (32768, 65536, 131072, 262144),
        },
        ON_CUDA,
    ),
    "tiny": Plan(Shape(64, 16, 1, 2, 16), 1, {"length": (16, 32)}, (ON_CPU[0], ON_CPU[-1]), steps=1),
}


def case_at(plan: Plan, contender: Contender, axis: str, value: int) -> TrainingCase:
    fields = {"length": "length", "layers": "num_hidden_layers", "vocabulary": "vocab_size"}
    shape = plan.shape._replace(**({fields[axis]: value} if axis in fields else {}))
    return TrainingCase(contender, shape, value if axis == "batch" else plan.batch, shape.length, plan.steps)


def measure(options: Options) -> dict[str, Any]:
    """A row a point: median seconds, and the peak in bytes with weights and optimiser."""
    plan = PLANS[options.size]
    settings = {**plan.shape._asdict(), "batch": plan.batch}
    result: dict[str, Any] = {"settings": settings, "rows": [], "comparisons": [], "not_measured": []}
    for axis, values in plan.axes.items():
        for contender in plan.contenders:
            if options.out_of_time():
                lacking = {"what": axis, "contender": contender.name, "reason": "no time was left"}
                result["not_measured"].append(lacking)
                continue
            cases = [case_at(plan, contender, axis, value) for value in values]
            for value, told in zip(values, run_cases(cases, options.device, options.clock), strict=True):
                point = {"what": axis, "value": value, "contender": contender.name}
                if told is None:
                    result["not_measured"].append({**point, "reason": "the memory did not suffice"})
                    continue
                seconds, taken = told["seconds"], told["peak"] - told["start"]
                times = {"median": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}
                result["rows"].append({**point, "unit": "s", **times, "rounds": len(seconds), "peak_bytes": taken})
    return result
