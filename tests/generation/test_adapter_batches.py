"""Batches whose rows have adapters of their own: each row equals a plain model into which its adapter was merged."""

import copy

import peft
import pytest
import torch
from training_cases import VARIANTS, VOCABULARY, tiny_model

LORAS = {
    "default": {},
    "all_linear": {"r": 8, "target_modules": "all-linear", "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
}
ROWS = ["default", "__base__", "all_linear", "embedding", "head", "default"]
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def lora(name):
    """By its name, behind which a 2 may stand: an adapter of the same kind with other weights."""
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **LORAS[name.removesuffix("2")]})


def adapted(variant, names):
    """A model with these adapters, as loud as the base itself."""
    model = peft.get_peft_model(tiny_model(variant), lora(names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in sorted(model.named_parameters()):
            if any(f".{name}" in path for name in names):
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                # PEFT draws from torch's own generator, which other tests leave anywhere.
                parameter.copy_(noise if "lora_" in path else parameter + noise)
    return model.eval()


def merged(model, variant, name):
    """A plain model of ours, without anything of PEFT."""
    if name == "__base__":
        return tiny_model(variant).eval()
    model = copy.deepcopy(model)
    model.set_adapter(name)
    return model.merge_and_unload(adapter_names=[name]).eval()


def batch_for(variant, rows):
    """Rows with left padding of 0, 1, 2, 0, ... tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (len(rows), 9), generator=generator)
    mask = (torch.arange(9) >= torch.arange(len(rows))[:, None] % 3).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if variant == "prefix":
        batch["prefix_mask"] = (torch.arange(9) < 5).long() * mask
    return batch


def row_of(batch, row):
    return {name: tensor[row, batch["attention_mask"][row].bool()][None] for name, tensor in batch.items()}


def assert_rows_equal_merged_models(model, variant, rows):
    batch = batch_for(variant, rows)
    with torch.no_grad():
        found = model(**batch, adapter_names=rows).logits
        for row, name in enumerate(rows):
            expected = merged(model, variant, name)(**row_of(batch, row)).logits[0]
            assert (found[row, batch["attention_mask"][row].bool()] - expected).abs().max() < 1e-5, name
    assert (found[0, -1] - found[-1, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_has_the_logits_of_its_adapter_alone(variant):
    assert_rows_equal_merged_models(adapted(variant, ["default", "all_linear", "embedding", "head"]), variant, ROWS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["saved_head", "tokens"])
def test_rows_with_trained_weights_of_the_base(name, variant):
    assert_rows_equal_merged_models(adapted(variant, [name, f"{name}2"]), variant, [name, "__base__", f"{name}2"])


@pytest.mark.parametrize("name", ["saved_head", "tokens"])
def test_trained_weights_of_the_base_mix_with_their_like_only(name):
    model = adapted("causal", [name, "default"])
    with pytest.raises(KeyError, match="default"):
        model(input_ids=torch.tensor([[1, 2, 3]]), adapter_names=["default"])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_generates_what_its_adapter_alone_does(variant, beams):
    model = adapted(variant, ["default", "all_linear", "embedding", "head"])
    batch = batch_for(variant, ROWS)
    batch.pop("prefix_mask", None)  # generate() takes the prompt as the prefix.
    found = model.generate(**batch, **GENERATION, num_beams=beams, adapter_names=ROWS)
    assert len({tuple(row) for row in found[:, -6:].tolist()}) > 1
    for row, name in enumerate(ROWS):
        alone = row_of(batch, row)
        expected = merged(model, variant, name).generate(**alone, **GENERATION, num_beams=beams)
        assert found[row, -expected.shape[1] :].tolist() == expected[0].tolist(), name


def with_second(**arguments):
    return lambda model: model.add_adapter("second", peft.LoraConfig(**arguments))


REFUSED = {
    "training": (ValueError, "training mode", lambda model: model.train()),
    "merged": (ValueError, "merged adapters", lambda model: model.merge_adapter()),
    "unknown": (ValueError, "non-existing adapter", lambda model: None),
    "dora": (ValueError, "DoRA", with_second(use_dora=True)),
    "norm": (TypeError, "Mixed batching", with_second(modules_to_save=["norm"])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_page_calls_refused_is(name):
    model = adapted("causal", ["default"])
    error, message, change = REFUSED[name]
    change(model)
    names = ["default", "default" if name in ("training", "merged") else "second"]
    if "second" in model.peft_config:
        model.set_adapter("second")
    with pytest.raises(error, match=message):
        model(input_ids=torch.tensor([[1, 2], [3, 4]]), adapter_names=names)


def test_fewer_names_than_rows_are_refused_and_stay_on_the_model():
    """The second half is as the page warns; once PEFT takes its hooks off, the page is out of date."""
    model = adapted("causal", ["default"])
    ids = torch.tensor([[1, 2], [3, 4]])
    for arguments in ({"adapter_names": ["default"]}, {}):
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model(input_ids=ids, **arguments)


OTHERS = {"ia3": ("IA3Config", {"init_ia3_weights": False}), "loha": ("LoHaConfig", {"init_weights": False})}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_methods_drop_the_names(name):
    """As the page warns; once PEFT honours or refuses them, the page is out of date."""
    kind, arguments = OTHERS[name]
    model = peft.get_peft_model(tiny_model(), getattr(peft, kind)(task_type="CAUSAL_LM", **arguments)).eval()
    ids = torch.tensor([[1, 2, 3]])
    active = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, adapter_names=["__base__"]).logits, active)
    with model.disable_adapter():
        assert (model(input_ids=ids).logits - active).abs().max() > 1e-3
