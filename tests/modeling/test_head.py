"""The normalised output head, beside `h @ normalize(rows).T`: what others read of it, write to it, build around it."""

import copy
import io

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import set_module_tensor_to_device
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn import functional as F
from training_cases import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM, QuantoConfig

from minillm import MiniLLMForCausalLM
from minillm.head import NormHead

IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def normed_model(**fields):
    model = tiny_model(norm_head=True, **fields).eval()
    # Lengths far from 1 and from one another: else the rows as they are would nearly do.
    with torch.no_grad():
        model.lm_head.raw_weight.mul_(torch.linspace(0.2, 5, model.config.vocab_size)[:, None])
    return model


def rows_of(model):
    return model.state_dict()["lm_head.weight"].clone()


def expected_logits(model, rows):
    return model.model(IDS).last_hidden_state @ (rows / rows.square().sum(-1, keepdim=True).sqrt()).T


def spread(first, second):
    return (first - second).abs().max().item()


def test_weight_is_what_the_head_computes_with():
    model = normed_model()
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    target = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(2))
    rows = rows_of(model).requires_grad_()
    expected = states @ (rows / rows.square().sum(-1, keepdim=True).sqrt()).T
    (gradient,) = torch.autograd.grad((expected * target).sum(), rows)
    for found in (model.lm_head(states), states @ model.lm_head.weight.T):
        assert spread(found, expected) < 1e-5
        model.zero_grad()
        (found * target).sum().backward()
        assert spread(model.lm_head.raw_weight.grad, gradient) < 1e-5
    assert model.get_output_embeddings().bias is None
    assert not isinstance(model.lm_head, torch.nn.Linear)


def test_names_and_files_hold_the_rows_as_trained(tmp_path):
    model = normed_model()
    rows = rows_of(model)
    assert spread(rows.norm(dim=-1), torch.ones(VOCABULARY)) > 0.5
    assert dict(model.named_parameters())["lm_head.weight"] is model.lm_head.raw_weight
    assert [name for name in model.state_dict() if "lm_head" in name] == ["lm_head.weight"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(rows_of(loaded), rows) and loaded.lm_head.raw_weight.requires_grad
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert spread(loaded(IDS).logits, expected_logits(model, rows)) < 1e-5


def through_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(model):
    other = normed_model(seed=1)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, assigned])
def test_copies_hold_the_rows_as_trained(copied):
    model = normed_model()
    found = copied(model)
    assert torch.equal(rows_of(found), rows_of(model)) and torch.equal(found(IDS).logits, model(IDS).logits)


def test_the_parameter_is_found_by_its_name():
    model = normed_model()
    raw = model.lm_head.raw_weight
    assert model.get_parameter("lm_head.weight") is raw and model.lm_head.get_parameter("weight") is raw
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert adapted.get_parameter("base_model.model.lm_head.weight") is raw


def test_fresh_rows_are_initialised():
    with torch.device("meta"):
        model = MiniLLMForCausalLM(normed_model(vocab_size=500).config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.lm_head.raw_weight.fill_(torch.nan)
    model.init_weights()
    assert model.lm_head.raw_weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)


def test_an_assigned_parameter_becomes_the_rows():
    model = normed_model()
    rows = 3 * torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(3))
    model.lm_head.weight = torch.nn.Parameter(rows)
    assert torch.equal(rows_of(model), rows)
    assert spread(model(IDS).logits, expected_logits(model, rows)) < 1e-5
    other = torch.randn_like(rows)
    swapped = functional_call(model, {"lm_head.weight": other}, (IDS,)).logits
    assert spread(swapped, expected_logits(model, other)) < 1e-5
    with pytest.raises(TypeError, match="as parameter 'weight'"):
        model.lm_head.weight = other


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 4], ids=["grow", "shrink"])
def test_resizing_keeps_the_rows_as_trained(size, frozen):
    model = normed_model()
    rows, head = rows_of(model), model.lm_head.requires_grad_(not frozen)
    with torch.no_grad():
        model.resize_token_embeddings(size)
    kept = min(size, VOCABULARY)
    assert model.lm_head is head and rows_of(model).shape == (size, 32) and head.out_features == size
    assert torch.equal(rows_of(model)[:kept], rows[:kept]) and head.raw_weight.requires_grad is not frozen
    # New rows are drawn around the mean of the old ones as they are stored.
    assert spread(rows_of(model)[kept:], rows.mean(0)) < 1e-2 if size > kept else True


