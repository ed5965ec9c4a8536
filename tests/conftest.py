"""One torch thread per worker, no hub, poisoned memory, and a guard against a second copy of the package."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import sys
import zlib
from datetime import date
from pathlib import Path

import deprecations
import pytest
import random_cases
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

ROOMS = {path.parent.name for path in Path(__file__).parents[1].glob("*/__init__.py")}

torch.set_num_threads(1)
random_cases.register_profiles()


@pytest.fixture
def poisoned_memory():
    """Fills fresh tensors with NaN, so that reading uninitialised memory shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def without_bars():
    """Bars share a lock with forked processes: one that is killed may keep it."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def trackio_runs(tmp_path_factory):
    """The folder in which trackio keeps its databases; it asks for it when it is imported."""
    assert "trackio" not in sys.modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("runs")))
        import trackio

        yield trackio.utils.TRACKIO_DIR


@pytest.fixture(autouse=True)
def one_copy_of_the_package():
    """The folders of the repository must be imported as `minillm` only."""
    yield
    second = ROOMS & set(sys.modules)
    assert not second, f"imported from the repository root instead of as minillm.*: {sorted(second)}"


@pytest.fixture(autouse=True)
def attention_functions_of_transformers():
    """A test must not leave an attention function of its own to those after it."""
    yield
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping, "give attention functions back: setitem on `_local_mapping`"


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, help="run one test in so many, drawn anew each day")
    parser.addoption("--deprecations", action="store_true", help="fail where transformers says a name is deprecated")


def pytest_configure(config):
    if config.getoption("--deprecations"):
        deprecations.turn_into_failures()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # Of some cases, or of those that failed last, nothing tells whether the others are there.
    whole_files = not (config.getoption("lf") or any("::" in argument for argument in config.args))
    mark_thorough_cases(items, whole_files)
    part = config.getoption("--one-in")
    if part > 1:
        # Other ones each day.
        drawn = [item for item in items if zlib.crc32(f"{date.today()} {item.nodeid}".encode()) % part == 0]
        config.hook.pytest_deselected(items=[item for item in items if item not in drawn])
        items[:] = drawn
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def mark_thorough_cases(items, whole_files):
    """Before pytest looks at `-m`: the cases that `mostly_thorough` does not name become thorough."""
    seen = {}
    for item in items:
        if (mark := item.get_closest_marker("mostly_thorough")) is not None:
            seen.setdefault((item.parent.nodeid, item.originalname), (set(mark.args), set()))[1].add(item.callspec.id)
            if item.callspec.id not in mark.args:
                item.add_marker(pytest.mark.thorough)
    for (place, name), (kept, ids) in seen.items():
        if whole_files and not kept <= ids:
            raise pytest.UsageError(f"{place}::{name} has no case {sorted(kept - ids)}; it has {sorted(ids)}")
