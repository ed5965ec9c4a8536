"""Parameter-efficient fine-tuning: each method trains, saves, reloads on the base and (where it can) merges."""

import copy

import peft
import pytest
import torch
from training_cases import (
    VARIANTS,
    VOCABULARY,
    checkpointing,
    collator_for,
    counting_documents,
    largest_difference,
    losses,
    make_trainer,
    parameters,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from minillm.training.collators import pack_dataset

VIRTUAL = 4
PROMPT_METHODS = {
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": VIRTUAL}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": VIRTUAL, "encoder_hidden_size": 16}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": VIRTUAL}),
}
MERGEABLE = {
    "lora": ("LoraConfig", {"r": 4}),
    "lora_all_linear": ("LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    "lora_embedding": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "modules_to_save": ("LoraConfig", {"r": 4, "modules_to_save": ["lm_head"]}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [1, 2]}),
    "adalora": ("AdaLoraConfig", {"total_step": 10, "tinit": 1, "tfinal": 1, "init_r": 4, "target_r": 2}),
    "ia3": ("IA3Config", {}),
    "vera": ("VeraConfig", {"r": 8}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 10}),
    "vblora": ("VBLoRAConfig", {"num_vectors": 16, "vector_length": 8}),
    "miss": ("MissConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "layernorm_tuning": ("LNTuningConfig", {}),
}


def adapter_config(name):
    kind, arguments = {**MERGEABLE, **PROMPT_METHODS}[name]
    return getattr(peft, kind)(task_type="CAUSAL_LM", **arguments)


def batch_for(variant, method=None):
    """Unpacked rows, since virtual tokens stand before a row and not before each document in it."""
    batch = collator_for(variant, packing=False)(counting_documents(8, seed=2))
    if method in ("prompt_tuning", "p_tuning") and variant == "prefix":
        # The virtual tokens stand in front of the prefix and belong to it.
        batch["prefix_mask"] = torch.nn.functional.pad(batch["prefix_mask"], (VIRTUAL, 0), value=1)
    return batch


def train_two_steps(model, batch, lr=0.05):
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    model.train()
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def spread(first, second):
    return (first - second).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*MERGEABLE, *PROMPT_METHODS])
def test_method_trains_saves_reloads_and_merges(name, variant, tmp_path):
    torch.manual_seed(0)
    batch = batch_for(variant, name)
    base = tiny_model(variant)
    before = parameters(base)
    plain = logits(base.eval(), batch_for(variant))
    model = peft.get_peft_model(base, adapter_config(name))
    train_two_steps(model, batch)
    found = logits(model, batch)
    assert spread(found[:, -plain.shape[1] :], plain) > 1e-4
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    reloaded = peft.PeftModel.from_pretrained(tiny_model(variant), tmp_path).eval()
    assert spread(logits(reloaded, batch), found) == 0.0
    if name in PROMPT_METHODS:
        return
    merged = reloaded.merge_and_unload()
    assert type(merged).__name__ == "MiniLLMForCausalLM"
    assert parameters(merged).keys() == before.keys()
    assert spread(logits(merged.eval(), batch), found) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "prompt_tuning"])
def test_generation_with_an_adapter_equals_a_loop_without_cache(name, variant):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(variant), adapter_config(name))
    train_two_steps(model, batch_for(variant, name), lr=0.3)
    has_prefix = variant == "prefix" and name != "prompt_tuning"
    # PEFT puts virtual tokens among the inputs after generate() has laid the prefix over the prompt.
    model.config.prompt_is_prefix = has_prefix
    prompt = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    ids = prompt
    for _ in range(6):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if has_prefix:
            batch["prefix_mask"] = (torch.arange(ids.shape[1]) < 7).long().expand(2, -1)
        ids = torch.cat([ids, logits(model, batch)[:, -1].argmax(-1, keepdim=True)], dim=1)
    found = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert found.tolist() == ids.tolist()


def test_virtual_tokens_in_front_of_a_prefix_are_not_generated_from_wrongly():
    model = peft.get_peft_model(tiny_model("prefix"), adapter_config("prompt_tuning"))
    with pytest.raises(ValueError, match=r"`prefix_mask` has shape \[1, 3\]; expected \[1, 7\]"):
        model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("lora", {}, {"q_proj", "v_proj"}),
        ("lora", {"mlp_type": "mlp", "hidden_act": "gelu"}, {"q_proj", "v_proj"}),
        ("ia3", {}, {"k_proj", "v_proj", "down_proj"}),
        ("ia3", {"mlp_type": "mlp", "hidden_act": "gelu"}, {"k_proj", "v_proj", "down_proj"}),
        (
            "lora_all_linear",
            {},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (
            "lora_all_linear",
            {"mlp_type": "mlp", "hidden_act": "gelu"},
            {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
        ),
        ("layernorm_tuning", {}, {"input_layernorm", "post_attention_layernorm", "norm"}),
    ],
    ids=["lora", "lora-mlp", "ia3", "ia3-mlp", "all_linear", "all_linear-mlp", "layernorm"],
)
def test_default_targets(name, fields, expected):
    model = peft.get_peft_model(tiny_model(**fields), adapter_config(name))
    adapted = {path.split(".")[-1] for path in model.base_model.targeted_module_names}
    assert adapted == expected


