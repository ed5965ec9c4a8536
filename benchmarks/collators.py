"""Speed and padding of the collators on one core.

    python -m benchmarks.collators [--documents 4000] [--length 1024] [--json results.json]

Documents of made-up ids, with log-normal lengths (median 148 tokens), are packed beforehand; what is timed is the work
in a training: rows to tensors, and `pack_dataset` apart. Tokens are those of the documents, before blanks are cut out.
The figures are medians over rounds, in each of which every collator takes its turn.
"""

import argparse
import json
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.models import Contender, build, rotating_ids
from benchmarks.speed import PLANS
from benchmarks.steps import batches_of, training_step
from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, summarise
from minillm.training import (
    DataCollatorForCausalLM,
    DataCollatorForGLM,
    DataCollatorForPrefixLM,
    DocumentCollator,
    pack_dataset,
)
from minillm.training.put_back import thread_count_kept

VOCABULARY = 32_000
# Ids 0 to 5 are special; these end sentences, one in some twenty tokens.
ENDS = range(6, 1606)


def collators(length: int) -> dict[str, DocumentCollator]:
    ids = ("pad", "mask", "smask", "gmask", "sop", "eop")
    tokens = {f"{name}_token_id": number for number, name in enumerate(ids)}
    glm = {"max_length": length, "sentence_end_token_ids": ENDS, **tokens}
    kinds = ("token", "sentence", "document")
    return {
        "causal": DataCollatorForCausalLM(max_length=length, pad_token_id=0),
        "prefix": DataCollatorForPrefixLM(max_length=length, pad_token_id=0),
        "GLM": DataCollatorForGLM(**glm),
        **{f"GLM, {kind}": DataCollatorForGLM(mixture={kind: 1.0}, **glm) for kind in kinds},
    }


def made_up_documents(count: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(5.0, 1.0, count).astype(int))
    return [{"input_ids": rng.integers(6, VOCABULARY, length).tolist()} for length in lengths]


def one_round(collator: DocumentCollator, rows: list[Any], batch_size: int) -> tuple[float, float]:
    """Seconds for all rows, and the part of the tensors that is padding."""
    real = slots = 0
    start = time.perf_counter()
    batches = [collator(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
    elapsed = time.perf_counter() - start
    for batch in batches:
        real += int(batch["attention_mask"].sum())
        slots += batch["attention_mask"].numel()
    return elapsed, 1 - real / slots


def measure(documents: list[dict[str, list[int]]], length: int, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """One row a collator: tokens per second, of packing too, and padding."""
    tokens = sum(len(document["input_ids"]) for document in documents)
    contenders, times, paddings, packing, packed = collators(length), {}, {}, {}, {}
    for name, collator in contenders.items():
        start = time.perf_counter()
        packed[name] = pack_dataset(documents, collator)
        packing[name] = time.perf_counter() - start
    for _ in range(rounds):
        for name, collator in contenders.items():
            elapsed, paddings[name] = one_round(collator, packed[name], batch_size)
            times.setdefault(name, []).append(elapsed)
    return [
        {
            "collator": name,
            "tokens_per_second": tokens / statistics.median(times[name]),
            "packing_tokens_per_second": tokens / packing[name],
            "padding": paddings[name],
        }
        for name in contenders
    ]


def measure_against_training(options: Options) -> dict[str, Any]:
    """Tokens per second that each collator makes on one core, and those that training of the smallest preset takes."""
    plan, name = PLANS[options.size], "MiniLLM causal"
    rows, length = max(1, plan.tokens // plan.lengths[-1]), plan.lengths[-1]
    documents = made_up_documents(40 if options.tiny else 1000)
    tokens = sum(len(document["input_ids"]) for document in documents)
    runs, of_run = {}, {"training step": rows * length}
    for kind, collator in collators(length).items():
        packed = pack_dataset(documents, collator)
        runs[kind] = lambda collator=collator, packed=packed: one_round(collator, packed, 16)
        of_run[kind] = tokens
    ids = rotating_ids(plan.shape, rows, length, options.device)
    runs["training step"] = training_step(build(Contender(name), plan.shape, options.device), batches_of(name, ids))
    times = interleave(runs, Stopwatch(options.device, options.clock), options)
    what = f"batches of rows of {length} tokens"
    result: dict[str, Any] = {"settings": plan.shape._asdict(), "rows": [], "comparisons": [], "not_measured": []}
    for kind, values in times.items():
        summary = summarise(values)
        speed = {"tokens_per_second": of_run[kind] / summary["median"]}
        result["rows"].append({"what": what, "contender": kind, "unit": "s", **summary, **speed})
    each = {kind: [value / of_run[kind] for value in values] for kind, values in times.items()}
    for kind in list(times)[:-1]:
        result["comparisons"] += compare(what, each, Comparison(kind, "training step", at_least=1.0))
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collators", description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the rows and the facts of the environment")
    options = parser.parse_args(arguments)
    for name in ("documents", "batch_size", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    with thread_count_kept():
        torch.set_num_threads(1)
        rows = measure(made_up_documents(options.documents), options.length, options.batch_size, options.rounds)
    print(f"| {'collator':13} | tokens/s | tokens/s of packing | padding |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['collator']:13} | {row['tokens_per_second']:,.0f} | {row['packing_tokens_per_second']:,.0f} "
            f"| {100 * row['padding']:.1f} % |"
        )
    if options.json:
        facts = {"numpy": np.__version__, "machine": platform.machine(), **vars(options)}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"environment": facts, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