def test_a_failed_resize_leaves_the_head():
    model = normed_model()
    before = model(IDS).logits
    with pytest.raises(ValueError, match="to a multiple of"):
        model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=0.5)
    assert isinstance(model.lm_head, NormHead) and torch.equal(model(IDS).logits, before)


def test_a_linear_in_the_place_of_the_head_is_refused():
    model = normed_model()
    with pytest.raises(ValueError, match=r"a Linear as output embeddings.*fold_norm_head"):
        model.set_output_embeddings(torch.nn.Linear(32, VOCABULARY, bias=False))
    model.set_output_embeddings(head := NormHead(32, VOCABULARY))
    assert model.get_output_embeddings() is head


@pytest.mark.slow
def test_compiled_without_a_break():
    model = normed_model().train()
    rows = rows_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for skip in (False, True):
        expected = F.cross_entropy(expected_logits(model, rows)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(model(IDS, labels=IDS, use_cache=False).loss, model.lm_head.raw_weight)
        model.zero_grad()
        loss = compiled(IDS, labels=IDS, use_cache=False, skip_logits=skip).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        assert spread(model.lm_head.raw_weight.grad, gradient) < 1e-5


def test_exported():
    model = normed_model()
    program = torch.export.export(model, (IDS,), {"use_cache": False})
    assert torch.equal(program.state_dict["lm_head.weight"], rows_of(model))
    assert spread(program.module()(IDS, use_cache=False).logits, model(IDS).logits) < 1e-6


def test_fully_sharded_it_trains_the_same_rows(tmp_path):
    """FSDP asks the module for its parameter by attribute before the first forward."""
    model, sharded = normed_model().train(), normed_model().train()
    loss = model(IDS, labels=IDS, skip_logits=False).loss
    loss.backward()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard([sharded.model.norm, sharded.lm_head])
        fully_shard(sharded)
        found = sharded(IDS, labels=IDS).loss
        found.backward()
        assert found.item() == pytest.approx(loss.item(), abs=1e-6)
        assert torch.equal(sharded.state_dict()["lm_head.weight"].full_tensor(), rows_of(model))
        gradient = dict(sharded.named_parameters())["lm_head.weight"].grad.full_tensor()
        assert spread(gradient, model.lm_head.raw_weight.grad) < 1e-6
        with pytest.raises(ValueError, match=r"fold_norm_head\(\)`, but the head is a FSDPNormHead"):
            sharded.fold_norm_head()
    finally:
        dist.destroy_process_group()


def test_a_head_that_is_moved_without_gradients_stays_trainable():
    head = normed_model().lm_head
    with torch.no_grad():
        set_module_tensor_to_device(head, "weight", "meta")
    assert head.raw_weight.device.type == "meta" and head.raw_weight.requires_grad


def test_quantisation_leaves_the_head(tmp_path):
    model = normed_model()
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    assert "QLinear" in type(quantised.model.layers[0].mlp.up_proj).__name__
    assert spread(quantised(IDS).logits, expected_logits(quantised, rows_of(model))) < 1e-5


# Adapters.

ADAPTERS = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "target_parameters": ("LoraConfig", {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]}),
    "lora_tokens": ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [1, 2]}),
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "vera": ("VeraConfig", {"target_modules": ["v_proj", "lm_head"]}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 10}),
    "vblora": ("VBLoRAConfig", {"num_vectors": 16, "vector_length": 8}),
    "miss": ("MissConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "layernorm_tuning": ("LNTuningConfig", {}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head_is_refused(name):
    kind, arguments = ADAPTERS[name]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **{"target_modules": ["lm_head"], **arguments})
    with pytest.raises((ValueError, TypeError), match=r"NormHead|norm_head=True"):
        peft.get_peft_model(normed_model(), config)