@pytest.mark.mostly_thorough("prefix")
@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_in_the_trainer_from_base_to_published_model(variant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(60), collator)
    tiny_model(variant).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules="all-linear")
    trainer = make_trainer(
        peft.get_peft_model(base, config), rows, collator, tmp_path / "checkpoints", num_train_epochs=6
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    trainer.save_model(str(tmp_path / "adapter"))
    batch = collator(rows[:4])
    found = logits(trainer.model.eval(), batch)
    with trainer.model.disable_adapter():
        assert spread(logits(trainer.model, batch), logits(tiny_model(variant).eval(), batch)) == 0.0

    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert spread(logits(reloaded, batch), found) == 0.0
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert spread(logits(by_transformers, batch), found) == 0.0

    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert spread(logits(merged, batch), found) < 1e-5
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert spread(logits(published, batch), logits(merged, batch)) == 0.0
    assert not list((tmp_path / "merged").glob("adapter*"))
    prompt = torch.tensor([[1, 2, 3, 4]])
    assert published.generate(prompt, max_new_tokens=5).tolist() == merged.generate(prompt, max_new_tokens=5).tolist()


@pytest.mark.mostly_thorough("prefix-not_reentrant")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_with_gradient_checkpointing_trains_the_same(variant, reentrant, tmp_path):
    collator = collator_for(variant)
    rows = pack_dataset(counting_documents(20), collator)
    runs = []
    for arguments in ({}, checkpointing(use_reentrant=reentrant)):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(variant), adapter_config("lora"))
        trainer = make_trainer(model, rows, collator, tmp_path, max_steps=3, optim="sgd", **arguments)
        trainer.train()
        runs.append(parameters(model))
    assert largest_difference(*runs) < 1e-7
    assert largest_difference(runs[0], parameters(tiny_like(runs[0], variant))) > 1e-5


def tiny_like(names, variant):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(variant), adapter_config("lora"))
    assert parameters(model).keys() == names.keys()
    return model


NEW_TOKENS = {
    "trainable_token_indices": {"trainable_token_indices": [VOCABULARY, VOCABULARY + 1]},
    "modules_to_save": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora_on_embedding": {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
}
# LoRA on tied embeddings is left out: PEFT merges it into the shared weight, for any model.
NEW_TOKEN_CASES = [
    ("trainable_token_indices", True),
    ("trainable_token_indices", False),
    ("modules_to_save", True),
    ("modules_to_save", False),
    ("lora_on_embedding", False),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("way", "tied"), NEW_TOKEN_CASES, ids=[f"{way}-{'tied' if tied else 'untied'}" for way, tied in NEW_TOKEN_CASES]
)
def test_new_tokens_with_lora_survive_a_merge(way, variant, tied, tmp_path):
    arguments = dict(NEW_TOKENS[way])
    if not tied:
        arguments.pop("ensure_weight_tying", None)
    torch.manual_seed(0)
    base = tiny_model(variant, tie_word_embeddings=tied)
    base.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    old = base.get_input_embeddings().weight.detach().clone()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **arguments))
    documents = [[1, VOCABULARY, 5, VOCABULARY + 1, 7, 9], [VOCABULARY + 1, 3, VOCABULARY, 4]]
    batch = collator_for(variant)(documents)
    found = logits(train_two_steps(model, batch), batch)
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reloaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert spread(logits(reloaded, batch), found) < 1e-6
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert spread(logits(merged, batch), found) < 1e-5
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert spread(logits(published, batch), found) < 1e-5
    new = published.get_input_embeddings().weight.detach()
    assert spread(new[VOCABULARY:], old[VOCABULARY:]) > 1e-3
    if way == "trainable_token_indices":
        assert spread(new[:VOCABULARY], old[:VOCABULARY]) == 0.0
    assert (published.lm_head.weight is published.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_peft_itself_merges_into_both_of_two_tied_tables(target):
    """Which the pages warn of; `minillm export --adapter` unties the two first."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[target], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("causal", tie_word_embeddings=True), config).eval()
    batch = batch_for("causal")
    found = logits(model, batch)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert spread(logits(merged, batch), found) > 0.01


def test_two_adapters_are_kept_apart():
    torch.manual_seed(0)
    batch = batch_for("causal")
    model = peft.get_peft_model(tiny_model(), adapter_config("lora"), adapter_name="first")
    first = logits(train_two_steps(model, batch), batch)
    model.add_adapter("second", adapter_config("lora_all_linear"))
    model.set_adapter("second")
    second = logits(train_two_steps(model, batch), batch)
    model.set_adapter("first")
    assert spread(logits(model, batch), first) == 0.0
    model.set_adapter("second")
    assert spread(logits(model, batch), second) == 0.0 and spread(first, second) > 1e-4


def test_an_added_adapter_is_saved_with_a_card_of_its_own(tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT that is newer than the one of these tests, but works with this one.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **kwargs: None)
    model = tiny_model()
    model.add_adapter(adapter_config("lora"), "other")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "# Adapter for a MiniLLM model" in text and "q_proj, v_proj" in text and "subfolder" not in text
