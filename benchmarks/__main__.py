"""Speed and memory of MiniLLM, with transformers' own models as rivals in the same run.

    python -m benchmarks [all | speed | memory | growth | packing | blocks | startup | tokenizer | ...]
        [--out benchmarks/results] [--steps 10] [--tiny] [--clock wall] [--minutes 8]

Prints a table for each kind; with `--out` also leaves the tables, JSON with facts of the environment, and pictures.
Contenders take turns in every round, so that a drift of the machine's speed meets all of them; the figures are medians
over rounds and, for ratios, medians of the ratio within a round, with a bootstrap interval of 95 %. On CUDA the shapes
are larger and models run in bfloat16.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from benchmarks import blocks, collators, conversion, growth, memory, packing, speed, startup, tokenizer, train_command
from benchmarks.report import facts, load_average, markdown, write
from benchmarks.timing import CLOCKS, Options
from minillm.training.put_back import quiet, random_states_kept

KINDS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "speed": speed.measure,
    "memory": memory.measure,
    "growth": growth.measure,
    "packing": packing.measure,
    "blocks": blocks.measure,
    "startup": startup.measure,
    "tokenizer": tokenizer.measure,
    "collators": collators.measure_against_training,
    "conversion": conversion.measure_in_rounds,
    "train": train_command.measure,
}

NOTHING = {"rows": [], "comparisons": [], "not_measured": [{"what": "all of it", "reason": "no time was left"}]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "kinds", nargs="*", default="all", choices=["all", *KINDS], help="what to measure; left out: all"
    )
    parser.add_argument("--out", type=Path, help="folder for tables, JSON and pictures; left out: nothing is written")
    parser.add_argument("--steps", type=int, default=10, help="timed rounds after one warm-up round")
    parser.add_argument("--tiny", action="store_true", help="shapes that take seconds, to see that everything runs")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on CPU: wall, or the process's own time")
    parser.add_argument("--minutes", type=float, help="begin nothing more after so long, and say what is left out")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    return options


@quiet()
@random_states_kept()
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=False)
def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measures, prints and writes; returns the result of each kind."""
    given = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(given.steps, device, given.tiny, given.clock, given.minutes)
    results = {}
    for kind in KINDS if "all" in given.kinds else dict.fromkeys(given.kinds):
        before = facts(options)
        result = NOTHING if options.out_of_time() else KINDS[kind](options)
        results[kind] = {"environment": {**before, "load_after": load_average()}, **result}
        print(f"## {kind}\n\n{markdown(kind, results[kind])}", flush=True)
        if given.out is not None:
            write(given.out, kind, results[kind])
    return results


if __name__ == "__main__":
    main()
