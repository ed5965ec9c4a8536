"""TRL's trainers of preferences and rewards on MiniLLM: each loss by hand, from rows alone and without padding, and
beside Llama."""

import math

import peft
import pytest
import torch
import trl
from datasets import Dataset
from torch.nn.functional import logsigmoid
from training_cases import VARIANTS, largest_difference, llama_twin, parameters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl_cases import TEXTS, common, model_for, normed_model, train

from minillm import MiniLLMForSequenceClassification

PREFERENCES = [
    {"prompt": f"number {number}:", "chosen": " " + TEXTS[number], "rejected": " " + TEXTS[-number - 1][::-1]}
    for number in range(16)
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in PREFERENCES
    for kind in ("chosen", "rejected")
]
BETA = 0.1


def compared(trainer, arguments, samples):
    """A function that makes a trainer which compares the model with a reference."""

    def make(model, tokenizer, folder, peft_config=None, ref_model=None, **given):
        # Without an adapter or a model given the reference is loaded from the folder that the model came from.
        model.save_pretrained(folder / "base")
        return trainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "base"),
            ref_model=ref_model,
            args=arguments(**{"max_length": 64, "max_steps": 4, "beta": BETA, **common(folder), **given}),
            train_dataset=Dataset.from_list(samples),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


dpo = compared(trl.DPOTrainer, trl.DPOConfig, PREFERENCES)
kto = compared(trl.KTOTrainer, trl.KTOConfig, JUDGED)


def reward(model, tokenizer, folder, peft_config=None, **arguments):
    return trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**{"max_length": 64, "max_steps": 4, **common(folder), **arguments}),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def reward_model_for(variant, tokenizer):
    return model_for(variant, tokenizer, model_class=MiniLLMForSequenceClassification, num_labels=1)


TRAINERS = {"dpo": dpo, "kto": kto}
# Of policy and reference that are one model: minus the log of a coin toss, and one minus its chance.
FIRST_LOSS = {"dpo": math.log(2), "kto": 0.5}


def rows_alone(batch, *names):
    """The rows of a padded batch, each cut to its own tokens, of the tensors of these names."""
    attention_mask, *tensors = (batch[name] for name in names)
    for row, mask in enumerate(attention_mask.bool()):
        yield [tensor[row, mask] for tensor in tensors]


@torch.no_grad()
def log_ratios(model, reference, batch, kind=""):
    """The log of how much likelier the model makes each completion than the reference does."""
    found = []
    for ids, scored in rows_alone(
        batch, *(kind + name for name in ("attention_mask", "input_ids", "completion_mask"))
    ):
        at = scored[1:].nonzero().flatten()
        logp, ref_logp = (
            each(ids[None], use_cache=False).logits[0].double().log_softmax(-1)[at, ids[at + 1]].sum()
            for each in (model, reference)
        )
        found.append(logp - ref_logp)
    return torch.stack(found)


def loss_by_hand(method, model, reference, batch):
    ratios = log_ratios(model, reference, batch)
    if method == "dpo":
        chosen, rejected = ratios.chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()
    divergence = log_ratios(model, reference, batch, "KL_").mean().clamp(min=0)
    sign = batch["label"].double() * 2 - 1
    return (1 - torch.sigmoid(sign * BETA * (ratios - divergence))).mean()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", TRAINERS)
def test_the_loss_is_the_papers(method, variant, tokenizer, tmp_path):
    """DPO's equation 7 (arXiv 2305.18290) and KTO's equation 8 (arXiv 2402.01306)."""
    model, reference = (model_for(variant, tokenizer, seed=seed).eval() for seed in (0, 1))
    trainer = TRAINERS[method](model, tokenizer, tmp_path, ref_model=reference)
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 in batch["attention_mask"]
    expected = loss_by_hand(method, model, reference, batch).item()
    assert abs(expected - FIRST_LOSS[method]) > 1e-3
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.mostly_thorough("dpo")
@pytest.mark.parametrize(
    ("method", "options"),
    [("dpo", {}), ("dpo", {"padding_free": True}), ("kto", {})],
    ids=["dpo", "dpo_padding_free", "kto"],
)
def test_preference_optimisation_equals_llama(method, options, tokenizer, tmp_path):
    model = model_for("causal", tokenizer)
    expected = train(TRAINERS[method](llama_twin(model), tokenizer, tmp_path / "twin", **options))
    found = train(TRAINERS[method](model, tokenizer, tmp_path / "ours", **options))
    assert found[0] == pytest.approx(FIRST_LOSS[method], abs=1e-5)
    assert found == pytest.approx(expected, abs=2e-5)
    assert found[-1] < found[0]


