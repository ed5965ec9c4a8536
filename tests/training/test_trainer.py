"""MiniLLM in the stock Trainer: learning, accumulation, bf16, resuming, checkpointing, evaluation, fine-tuning."""

import math

import pytest
import torch
from datasets import Dataset
from training_cases import (
    VARIANTS,
    checkpointing,
    collator_for,
    counting_documents,
    largest_difference,
    losses,
    make_trainer,
    parameters,
    question_samples,
    sft_collator,
    tiny_model,
)
from transformers import AutoModelForCausalLM, default_data_collator

from minillm.evaluation.perplexity import perplexity
from minillm.training.collators import pack_dataset


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.mostly_thorough("prefix")
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_falls_from_scratch(variant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(200), collator)
    trainer = make_trainer(tiny_model(variant), rows, collator, tmp_path, max_steps=40)
    trainer.train()
    assert len(losses(trainer)) == 40
    assert losses(trainer)[0] > 0.9 * math.log(32)
    assert sum(losses(trainer)[-5:]) / 5 < 0.5 * losses(trainer)[0]


def one_run(variant, folder, packing="rows", **arguments):
    """Three optimizer steps over the same 24 documents; returns the parameters and the losses."""
    collator = collator_for(variant, packing=packing != "none")
    # Documents of very unequal length: a mean of means would not equal the mean over tokens.
    documents = counting_documents(24, seed=3, shortest=2, longest=31)
    dataset = pack_dataset(documents, collator) if packing == "rows" else documents
    batch = 24 if packing != "rows" else len(dataset)
    steps = arguments.pop("accumulation", 1)
    assert batch % steps == 0 or packing == "rows"
    model = tiny_model(variant)
    trainer = make_trainer(
        model,
        dataset,
        collator,
        folder,
        per_device_train_batch_size=-(-batch // steps),
        gradient_accumulation_steps=steps,
        num_train_epochs=3,
        optim="sgd",
        learning_rate=0.3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **arguments,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    return parameters(model), losses(trainer)


@pytest.mark.slow
@pytest.mark.mostly_thorough("prefix")
@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_and_packing_equal_the_big_unpacked_batch(variant, tmp_path):
    expected, expected_losses = one_run(variant, tmp_path, packing="none")
    assert largest_difference(expected, parameters(tiny_model(variant))) > 1e-2
    for packing, accumulation in (("none", 8), ("batch", 1), ("batch", 6), ("rows", 1), ("rows", 3)):
        found, found_losses = one_run(variant, tmp_path, packing=packing, accumulation=accumulation)
        assert largest_difference(found, expected) < 2e-6, (packing, accumulation)
        assert found_losses == pytest.approx(expected_losses, abs=1e-5), (packing, accumulation)


@pytest.mark.mostly_thorough("not_reentrant-prefix")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_gradient_checkpointing_changes_nothing(variant, reentrant, tmp_path):
    expected = one_run(variant, tmp_path)
    found = one_run(variant, tmp_path, **checkpointing(use_reentrant=reentrant))
    assert largest_difference(found[0], expected[0]) < 1e-7
    assert found[1] == pytest.approx(expected[1], abs=1e-7)


@pytest.mark.mostly_thorough("alibi")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_computes_in_bf16_and_learns(variant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(200), collator)
    model = tiny_model(variant)
    seen = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer = make_trainer(model, rows, collator, tmp_path, max_steps=30, bf16=True)
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(losses(trainer)[-5:]) / 5 < 0.6 * losses(trainer)[0]


@pytest.mark.mostly_thorough("prefix")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_weights_follow_fp32_training(variant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(100), collator)
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(tiny_model(variant).to(dtype), rows, collator, tmp_path, max_steps=5)
        trainer.train()
        runs.append(losses(trainer))
    # bf16 keeps 8 bits: losses of about 3.5 are off by a few times 2**-8 * 3.5.
    assert runs[1] == pytest.approx(runs[0], abs=0.08)


@pytest.mark.mostly_thorough("prefix")
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_is_bit_identical(variant, tmp_path, deterministic):
    def trainer_in(folder, **arguments):
        collator = collator_for(variant)
        # Six batches an epoch: the checkpoint at step 8 lies in the middle of the second epoch.
        rows = pack_dataset(counting_documents(60, seed=5, shortest=14, longest=18), collator)[:24]
        model = tiny_model(variant, hidden_dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1)
        return make_trainer(
            model, rows, collator, folder, per_device_train_batch_size=4, num_train_epochs=3, **arguments
        )

    whole = trainer_in(tmp_path / "whole", save_strategy="steps", save_steps=8)
    whole.train()
    resumed = trainer_in(tmp_path / "resumed", save_strategy="steps", save_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert len(losses(whole)) == 18
    assert losses(resumed) == losses(whole)
    assert largest_difference(parameters(resumed.model), parameters(whole.model)) == 0.0


def test_repeated_run_is_bit_identical(tmp_path, deterministic):
    runs = []
    for workers in (0, 2):
        collator = collator_for("prefix")
        documents = counting_documents(40)
        trainer = make_trainer(
            tiny_model("prefix"), documents, collator, tmp_path, num_train_epochs=2, dataloader_num_workers=workers
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


@pytest.mark.mostly_thorough("prefix")
@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_equals_perplexity_and_leaves_training_alone(variant, tmp_path):
    collator = collator_for(variant)
    rows, held_out = (pack_dataset(counting_documents(60, seed=seed), collator) for seed in (0, 1))
    options = {"max_steps": 4, "num_train_epochs": 1, "per_device_eval_batch_size": 100}
    model = tiny_model(variant)
    watched = make_trainer(
        model, rows, collator, tmp_path, eval_dataset=held_out, eval_strategy="steps", eval_steps=2, **options
    )
    watched.train()
    evaluations = [entry["eval_loss"] for entry in watched.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
    result = perplexity(model, held_out, collator, batch_size=3)
    # One batch, so the mean over batches is the mean over tokens.
    assert watched.evaluate()["eval_loss"] == pytest.approx(result.nll, abs=1e-5)
    plain = make_trainer(tiny_model(variant), rows, collator, tmp_path, **options)
    plain.train()
    assert losses(plain) == losses(watched)


@pytest.mark.mostly_thorough("datasets-prefix")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_evaluations_of_unchanged_weights_are_equal_in_all_epochs(kind, variant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(20), collator)
    documents = counting_documents(20, seed=1)
    held_out = pack_dataset(
        documents if kind == "list" else Dataset.from_list(documents), collator, fixed_prefixes=True
    )
    model = tiny_model(variant)
    expected = perplexity(model, documents, collator_for(variant)).nll
    options = {"num_train_epochs": 3, "per_device_eval_batch_size": 100, "learning_rate": 0.0, "weight_decay": 0.0}
    trainer = make_trainer(model, rows, collator, tmp_path, held_out, eval_strategy="epoch", **options)
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 3 and len(set(found)) == 1 and found[0] == pytest.approx(expected, abs=1e-5)
    if variant == "prefix":
        # Those of the training are drawn anew.
        assert collator.epoch == 2 and len({round(loss, 6) for loss in losses(trainer)}) > 1


@pytest.mark.slow
@pytest.mark.mostly_thorough("alibi")
@pytest.mark.parametrize("variant", VARIANTS)
def test_continued_pretraining_from_a_saved_model(variant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(100), collator)
    first = make_trainer(tiny_model(variant), rows, collator, tmp_path / "first", max_steps=20)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    before = perplexity(first.model, rows, collator)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert perplexity(loaded, rows, collator) == before
    second = make_trainer(loaded, rows, collator, tmp_path / "second", max_steps=10, learning_rate=3e-3)
    second.train()
    assert losses(second)[0] < 0.7 * losses(first)[0]
    assert perplexity(loaded, rows, collator).nll < before.nll


def answer_nll_alone(model, samples, is_prefix):
    """Mean negative log likelihood of the answers' tokens, each sample in a forward of its own."""
    total, count = 0.0, 0
    model.eval()
    for sample in samples:
        prompt, answer = sample["prompt_ids"], sample["completion_ids"]
        ids = torch.tensor([prompt + answer])
        mask = {"prefix_mask": torch.tensor([[1] * len(prompt) + [0] * len(answer)])} if is_prefix else {}
        with torch.no_grad():
            log_probs = model(ids, **mask).logits[0].log_softmax(-1)
        for at in range(len(prompt), ids.shape[1]):
            total, count = total - log_probs[at - 1, ids[0, at]].item(), count + 1
    return total / count


@pytest.mark.mostly_thorough("samples-alibi", "rows-prefix")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["samples", "rows"])
def test_fine_tuning_scores_the_answer_only(variant, form, tmp_path):
    samples = question_samples(64)
    collator = sft_collator(variant)
    dataset = samples if form == "samples" else Dataset.from_list(pack_dataset(samples, collator))
    # Rows carry columns that the model's forward names; raw samples do not.
    options = {"remove_unused_columns": form == "rows", "per_device_train_batch_size": 64, "max_steps": 15}
    model = tiny_model(variant)
    expected = answer_nll_alone(model, samples, variant == "prefix")
    trainer = make_trainer(model, dataset, collator, tmp_path, **options)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-4)
    assert losses(trainer)[-1] < 0.95 * losses(trainer)[0]


@pytest.mark.slow
def test_dropped_columns_are_explained(tmp_path):
    samples = [{"input_ids": [1, 2, 3], "prompt_length": 1}] * 8
    for dataset in (samples, Dataset.from_list(samples)):
        trainer = make_trainer(tiny_model(), dataset, sft_collator("causal"), tmp_path, max_steps=1)
        with pytest.raises(ValueError, match="set `remove_unused_columns=False` or pack the data set beforehand"):
            trainer.train()


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_trainer_keeps_the_columns_that_forward_names(kind, tmp_path):
    row = {
        "input_ids": [1, 2, 3, 4, 5],
        "labels": [-100, -100, 3, -100, 5],
        "document_ids": [1, 1, 1, 2, 2],
        "prefix_mask": [1, 1, 0, 1, 0],
        "block_position_ids": [0, 0, 0, 0, 0],
        "length": 5,
    }
    dataset = Dataset.from_list([row] * 8) if kind == "datasets" else [row] * 8
    trainer = make_trainer(tiny_model("prefix"), dataset, default_data_collator, tmp_path, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == set(row) - {"length"}
    trainer.train()
    assert math.isfinite(losses(trainer)[0])


def test_prefix_collator_with_a_causal_model_is_refused(tmp_path):
    collator = collator_for("prefix")
    trainer = make_trainer(tiny_model("causal"), counting_documents(8), collator, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="prefix_mask"):
        trainer.train()
