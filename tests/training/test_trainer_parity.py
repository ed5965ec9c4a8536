"""In the Trainer MiniLLM equals LlamaForCausalLM step by step, whatever the options; its losses stay as they were."""

import pytest
import torch
from training_cases import (
    VARIANTS,
    VOCABULARY,
    collator_for,
    counting_documents,
    largest_difference,
    llama_twin,
    losses,
    make_trainer,
    parameters,
    tiny_model,
)
from transformers import DataCollatorWithFlattening

from minillm.training.collators import pack_dataset

OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "adafactor": {"optim": "adafactor"},
    "weight_decay": {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "token_count": {"include_num_input_tokens_seen": "all"},
}


def run(model, folder, collator, dataset, **options):
    trainer = make_trainer(model, dataset, collator, folder, max_steps=6, **options)
    trainer.train()
    return losses(trainer), parameters(trainer.model)


@pytest.mark.mostly_thorough("plain", "accumulation")
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_llama_with_each_option(option, tmp_path):
    model = tiny_model()
    twin = llama_twin(model)
    collator = collator_for("causal", packing=False)
    documents = counting_documents(40)
    # AdamW divides by the size of a gradient: SGD keeps rounding from growing.
    options = {"optim": "sgd", "learning_rate": 0.1, **OPTIONS[option]}
    expected = run(twin, tmp_path, collator, documents, **options)
    found = run(model, tmp_path, collator, documents, **options)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert largest_difference(found[1], expected[1]) < 1e-5
    assert largest_difference(found[1], parameters(tiny_model())) > 1e-3


@pytest.mark.slow
def test_flattened_batches_equal_llama(tmp_path):
    model = tiny_model()
    twin = llama_twin(model)
    twin.config.use_cache = False
    collator = DataCollatorWithFlattening()
    documents = counting_documents(40)
    options = {"optim": "sgd", "learning_rate": 0.1}
    expected = run(twin, tmp_path, collator, documents, **options)
    found = run(model, tmp_path, collator, documents, **options)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert largest_difference(found[1], expected[1]) < 1e-5
    # And packing by `document_ids` is the same training.
    ours = run(tiny_model(), tmp_path, collator_for("causal", max_length=256), documents, **options)
    assert ours[0] == pytest.approx(expected[0], abs=1e-5)


# Steps 1, 6, 11, ... of a run on one CPU thread.
GOLDEN_LOSSES = {
    "causal": [3.66428, 2.74264, 2.05131, 1.59972, 1.29866, 1.22613],
    "prefix": [3.64163, 2.81673, 2.06217, 1.77797, 1.50978, 1.30823],
    "alibi": [3.65225, 2.59662, 1.94094, 1.50838, 1.21467, 1.15072],
}


@pytest.mark.mostly_thorough("alibi")
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_losses_of_thirty_steps(variant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(300, seed=9), collator)
    trainer = make_trainer(tiny_model(variant), rows, collator, tmp_path, max_steps=30, learning_rate=5e-3)
    trainer.train()
    assert len(losses(trainer)) == 30
    # Rounding differs between machines and grows with the steps.
    assert losses(trainer)[::5] == pytest.approx(GOLDEN_LOSSES[variant], abs=2e-3)


def test_the_twin_sees_the_same_logits():
    model = tiny_model().eval()
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(ids).logits - llama_twin(model).eval()(ids).logits).abs().max() < 1e-5