@pytest.mark.mostly_thorough("dpo-prefix-lora")
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_preference_optimisation_learns(method, variant, adapter, tokenizer, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8) if adapter else None
    model = model_for(variant, tokenizer)
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 8}
    losses = train(TRAINERS[method](model, tokenizer, tmp_path, config, **options))
    assert losses[0] == pytest.approx(FIRST_LOSS[method], abs=1e-5)
    assert sum(losses[-3:]) / 3 < 0.87 * losses[0]


@pytest.mark.slow
def test_preference_optimisation_of_a_normalised_head_scores_as_the_model_does(tokenizer, tmp_path):
    """Beside a plain head of the same rows; the first loss alone is that of a coin toss for any head."""
    entries = []
    for model in (normed_model(tokenizer), normed_model(tokenizer).fold_norm_head()):
        trainer = dpo(model, tokenizer, tmp_path / type(model.lm_head).__name__, max_steps=1)
        train(trainer)
        entries.append(trainer.state.log_history[0])
    for key in ("loss", "logps/chosen", "logps/rejected"):
        assert entries[0][key] == pytest.approx(entries[1][key], rel=1e-5), key


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_loss_of_rewards_is_the_odds_that_the_chosen_text_wins(variant, tokenizer, tmp_path):
    model = reward_model_for(variant, tokenizer).eval()
    trainer = reward(model, tokenizer, tmp_path, center_rewards_coefficient=0.3)
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 in batch["attention_mask"]
    # The score of a text is read at its last token.
    rewards = [
        model.model(ids[None], use_cache=False).last_hidden_state[0, -1] @ model.score.weight[0]
        for (ids,) in rows_alone(batch, "attention_mask", "input_ids")
    ]
    chosen, rejected = torch.stack(rewards).chunk(2)
    expected = -logsigmoid(chosen - rejected).mean() + 0.3 * (chosen + rejected).square().mean()
    assert (chosen - rejected).abs().min() > 1e-3
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.slow
def test_training_of_rewards_equals_llama(tokenizer, tmp_path):
    model = reward_model_for("causal", tokenizer)
    twin = llama_twin(model, LlamaForSequenceClassification)
    expected, found = (train(reward(each, tokenizer, tmp_path)) for each in (twin, model))
    assert len(found) == 4 and found == pytest.approx(expected, abs=2e-5)
    assert largest_difference(parameters(model), parameters(twin)) < 2e-5
    assert found[-1] < found[0]


@pytest.mark.mostly_thorough("prefix-lora")
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reward_model_learns_and_loads(variant, adapter, tokenizer, tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8) if adapter else None
    model = reward_model_for(variant, tokenizer)
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 12}
    before = model.score.weight.detach().clone()
    trainer = reward(model, tokenizer, tmp_path, config, **options)
    assert trainer.evaluate(trainer.train_dataset)["eval_accuracy"] < 1.0
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_accuracy"] == 1.0
    trained = trainer.model.merge_and_unload() if adapter else trainer.model
    assert not torch.equal(trained.score.weight, before)
    trained.eval().save_pretrained(tmp_path / "reward")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits) and loaded(ids).logits.shape == (1, 1)


def test_a_reward_model_begins_with_the_weights_of_a_language_model(tokenizer, tmp_path):
    model = model_for("causal", tokenizer)
    model.save_pretrained(tmp_path)
    started = MiniLLMForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert parameters(started.model).keys() == parameters(model.model).keys()
    assert largest_difference(parameters(started.model), parameters(model.model)) == 0.0
    assert started.score.weight.shape == (1, model.config.hidden_size)
