"""Packing into memory and into a folder: time, peak memory, and what a token takes.

    python -m benchmarks.rows_on_disk [--tokens 100000000] [--in-memory 10000000] [--folder DIR] [--json results.json]

A stream makes documents up, with log-normal lengths (median 148 tokens) and as lists of Python ints; making them is a
part of the time. Each way has a process of its own, whose peak counts from its start: interpreter and imports are in
it. Times are the process's own, so that others on the machine disturb them less. The files are deleted again.
"""

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training_worker import current_memory, peak_memory
from minillm.data import PackedRows
from minillm.experiments.reporting import environment, markdown_table, number
from minillm.training import DataCollatorForCausalLM, DataCollatorForPrefixLM, pack_dataset

VOCABULARY = 32_000
MEMORY, DISK, FIXED = "in memory", "in a folder", "in a folder, fixed prefixes"
LOOKS = 5_000
"""Rows that are read at random."""


def made_up_documents(tokens: int) -> Iterator[dict[str, list[int]]]:
    """Documents of so many tokens together, the last of them cut."""
    rng = np.random.default_rng(0)
    while tokens:
        for length in np.maximum(2, rng.lognormal(5.0, 1.0, 1000).astype(int)).tolist():
            length = min(length, tokens)
            tokens -= length
            if length:
                yield {"input_ids": rng.integers(6, VOCABULARY, length).tolist()}


def run(way: str, tokens: int, length: int, folder: str | None) -> dict[str, Any]:
    """Packs, then reads rows at random; to be called in a fresh process."""
    torch.set_num_threads(1)
    kind = DataCollatorForPrefixLM if way == FIXED else DataCollatorForCausalLM
    collator = kind(max_length=length, pad_token_id=0)
    # Whatever is imported or allocated once.
    pack_dataset(list(made_up_documents(10_000)), collator)
    before, start = current_memory("cpu"), time.process_time()
    if way == MEMORY:
        rows = pack_dataset(list(made_up_documents(tokens)), collator)
        packing = time.process_time() - start
        gc.collect()
        size, real = current_memory("cpu") - before, sum(len(row["input_ids"]) for row in rows)
    else:
        rows = pack_dataset(made_up_documents(tokens), collator, fixed_prefixes=way == FIXED, folder=folder)
        packing = time.process_time() - start
        size, real = sum(path.stat().st_size for path in Path(folder).iterdir()), rows.num_tokens
    peak = peak_memory("cpu")
    if isinstance(rows, PackedRows):
        rows = PackedRows(folder)
    places = np.random.default_rng(1).integers(len(rows), size=LOOKS).tolist()
    start = time.process_time()
    batches = [collator(rows[first:last]) for first, last in ((place, place + 1) for place in places)]
    reading = time.process_time() - start
    read = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {
        "way": way,
        "tokens": real,
        "rows": len(rows),
        "padding": 1 - real / (len(rows) * length),
        "bytes_per_token": size / real,
        "bytes_before": before,
        "peak_bytes": peak,
        "seconds": packing,
        "tokens_per_second": real / packing,
        "batched_tokens_per_second": read / reading,
    }


def measure(ways: dict[str, int], length: int, parent: str | None) -> list[dict[str, Any]]:
    """One row a way, which packs so many tokens."""
    found = []
    for way, tokens in ways.items():
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(dir=parent) as folder, ProcessPoolExecutor(1, mp_context=context) as pool:
            found.append(pool.submit(run, way, tokens, length, folder).result())
    return found


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "rows",
        "tokens",
        "bytes a token",
        "peak memory",
        "tokens/s of packing",
        "tokens/s of batches",
        "padding",
    )
    lines = [
        (
            row["way"],
            f"{row['tokens']:,}",
            number(row["bytes_per_token"]),
            f"{number(row['peak_bytes'] / 1e9)} GB",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['batched_tokens_per_second']:,.0f}",
            f"{100 * row['padding']:.2f} %",
        )
        for row in rows
    ]
    return markdown_table(columns, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows_on_disk", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000, help="to pack into a folder")
    parser.add_argument("--in-memory", type=int, default=10_000_000, help="tokens to pack into memory")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--folder", help="where the files go for the time; left out: the system's place for such")
    parser.add_argument("--json", help="file for the rows and the facts of the environment")
    options = parser.parse_args(arguments)
    for name in ("tokens", "in_memory"):
        if getattr(options, name) < 2:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 2")
    ways = {MEMORY: options.in_memory, DISK: options.tokens, FIXED: options.tokens}
    rows = measure(ways, options.length, options.folder)
    facts = environment()
    print(table(rows))
    print(f"\n{facts['date']}, {facts['system']}, {facts['cores']} cores, Python {facts['python']}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"environment": {**facts, **vars(options)}, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
