"""Two processes that share each batch train as one process with the whole of it: DDP, ZeRO, FSDP2 and the Trainer."""

from pathlib import Path

import parallel_cases
import pytest
import torch
from docs_cases import assert_shown, code_of
from parallel_cases import KINDS, adam, batch_for, model_for, train, trainer_for
from training_cases import largest_difference, losses, parameters
from transformers import AutoModelForCausalLM
from two_processes import run_on_two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of what was saved and what either process found, by kind: one launch serves all of them."""
    root = tmp_path_factory.mktemp("parallel")
    run_on_two_processes(Path(parallel_cases.__file__), root)
    return root, {kind: [torch.load(root / f"{kind}.{rank}.pt") for rank in (0, 1)] for kind in KINDS}


@pytest.fixture(scope="module")
def alone():
    """The weights after the same steps in one process, by kind."""
    trained = {}
    for kind in KINDS:
        model = model_for(kind)
        train(model, adam(model.parameters()), *batch_for(kind))
        trained[kind] = parameters(model)
        assert largest_difference(trained[kind], parameters(model_for(kind))) > 1e-2
    return trained


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_ddp_are_those_of_the_whole_batch(kind, both):
    model = model_for(kind)
    batch, scored = batch_for(kind)
    counts = [
        (half["labels"][:, 1:] != -100).sum() for half in (parallel_cases.half_of(batch, rank) for rank in (0, 1))
    ]
    assert counts[0] != counts[1] and sum(counts) == scored
    model(**batch).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    scale = max(gradient.abs().max() for gradient in expected.values())
    for found in both[1][kind]:
        assert largest_difference(found["ddp"], expected) < 1e-5 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_zero_trains_the_same_weights_with_half_of_the_state_each(kind, both, alone):
    for found in both[1][kind]:
        assert largest_difference(found["zero"], alone[kind]) < 2e-5
    states = [found["zero_state"] for found in both[1][kind]]
    whole = sum(weight.numel() for weight in alone[kind].values())
    assert sum(states) == whole and max(states) < 0.6 * whole


@pytest.mark.parametrize("name", ["fsdp", "fsdp_checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_trains_the_same_weights_and_saves_them(kind, name, both, alone):
    root, found = both
    for each in found[kind]:
        assert largest_difference(each[name], alone[kind]) < 2e-5
    whole = sum(weight.numel() for weight in alone[kind].values())
    assert sum(each[f"{name}_local"] for each in found[kind]) == whole
    assert max(each[f"{name}_local"] for each in found[kind]) < 0.6 * whole
    loaded = parameters(AutoModelForCausalLM.from_pretrained(root / f"{kind}-{name}"))
    assert largest_difference(loaded, found[kind][0][name]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_on_two_processes_is_one_with_batches_of_twice_the_size(kind, both, tmp_path):
    trainer = trainer_for(kind, tmp_path, per_device=8)
    trainer.train()
    for found in both[1][kind]:
        assert largest_difference(found["trainer"], parameters(trainer.model)) < 2e-5
    assert both[1][kind][0]["losses"] == pytest.approx(losses(trainer), abs=2e-5)


def test_the_code_of_the_page_runs(tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(code_of("parallelism"), "utf-8")
    assert_shown("parallelism", run_on_two_processes(script, cwd=tmp_path))
