"""Attention in blocks on CPU: transformers' own models beside their SDPA and eager attention, MiniLLM beside Llama."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.models import Contender, Shape, build, rotating_ids, start_afresh
from benchmarks.steps import decoding, training_step
from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, make_ready, summarise
from benchmarks.training_worker import TrainingCase, run_cases

BLOCKS = "minillm_blocks"
FAMILIES = ("Llama", "Qwen3", "Gemma3")
OWN = "MiniLLM causal"
PLAIN, PADDED, PACKED, DECODING = "plain", "padded", "packed", "decoding"


class Case(NamedTuple):
    """`rows` x `length` tokens to train on; with `DECODING` a prompt and as many new tokens.

    Args:
        at_least: the ratio to hold against SDPA.
        most_rounds: for what takes long; the eager attention of as many tokens is left out.
        shape: if it is not the plan's; of Llama alone.
    """

    way: str
    rows: int
    length: int
    at_least: float | None
    most_rounds: int | None = None
    shape: Shape | None = None

    @property
    def what(self) -> str:
        size = "" if self.shape is None else f", {self.shape.num_hidden_layers} layers of {self.shape.hidden_size}"
        return f"{self.way}, {self.rows} x {self.length:,} tokens{size}"


class Plan(NamedTuple):
    """`memory`: lengths of a packed row whose peaks are compared."""

    shape: Shape
    cases: tuple[Case, ...]
    families: tuple[str, ...]
    memory: tuple[int, ...]


PLANS = {
    "cpu": Plan(
        Shape(512, 256, 4, 8, 8192),
        (
            Case(PLAIN, 4, 512, 0.98),
            Case(PLAIN, 1, 2048, 0.98),
            Case(PADDED, 4, 512, 0.98),
            Case(PACKED, 4, 512, None),
            Case(PACKED, 1, 2048, 2.0),
            Case(PACKED, 1, 8192, None, most_rounds=3),
            # The width, depth and vocabulary of SmolLM2-135M.
            Case(PACKED, 1, 2048, None, most_rounds=3, shape=Shape(49152, 576, 30, 9, 2048)),
            Case(DECODING, 1, 256, 0.98),
        ),
        FAMILIES,
        (2048, 4096, 8192),
    ),
    "tiny": Plan(
        Shape(64, 32, 1, 2, 192),
        (Case(PACKED, 1, 160, None), Case(PADDED, 2, 160, None, most_rounds=1), Case(DECODING, 1, 4, None)),
        FAMILIES,
        (),
    ),
}


def document_lengths(length: int) -> list[int]:
    """Log-normal, with a median of 250 tokens, that fill a row."""
    draws = np.random.default_rng(0).lognormal(np.log(250), 1.0, length).clip(8, length).astype(int)
    lengths = draws[: int(np.searchsorted(np.cumsum(draws), length)) + 1].tolist()
    lengths[-1] -= sum(lengths) - length
    return lengths


def batches(case: Case, shape: Shape) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of one text, of documents, or of texts from half the length on with padding behind them."""
    ids = rotating_ids(shape, case.rows, case.length, "cpu")
    more: dict[str, torch.Tensor] = {}
    if case.way == PACKED:
        positions = torch.cat([torch.arange(length) for length in document_lengths(case.length)])
        more = {"position_ids": positions.expand(case.rows, -1)}
    elif case.way == PADDED:
        lengths = torch.linspace(case.length, case.length / 2, case.rows).long()
        more = {"attention_mask": (torch.arange(case.length) < lengths[:, None]).long()}
    hidden = more.get("attention_mask", torch.ones(1)) == 0
    return cycle(
        [{"input_ids": own, "labels": own.masked_fill(hidden, -100), **more} for own in (next(ids), next(ids))]
    )


def prepare(case: Case, contender: Contender, shape: Shape, stopwatch: Stopwatch) -> Callable[[], None]:
    model = build(contender, shape, "cpu")
    if case.way == DECODING:
        return decoding(model, rotating_ids(shape, case.rows, case.length, "cpu"), case.length, None, stopwatch)
    return training_step(model, batches(case, shape))


def contenders_of(family: str, case: Case) -> tuple[Contender, ...]:
    """The first is held to the second."""
    own, rival = Contender(family, BLOCKS), Contender(family, "sdpa")
    if family == OWN:
        # It runs in blocks by itself.
        own, rival = Contender(OWN), Contender("Llama", "sdpa")
    return (own, rival) if case.most_rounds else (own, rival, own._replace(attention="eager"))


def measure_memory(plan: Plan, options: Options, result: dict[str, Any]) -> None:
    """Peaks of a step on one packed row, with weights and optimiser taken off."""
    taken: dict[str, list[float]] = {}
    contenders = [Contender("Llama", BLOCKS), Contender("Llama", "sdpa")] if plan.memory else []
    for contender in contenders:
        cases = [TrainingCase(contender, plan.shape, 1, length, 1, documents=256) for length in plan.memory]
        told = run_cases(cases, "cpu", options.clock)
        taken[contender.name] = [float(one["peak"] - one["before"]) for one in told if one is not None]
        for length, peak in zip(plan.memory, taken[contender.name], strict=False):
            row = {"what": f"memory, packed, 1 x {length:,} tokens", "contender": contender.name, "unit": "B"}
            result["rows"].append({**row, **summarise([peak])})


def measure(options: Options) -> dict[str, Any]:
    """Training steps and decoding; on CPU alone, for which the blocks are."""
    plan = PLANS["tiny" if options.tiny else "cpu"]
    result: dict[str, Any] = {"settings": plan.shape._asdict(), "rows": [], "comparisons": [], "not_measured": []}
    if options.device != "cpu" and not options.tiny:
        result["not_measured"].append({"what": "all of it", "reason": "attention in blocks is for CPU"})
        return result
    stopwatch = Stopwatch("cpu", options.clock)
    for case in plan.cases:
        shape = case.shape or plan.shape
        for family in (*plan.families, OWN) if case.shape is None else plan.families[:1]:
            contenders = contenders_of(family, case)
            if options.out_of_time():
                result["not_measured"].append({"what": case.what, "contender": family, "reason": "no time was left"})
                continue
            start_afresh()
            makers = {each.name: partial(prepare, case, each, shape, stopwatch) for each in contenders}
            rounds = min(options.steps, case.most_rounds or options.steps)
            times = interleave(make_ready(makers), stopwatch, dataclasses.replace(options, steps=rounds))
            for name, values in times.items():
                summary = summarise(values)
                speed = {"tokens_per_second": case.rows * case.length / summary["median"]}
                result["rows"].append({"what": case.what, "contender": name, "unit": "s", **summary, **speed})
            own, *rivals = (each.name for each in contenders)
            result["comparisons"] += compare(case.what, times, Comparison(own, rivals[0], at_least=case.at_least))
            for rival in rivals[1:]:
                result["comparisons"] += compare(case.what, times, Comparison(own, rival))
    measure_memory(plan, options, result)
    return result