def test_osf_passes_over_the_head():
    config = peft.OSFConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"])
    adapted = peft.get_peft_model(normed_model(), config)
    assert [name for name, _ in adapted.named_parameters() if "lm_head" in name] == ["base_model.model.lm_head.weight"]
    assert any("q_proj" in name and "osf" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("name", ["lora", "target_parameters"])
def test_the_refusal_says_what_to_do(name):
    kind, arguments = ADAPTERS[name]
    with pytest.raises(ValueError, match=r"norm_head=True.*`model\.fold_norm_head\(\)`"):
        peft.get_peft_model(normed_model(), getattr(peft, kind)(**{"target_modules": ["lm_head"], **arguments}))


def train(model):
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(input_ids=IDS).logits


BESIDES = {
    "all_linear": {"target_modules": "all-linear"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("way", BESIDES)
def test_adapters_beside_the_head_survive_saving_and_merging(way, tmp_path):
    base = normed_model()
    rows = rows_of(base)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **BESIDES[way]))
    found = train(model)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(normed_model(), tmp_path / "adapter")
    assert torch.equal(reloaded(input_ids=IDS).logits, found)
    merged = reloaded.merge_and_unload()
    assert isinstance(merged.lm_head, NormHead) and torch.equal(rows_of(merged), rows) == (way == "all_linear")
    assert spread(merged(IDS).logits, found) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert spread(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, found) < 1e-5


# The head made plain.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_head_is_a_plain_one_with_equal_logits(dtype, tmp_path):
    model = normed_model().to(dtype)
    before = model(IDS).logits
    assert model.fold_norm_head() is model and model.fold_norm_head() is model
    assert type(model.lm_head) is torch.nn.Linear and model.config.norm_head is False
    assert torch.equal(model(IDS).logits, before)
    assert spread(model.lm_head.weight.float().norm(dim=-1), torch.ones(VOCABULARY)) < 1e-2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_a_frozen_head_stays_frozen_when_folded():
    model = normed_model()
    model.lm_head.requires_grad_(False)
    assert not model.fold_norm_head().lm_head.weight.requires_grad


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft", "target_parameters"])
def test_an_adapter_on_a_folded_head_survives_saving_and_merging(name, tmp_path):
    kind, arguments = ADAPTERS[name]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **{"target_modules": ["lm_head"], **arguments})
    model = peft.get_peft_model(normed_model().fold_norm_head(), config)
    found = train(model)
    assert spread(found, normed_model()(IDS).logits) > 1e-2
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(normed_model().fold_norm_head(), tmp_path)
    assert spread(reloaded(input_ids=IDS).logits, found) < 1e-6
    assert spread(reloaded.merge_and_unload()(IDS).logits, found) < 1e-5


def with_hook(model):
    model.lm_head.register_forward_hook(lambda *call: None)


def with_copy(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize(("change", "words"), [(with_hook, "has hooks"), (with_copy, "ModulesToSaveWrapper")])
def test_what_cannot_be_folded_is_refused_and_left(change, words):
    model = normed_model()
    change(model)
    head, before = model.lm_head, model(IDS).logits
    with pytest.raises(ValueError, match=words):
        model.fold_norm_head()
    assert model.lm_head is head and model.config.norm_head and torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_zeros_scores_zero(dtype):
    model = normed_model().to(dtype)
    with torch.no_grad():
        model.lm_head.raw_weight[3] = 0
        logits = model(IDS).logits
    assert torch.isfinite(logits).all() and (logits[..., 3] == 0).all() and logits[..., 4].abs().max() > 0
