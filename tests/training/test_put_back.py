"""Whatever a function changes for a while is as before after it, however it ends."""

import random
import sys
from itertools import product

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from stranger_cases import tiny
from transformers import set_seed
from transformers.utils import logging

import minillm.cli.demo as demo
import minillm.cli.generation_run as generation_run
import minillm.cli.training_run as training_run
from benchmarks import __main__ as benchmarks
from minillm.cli.console import one_line_errors
from minillm.cli.progress import fastest_thread_count
from minillm.training.put_back import quiet, random_states_kept, set_bars, thread_count_kept, without_bars


@pytest.fixture
def bars():
    """Bars may be switched; afterwards they are as before."""
    before = bar_states()
    yield
    set_bars(*before)


def bar_states():
    return logging.is_progress_bar_enabled(), not are_progress_bars_disabled()


def draws():
    """The next number of each generator, which are left where they are."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    found = random.random(), np.random.rand(), torch.rand(()).item()
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torchs)
    return found


class Stopped(Exception):
    pass


def stop(*args, **kwargs):
    """What a command does to its process, and an end in the middle of it."""
    set_seed(5)
    random.random(), np.random.rand(), torch.rand(3)
    torch.set_num_threads(torch.get_num_threads() + 1)
    raise Stopped


@pytest.mark.parametrize("kept", [random_states_kept, thread_count_kept, quiet, without_bars])
@pytest.mark.parametrize("fails", [False, True], ids=["well", "by-an-error"])
def test_all_is_as_before(kept, fails):
    def state():
        of = {
            random_states_kept: draws,
            thread_count_kept: torch.get_num_threads,
            quiet: lambda: (logging.get_verbosity(), *bar_states()),
            without_bars: bar_states,
        }
        return of[kept]()

    before = state()
    with thread_count_kept(), random_states_kept():
        try:
            with kept():
                set_seed(5)
                torch.set_num_threads(torch.get_num_threads() + 1)
                assert state() != before
                if fails:
                    raise Stopped
        except Stopped:
            pass
        if kept in (random_states_kept, thread_count_kept):
            assert state() == before
    assert state() == before


@pytest.mark.parametrize(("shown", "hub_shown"), product([True, False], repeat=2))
def test_bars_are_two_switches(bars, shown, hub_shown):
    set_bars(shown, hub_shown)
    for keeps, inside in ((quiet, (False, False)), (one_line_errors, (False, hub_shown))):
        with keeps():
            assert bar_states() == inside
        assert bar_states() == (shown, hub_shown)


def test_a_switch_that_the_environment_overrules_is_left_without_a_word(bars, monkeypatch, recwarn):
    # Not by a dotted name, which means the class of the same name.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with one_line_errors(), quiet():
        pass
    assert not [warning for warning in recwarn if "progress bars" in str(warning.message)]


def fake_options(tmp_path):
    return training_run.TrainOptions(out=tmp_path / "out", data=tmp_path)


def run_generation(tmp_path):
    generation_run.run("model", ["a"], generation_run.Decoding(1, 0.0, 1.0, 1, 0), stream=False, special_tokens=False)


def run_demo(tmp_path):
    demo.Demo(tmp_path / "demo", demo.Settings(None, 1, 300, 0)).run()


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (training_run, "build_model", lambda path: training_run.run(fake_options(path))),
        (generation_run, "glm_tokens", run_generation),
        (demo, "load_corpus", run_demo),
    ],
    ids=["train", "generate", "demo"],
)
def test_a_command_leaves_its_process_alone(place, name, call, tmp_path, monkeypatch):
    monkeypatch.setattr(place, name, stop)
    for run, loader in ((training_run, "load_pretrained"), (generation_run, "load_tokenizer")):
        monkeypatch.setattr(run, loader, lambda *args, **kwargs: None)
        monkeypatch.setattr(run, "load_model", lambda *args, **kwargs: torch.nn.Identity())
    # The others change no number of threads.
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads if place is demo else lambda count: None)
    before = draws(), torch.get_num_threads()
    with pytest.raises(Stopped):
        call(tmp_path)
    assert (draws(), torch.get_num_threads()) == before


@pytest.mark.parametrize("fails", [False, True], ids=["well", "by-an-error"])
def test_counting_threads_leaves_the_count(fails, monkeypatch):
    monkeypatch.setattr("minillm.cli.progress.os.cpu_count", lambda: 3)
    before = torch.get_num_threads()
    if fails:
        with pytest.raises(ZeroDivisionError):
            fastest_thread_count(lambda: 1 / (3 - torch.get_num_threads()))
    else:
        fastest_thread_count(lambda: None, repeats=1)
    assert torch.get_num_threads() == before


def test_benchmarks_leave_their_process_alone(bars, monkeypatch):
    def measure(options):
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        set_seed(5)
        raise Stopped

    monkeypatch.setitem(benchmarks.KINDS, "speed", measure)

    def state():
        limit = torch._dynamo.config.fail_on_recompile_limit_hit
        return draws(), logging.get_verbosity(), bar_states(), limit

    before = state()
    with pytest.raises(Stopped):
        benchmarks.main(["speed"])
    assert state() == before


def test_saving_does_not_change_what_a_model_generates(tmp_path):
    model = tiny()
    own = model.generation_config
    # To generate on and on.
    own.eos_token_id = own.pad_token_id = None
    before = own.to_dict()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "file").write_text("", "utf-8")
    model.save_pretrained(tmp_path / "file")
    assert model.generation_config is own and own.to_dict() == before
    # Without sampling.
    own.temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "refused")
    assert model.generation_config is own
