"""transformers' own common tests on MiniLLM: what Llama passes in the same run must pass here too, or be meant.

    python tests/support/transformers_common.py [--folder FOLDER]

Downloads the source distribution of the installed transformers with pip, and runs the tests that it holds; some of
those in transformers' repository are not distributed. At fault is a test that fails here and not for Llama, and one
that is skipped here and runs for Llama. Exits with 1 where there is a fault, or nothing left of a fault that is meant.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import transformers

LONGEST = 600
BASELINE, VARIANTS = "Llama", ("Causal", "Prefix", "Alibi")


class Meant(NamedTuple):
    """A fault that is meant: patterns of the test, of the variant and of what it ends with; and why that is meant."""

    test: str
    variant: str
    ending: str
    why: str


MEANT = (
    Meant(
        "test_output_router_logits_from_config",
        ".*",
        "which has no router",
        "router logits are refused by a model without a router; Llama has no field for them",
    ),
    Meant(
        "test_capture_outputs_decorator",
        ".*",
        "which returns no probabilities|which has no router|`output_router_logits=True` in a task head",
        "it asks for all that the class can record: SDPA has no probabilities, these variants and heads no router",
    ),
    Meant(
        "test_model_rope_.*",
        "Alibi",
        "no rotary embedding|no standardized RoPE|'NoneType' is not iterable",
        "a model without RoPE has no rope_parameters, and refuses them",
    ),
    Meant(
        "test_feed_forward_chunking",
        ".*",
        "`chunk_size_feed_forward=1` has no meaning",
        "nothing here reads this field, and what is not read is refused; Llama passes it over in silence",
    ),
    Meant(
        "test_eager_matches_batched_and_grouped_inference.*",
        ".*",
        "Expected 'mock' to have been called",
        "the class can have experts, these variants have none; Llama's class has none, so that it is passed over",
    ),
)


class Outcome(NamedTuple):
    """What became of a test: passed, failed or skipped; why, of each part; and the parts of it that were skipped."""

    kind: str
    why: tuple[str, ...]
    skipped: frozenset[str]


def fetch_tests(folder: Path) -> Path:
    """The folder of the tests in the source distribution of the installed version, downloaded unless it is there.

    Raises:
        subprocess.CalledProcessError: where pip finds no such distribution.
        FileNotFoundError: where that holds no tests.
    """
    tests = folder / "transformers_tests"
    if tests.exists():
        return tests
    wanted = f"transformers=={transformers.__version__}"
    options = ("--no-deps", "--no-binary", "transformers", "--dest", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, wanted], check=True)
    [archive] = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = re.compile(r"[^/]+/tests/")
        members = [member for member in packed.getmembers() if inside.match(member.name)]
        if not members:
            raise FileNotFoundError(f"{archive.name} holds no tests")
        for member in members:
            member.name = inside.sub("", member.name)
        packed.extractall(tests, members, filter="data")
    # It is a package in transformers' repository.
    (tests / "__init__.py").touch()
    return tests


def run_contender(tests: Path, contender: str) -> tuple[dict[str, Outcome], list[str]]:
    """The outcome of each test, and the modules that were not distributed."""
    cases, results = Path(__file__).with_name("transformers_cases.py"), tests.with_name(f"{contender}.json")
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Those that need several processes are ours: tests/training/test_tensor_parallel.py.
    environment |= {"RUN_TENSOR_PARALLEL_TESTS": "0"}
    done = subprocess.run(
        [sys.executable, str(cases), str(tests), contender, str(results)],
        env={**os.environ, **environment},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{cases.name} ended with {done.returncode} for {contender}:\n{done.stderr[-3000:]}")
    found = json.loads(results.read_text("utf-8"))
    rows: dict[str, list[list[str]]] = {}
    for name, *row in found["rows"]:
        rows.setdefault(name, []).append(row)
    return {name: outcome_of(parts) for name, parts in rows.items()}, found["undistributed"]


def outcome_of(rows: list[list[str]]) -> Outcome:
    """Of a test, from what became of it and of its parts."""
    skipped = frozenset(part for part, kind, _ in rows if kind == "skipped")
    for wanted in ("failed", "passed", "skipped"):
        found = tuple(f"{part} {why}".strip() for part, kind, why in rows if kind == wanted)
        if found:
            return Outcome(wanted, found, skipped)
    raise AssertionError("a test without an outcome")


def faults_of(found: dict[str, Outcome], expected: dict[str, Outcome]) -> dict[str, list[str]]:
    """The tests that go worse for this variant than for Llama, and how each part does."""
    faults = {}
    for name, usual in expected.items():
        own = found[name]
        if usual.kind == "failed":
            continue
        if own.kind == "failed" or (own.kind == "skipped" and usual.kind == "passed"):
            faults[name] = [f"{own.kind}: {why}" for why in own.why]
        elif own.skipped - usual.skipped:
            faults[name] = [f"skipped: {part}" for part in sorted(own.skipped - usual.skipped)]
    return faults


def why_meant(variant: str, name: str, faults: list[str]) -> Meant | None:
    """The entry of `MEANT` that all faults in a test of a variant fall under, or None."""
    for entry in MEANT:
        named = re.fullmatch(entry.test, name) and re.fullmatch(entry.variant, variant)
        if named and all(re.search(entry.ending, fault) for fault in faults):
            return entry
    return None


def report(results: dict[str, tuple[dict[str, Outcome], list[str]]]) -> bool:
    """Prints counts of each contender, and the faults that are not meant; whether there are any."""
    usual, undistributed = results[BASELINE]
    print(f"transformers {transformers.__version__}; not in its source distribution, and left out:")
    print(f"  {', '.join(sorted(undistributed))}")
    print(f"{'':8}{'passed':>8}{'failed':>8}{'skipped':>9}{'meant':>7}{'faults':>8}")
    wrong, needed = [], set()
    for contender, (found, _) in results.items():
        counts = Counter(outcome.kind for outcome in found.values())
        faults = faults_of(found, usual)
        meant = {name: entry for name, how in faults.items() if (entry := why_meant(contender, name, how))}
        needed.update(meant.values())
        wrong += [f"{contender}.{name}: {'; '.join(how)}" for name, how in faults.items() if name not in meant]
        numbers = counts["passed"], counts["failed"], counts["skipped"], len(meant), len(faults) - len(meant)
        print("{:8}{:8}{:8}{:9}{:7}{:8}".format(contender, *numbers))
    # An older version may lack the test.
    stale = [entry for entry in MEANT if entry not in needed and any(re.fullmatch(entry.test, name) for name in usual)]
    wrong += [f"{entry.test} of {entry.variant} is no such fault any more: take it off the list" for entry in stale]
    for fault in wrong:
        print(fault[:LONGEST])
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep what is downloaded here, and use what is there")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) if folder is None else folder.resolve() / transformers.__version__
        home.mkdir(parents=True, exist_ok=True)
        tests = fetch_tests(home)
        contenders = (BASELINE, *VARIANTS)
        with ThreadPoolExecutor(2) as pool:
            results = dict(zip(contenders, pool.map(lambda name: run_contender(tests, name), contenders), strict=True))
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
