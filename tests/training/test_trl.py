"""TRL's trainers on MiniLLM: supervised fine-tuning in all its forms, beside LlamaForCausalLM."""

import peft
import pytest
import torch
import trl
from blocks_cases import TINY
from datasets import Dataset
from training_cases import VARIANTS, largest_difference, llama_twin, parameters
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from trl_cases import NUMBERS, TEXTS, common, model_for, normed_model, train

from minillm.plugin import blocks_for_any_model
from minillm.tuning import tuning


def chat(number):
    return [
        {"role": "user", "content": f"what is {number} ?"},
        {"role": "assistant", "content": TEXTS[number]},
        {"role": "user", "content": "and then ?"},
        {"role": "assistant", "content": TEXTS[number][:9]},
    ]


DATASETS = {
    "text": [{"text": text} for text in TEXTS],
    "completion": [{"prompt": f"number {number}:", "completion": " " + TEXTS[number]} for number in NUMBERS],
    "chat": [{"messages": chat(number)} for number in NUMBERS],
    "chat_completion": [{"prompt": chat(number)[:1], "completion": chat(number)[1:2]} for number in NUMBERS],
}
MODES = {
    "plain": ("text", {}),
    "packed": ("text", {"packing": True}),
    "packed_wrapped": ("text", {"packing": True, "packing_strategy": "wrapped"}),
    "padding_free": ("text", {"padding_free": True, "max_length": None}),
    "completion": ("completion", {}),
    "completion_all": ("completion", {"completion_only_loss": False}),
    "completion_packed": ("completion", {"packing": True}),
    "chat": ("chat", {}),
    "assistant": ("chat", {"assistant_only_loss": True}),
    "assistant_packed": ("chat", {"assistant_only_loss": True, "packing": True}),
    "chat_completion": ("chat_completion", {}),
}


def sft(model, tokenizer, folder, mode, peft_config=None, **arguments):
    kind, options = MODES[mode]
    settings = {"max_length": 64, "max_steps": 4, **common(folder), **options, **arguments}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings),
        train_dataset=Dataset.from_list(DATASETS[kind]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.mostly_thorough("packed", "padding_free", "assistant")
@pytest.mark.parametrize("mode", MODES)
def test_supervised_fine_tuning_equals_llama(mode, tokenizer, tmp_path):
    model = model_for("causal", tokenizer)
    twin = llama_twin(model)
    expected = train(sft(twin, tokenizer, tmp_path, mode))
    found = train(sft(model, tokenizer, tmp_path, mode))
    assert len(found) == 4
    assert found == pytest.approx(expected, abs=2e-5)
    assert largest_difference(parameters(model), parameters(twin)) < 2e-5
    assert largest_difference(parameters(model), parameters(model_for("causal", tokenizer))) > 1e-3


@pytest.mark.mostly_thorough("qwen3-")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_packing_in_blocks_equals_eager(model_type, checkpointing, tokenizer, tmp_path, monkeypatch):
    """With transformers' own models."""
    monkeypatch.setattr(tuning, "any_model_blocks_from", 16)
    calls, attend = [], blocks_for_any_model.blocked_attention_forward
    monkeypatch.setattr(
        blocks_for_any_model, "blocked_attention_forward", lambda *args, **kw: calls.append(1) or attend(*args, **kw)
    )
    config = CONFIG_MAPPING[model_type](**{**TINY, "vocab_size": len(tokenizer)})
    config.pad_token_id, losses, weights = tokenizer.pad_token_id, [], []
    for back_end in ("eager", "minillm_blocks"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=back_end)
        options = {"max_length": 200, "gradient_checkpointing": checkpointing}
        losses.append(train(sft(model, tokenizer, tmp_path, "packed", **options)))
        weights.append(parameters(model))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert largest_difference(*weights) < 2e-5
    # Four steps of two layers, each a second time in the backward pass if it is checkpointed.
    assert len(calls) == (16 if checkpointing else 8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["packed", "completion_packed", "assistant_packed", "padding_free"])
def test_packed_batches_equal_documents_alone(mode, variant, tokenizer, tmp_path):
    """TRL packs by `position_ids` alone: documents must not see one another, nor count one another's positions."""
    model = model_for(variant, tokenizer).eval()
    trainer = sft(model, tokenizer, tmp_path, mode)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch and len(batch["input_ids"]) == 1
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 3
    total, count, alone = 0.0, 0, []
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            logits = model(ids[None, start:stop]).logits[0]
            alone.append(logits)
            for at in range(start + 1, stop):
                if labels[at] != -100:
                    total -= logits[at - start - 1].log_softmax(-1)[labels[at]].item()
                    count += 1
        loss = trainer.compute_loss(model, dict(batch)).item()
    assert (torch.cat(alone) - packed).abs().max() < 2e-5
    assert 0 < count < len(ids)
    assert loss == pytest.approx(total / count, abs=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_assistant_is_scored(variant, tokenizer, tmp_path):
    trainer = sft(model_for(variant, tokenizer), tokenizer, tmp_path, "assistant")
    batch = next(iter(trainer.get_train_dataloader()))
    texts = {text for number in NUMBERS for text in (TEXTS[number], TEXTS[number][:9])}
    for labels in batch["labels"]:
        spans = [tokenizer.decode(span) for span in scored_spans(labels.tolist())]
        assert len(spans) == 2
        assert all(span.removesuffix(tokenizer.eos_token) in texts for span in spans)


def scored_spans(labels):
    spans, span = [], []
    for label in [*labels, -100]:
        if label != -100:
            span.append(label)
        elif span:
            spans.append(span)
            span = []
    return spans


@pytest.mark.mostly_thorough("assistant_packed-prefix")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["packed", "completion", "assistant_packed"])
def test_lora_fine_tuning_learns(mode, variant, tokenizer, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    model = model_for(variant, tokenizer)
    trainer = sft(
        model, tokenizer, tmp_path, mode, peft_config=config, optim="adamw_torch", learning_rate=0.01, max_steps=12
    )
    losses = train(trainer)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("mode", ["plain", "packed", "completion"])
def test_supervised_fine_tuning_of_a_normalised_head_begins_at_the_loss_of_the_model(mode, tokenizer, tmp_path):
    trainer = sft(normed_model(tokenizer), tokenizer, tmp_path, mode)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = normed_model(tokenizer).train()(**batch, use_cache=False, skip_logits=False).loss
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
