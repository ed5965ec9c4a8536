"""Trackers and searches that work through the Trainer: trackio's database, and optuna's trials trained once more."""

import gc
import json
import sqlite3

import optuna
import pytest
from training_cases import VARIANTS, collator_for, counting_documents, make_trainer, tiny_model

from minillm.training.collators import pack_dataset

# What the Trainer reports once, about the whole run, is left out by transformers' callback.
OF_THE_RUN = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}


def trained(variant, folder, model=None, **arguments):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(40), collator)
    return make_trainer(model, rows, collator, folder, eval_dataset=rows[:4], max_steps=4, **arguments)


@pytest.mark.mostly_thorough("prefix")
@pytest.mark.parametrize("variant", VARIANTS)
def test_trackio_keeps_every_logged_number(variant, trackio_runs, tmp_path):
    arguments = {"report_to": ["trackio"], "project": tmp_path.name, "eval_strategy": "steps", "eval_steps": 2}
    model = tiny_model(variant)
    trainer = trained(variant, tmp_path, model, **arguments)
    trainer.train()
    with sqlite3.connect(trackio_runs / f"{tmp_path.name}.db") as database:
        kept = [json.loads(metrics) for (metrics,) in database.execute("select metrics from metrics order by id")]
        (config,) = (json.loads(text) for (text,) in database.execute("select config from configs"))
    found = {}
    for entry in kept:
        found.setdefault(entry["train/global_step"], {}).update(entry)
    logged = {
        (entry["step"], f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"): value
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if name not in OF_THE_RUN and name != "step"
    }
    # Loss, norm of the gradient, rate and epoch in four steps; a loss and three speeds in two evaluations.
    assert len(logged) == 4 * 4 + 2 * 4
    assert {(step, name): found[step][name] for step, name in logged} == logged
    ours = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("model_type", "attention_type", "position_embedding_type", "hidden_size", "rope_parameters"):
        assert config[name] == ours[name]
    assert config["max_steps"] == 4


@pytest.fixture
def older_objects_kept():
    """A search collects garbage after each trial, and walks through all that the other tests have left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("older_objects_kept")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trial_of_a_search_is_a_training_with_its_settings(variant, tmp_path):
    trials = []

    def build(trial=None):
        return tiny_model(
            variant, norm_placement=trial.suggest_categorical("norms", ["pre", "post"]) if trial else "pre"
        )

    def objective(metrics):
        trials.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    trainer = trained(variant, tmp_path, model_init=build)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        n_trials=3,
        direction="minimize",
        sampler=optuna.samplers.RandomSampler(seed=1),
        compute_objective=objective,
    )
    assert best.objective == min(trials) == trials[int(best.run_id)] and len(set(trials)) == 3
    chosen = best.hyperparameters
    model = tiny_model(variant, norm_placement=chosen["norms"])
    again = trained(variant, tmp_path, model, learning_rate=chosen["learning_rate"])
    again.train()
    assert again.evaluate()["eval_loss"] == best.objective
