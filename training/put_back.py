"""What a function changes for a while and puts back, also when an error ends it: modes, random states, threads, logs.

A model or a process belongs to the caller, whose settings are the same after a call as before it.
"""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model evaluates, without gradients; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        # Parents come before their children. Called, and not assigned: a module may do more in `train` than note it.
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python, NumPy and torch (CPU and CUDA) draw on afterwards as if nothing had been drawn or seeded meanwhile."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        # Named, since torch warns of several devices where they are not.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def thread_count_kept() -> Iterator[None]:
    """torch has as many threads afterwards as before."""
    count = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(count)


@contextmanager
def without_bars(hub: bool = False) -> Iterator[None]:
    """No progress bars of transformers.

    Args:
        hub: keep those of downloads and uploads, where they are shown.
    """
    had_bars, had_hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    set_bars(False, hub and had_hub_bars)
    try:
        yield
    finally:
        set_bars(had_bars, had_hub_bars)


def set_bars(shown: bool, hub_shown: bool) -> None:
    with warnings.catch_warnings():
        # Where an environment variable decides on the hub's bars, each call says that it is in vain.
        warnings.simplefilter("ignore", UserWarning)
        # transformers' switch moves the hub's as well.
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        (enable_progress_bars if hub_shown else disable_progress_bars)()


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers and no lines of its log but errors."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(level)
