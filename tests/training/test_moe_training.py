"""A mixture of experts in the Trainer, in TRL's trainers and under PEFT's adapters, beside Mixtral."""

import peft
import pytest
import torch
import trl
from datasets import Dataset
from moe_cases import mixtral_twin
from training_cases import collator_for, counting_documents, largest_difference, losses, make_trainer, parameters
from training_cases import tiny_model as dense_model
from transformers import AutoModelForCausalLM
from trl_cases import common
from variants import fields_of

from minillm import MiniLLMTokenizer
from minillm.training.collators import pack_dataset

MOE = {**fields_of("moe"), "router_aux_loss_coef": 0.2}
TEXTS = [f"line {number}: " + "the sum of that " * (1 + number % 3) for number in range(48)]
VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer():
    return MiniLLMTokenizer.train_from_iterator(TEXTS, vocab_size=VOCABULARY, show_progress=False)


def model_for(tokenizer, **fields):
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return dense_model(vocab_size=len(tokenizer), max_position_embeddings=256, **ids, **fields)


def arguments(folder, **more):
    return {**common(folder), "max_steps": 3, **more}


def supervised(model, tokenizer, folder, peft_config=None, **options):
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(max_length=64, **arguments(folder, **options)),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- Trainer ---


def right_padded(documents):
    """What both models read, from documents of different lengths."""
    texts = [torch.tensor(document["input_ids"]) for document in documents]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(texts, batch_first=True),
        "labels": pad(texts, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(text) for text in texts], batch_first=True),
    }


@pytest.mark.mostly_thorough("with_router-2")
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("router", [True, False], ids=["with_router", "without"])
def test_the_trainer_trains_as_mixtral(router, steps, tmp_path):
    """With accumulation too, where either model adds the auxiliary loss once a micro-batch."""
    accumulation = {"gradient_accumulation_steps": steps, "learning_rate": 0.1}
    model = dense_model(**MOE, output_router_logits=router)
    twin = mixtral_twin(model)
    before = parameters(model)
    runs = []
    for each in (model, twin):
        trainer = make_trainer(
            each, counting_documents(40), right_padded, tmp_path, max_steps=4, optim="sgd", **accumulation
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert largest_difference(parameters(model), parameters(twin)) < 1e-5
    assert largest_difference(parameters(model), before) > 1e-4


def test_packed_rows_are_learned(tmp_path):
    collator = collator_for("causal")
    model = dense_model(**MOE, output_router_logits=True)
    rows = pack_dataset(counting_documents(60), collator)
    trainer = make_trainer(model, rows, collator, tmp_path, num_train_epochs=8, eval_dataset=rows)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    # The logits alone come back from a prediction, not the router's.
    assert trainer.predict(rows).predictions.shape[-1] == model.config.vocab_size


# --- TRL ---


@pytest.mark.mostly_thorough("None-{}", "0.5-{'packing': True}")
@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}, {"packing": True}], ids=str)
@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0])
def test_supervised_fine_tuning_equals_mixtral(coefficient, options, tokenizer, tmp_path):
    model = model_for(tokenizer, **MOE)
    twin = mixtral_twin(model)
    runs = []
    for each in (model, twin):
        trainer = trl.SFTTrainer(
            model=each,
            args=trl.SFTConfig(
                **{"max_length": 64, "router_aux_loss_coef": coefficient, **arguments(tmp_path), **options}
            ),
            train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append((logged(trainer), logged(trainer, "aux_loss")))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=2e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], abs=2e-5)
    assert len(runs[0][1]) == (0 if coefficient == 0 else 3)
    assert largest_difference(parameters(model), parameters(twin)) < 2e-5


def test_a_model_without_experts_is_not_taken_for_one(tokenizer, tmp_path):
    model = model_for(tokenizer)
    trainer = supervised(model, tokenizer, tmp_path)
    trainer.train()
    assert not trainer.aux_loss_enabled and not logged(trainer, "aux_loss")
    trainer.save_model(str(tmp_path / "saved"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"output_router_logits=True.*mlp_type='glu'"):
        supervised(model_for(tokenizer), tokenizer, tmp_path, router_aux_loss_coef=0.1).train()


@pytest.mark.slow
def test_the_auxiliary_loss_evens_out_the_experts(tokenizer, tmp_path):
    loads = {}
    for coefficient in (0.0, 20.0):
        model = model_for(tokenizer, **MOE)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[0] += 0.1 * layer.mlp.gate.weight.abs().mean() + 0.3
        trainer = supervised(
            model, tokenizer, tmp_path, router_aux_loss_coef=coefficient, max_steps=10, learning_rate=0.02
        )
        trainer.train()
        ids = tokenizer(TEXTS, return_tensors="pt", padding=True)
        with torch.no_grad():
            loads[coefficient] = model(**ids, output_router_logits=True).aux_loss.item()
    assert loads[20.0] < loads[0.0] - 0.01


PREFERENCES = [
    {"prompt": f"number {number}:", "chosen": " " + TEXTS[number], "rejected": " " + TEXTS[-number - 1][::-1]}
    for number in range(12)
]


@pytest.mark.slow
def test_preference_optimisation_equals_mixtral(tokenizer, tmp_path):
    model = model_for(tokenizer, **MOE)
    runs = []
    for name, each in {"ours": model, "twin": mixtral_twin(model)}.items():
        each.save_pretrained(tmp_path / name)
        trainer = trl.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tmp_path / name),
            args=trl.DPOConfig(max_length=64, **arguments(tmp_path)),
            train_dataset=Dataset.from_list(PREFERENCES),
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append((logged(trainer), logged(trainer, "aux_loss")))
    assert len(runs[0][1]) == 3
    assert runs[0][0] == pytest.approx(runs[1][0], abs=2e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], abs=2e-5)


# --- PEFT ---


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({}, {"q_proj", "v_proj"}),
        ({"target_modules": "all-linear"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}, set()),
    ],
    ids=["default", "all_linear", "experts"],
)
def test_adapters(options, adapted, tmp_path):
    torch.manual_seed(0)
    base = dense_model(**MOE, output_router_logits=True)
    ids = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = base(ids).logits
    names = parameters(base).keys()
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    assert {path.split(".")[-1] for path in model.base_model.targeted_module_names} == adapted
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model.eval()(ids).logits
    assert (found - plain).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(dense_model(**MOE), tmp_path).eval()
    assert (reloaded(ids).logits - found).abs().max() < 1e-6
    merged = reloaded.merge_and_unload()
    assert parameters(merged).keys() == names
    assert (merged(ids).logits - found).abs().max() < 1e-5


@pytest.mark.slow
def test_lora_in_supervised_fine_tuning_has_the_auxiliary_loss(tokenizer, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    options = {"gradient_checkpointing": True, "optim": "adamw_torch", "learning_rate": 0.01}
    trainer = supervised(model_for(tokenizer, **MOE), tokenizer, tmp_path, config, **options)
    trainer.train()
    assert len(logged(trainer, "aux_loss")) == 3
