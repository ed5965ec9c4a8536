"""Quantised models: each equals a plain model with its rounded weights, and Llama quantised in the same way.

bitsandbytes and torchao are for these tests alone, since either would slow down the start of every other process:
`pip install bitsandbytes==0.50.2 torchao==0.18.0`, as `.ci/run` does.
"""

import importlib.util
import os

import peft
import pytest
import torch
from docs_cases import assert_shown, code_of
from training_cases import (
    VARIANTS,
    VOCABULARY,
    collator_for,
    counting_documents,
    largest_difference,
    llama_twin,
    losses,
    make_trainer,
    tiny_model,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from minillm import MiniLLMForCausalLM
from minillm.training.collators import pack_dataset

METHODS = ("bnb_8bit", "bnb_4bit", "torchao_int8", "torchao_int8_dynamic", "torchao_int4", "quanto_int8")
# These round activations too, so that their products are not those of the rounded weights alone.
ROUNDS_ACTIVATIONS = ("bnb_8bit", "torchao_int8_dynamic")
KINDS = {**{name: {} for name in VARIANTS}, "norm_head": {"norm_head": True}, "tied": {"tie_word_embeddings": True}}
IDS = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def packages():
    missing = [name for name in ("bitsandbytes", "torchao") if importlib.util.find_spec(name) is None]
    if missing and "CI" in os.environ:
        pytest.fail(f"CI lacks {missing}")
    if missing:
        pytest.skip(f"needs pip install {' '.join(missing)}")


def quantization(method):
    if method == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if method == "bnb_4bit":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    if method == "quanto_int8":
        return QuantoConfig(weights="int8")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if method == "torchao_int4":
        return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    kind = Int8DynamicActivationInt8WeightConfig if method == "torchao_int8_dynamic" else Int8WeightOnlyConfig
    return TorchAoConfig(kind())


def model_for(kind, **fields):
    variant = kind if kind in VARIANTS else "causal"
    return tiny_model(variant, hidden_size=64, intermediate_size=128, **KINDS.get(kind, {}), **fields).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        model_for(kind).save_pretrained(root / kind)
    llama_twin(model_for("causal")).save_pretrained(root / "llama")
    return root


def load(folder, method):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization(method), device_map="cpu")


def inputs_for(kind):
    prefix_mask = (torch.arange(IDS.shape[1]) < 5).long().expand_as(IDS)
    return {"input_ids": IDS, **({"prefix_mask": prefix_mask} if kind == "prefix" else {})}


@torch.no_grad()
def logits(model, kind="causal"):
    return model(**inputs_for(kind), use_cache=False).logits


def rounded(module):
    """The weight of a layer of any of the libraries, in float32. Before the first forward pass, which on some CPUs has
    bitsandbytes lay out its weights anew."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if type(weight).__name__ == "Int8Params":
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight.dequantize().float() if hasattr(weight, "dequantize") else weight.float()


def rounded_copy(quantised, kind, **fields):
    """A plain model with the rounded weights of a quantised one."""
    plain = model_for(kind, **fields)
    layers = dict(quantised.named_modules())
    changed = 0
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                weight = rounded(layers[name])
                changed += not torch.equal(module.weight, weight)
                module.weight.copy_(weight)
    assert changed == 2 * 7
    return plain


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_model_is_a_model_of_rounded_weights(method, kind, folders):
    quantised = load(folders / kind, method)
    plain = rounded_copy(quantised, kind)
    # In training bitsandbytes multiplies in the dtype that it was told; in evaluation, on some CPUs, in bfloat16.
    found = logits(quantised.train(), kind)
    assert relative(found, logits(plain, kind)) < (0.03 if method in ROUNDS_ACTIVATIONS else 1e-5)
    assert relative(found, logits(model_for(kind), kind)) > 1e-3
    for name in ("embed_tokens", "norm"):
        assert torch.equal(getattr(quantised.model, name).weight, getattr(plain.model, name).weight)
    head = model_for(kind).lm_head.state_dict()["weight"]
    assert torch.equal(quantised.lm_head.state_dict()["weight"], head), "the head is left as it was"


@pytest.mark.parametrize("method", METHODS)
def test_quantised_logits_equal_those_of_llama(method, folders):
    twin, ours = load(folders / "llama", method), load(folders / "causal", method)
    assert type(twin).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(ours), logits(twin))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "quanto_int8"])
def test_a_quantised_model_loads_as_it_was_saved(method, kind, folders, tmp_path):
    quantised = load(folders / kind, method)
    quantised.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert type(loaded) is MiniLLMForCausalLM
    assert torch.equal(logits(loaded, kind), logits(quantised, kind))


def test_saving_after_a_forward_pass_changes_no_more_than_it_does_of_llama(folders, tmp_path):
    """On CPUs where bitsandbytes lays out 4 bits anew, they are rounded once more; elsewhere nothing changes."""
    found = []
    for name in ("causal", "llama"):
        model = load(folders / name, "bnb_4bit")
        before = logits(model)
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map="cpu")
        found.append((logits(loaded) - before, logits(model) - before))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_quanto_refuses_to_save(folders, tmp_path):
    with pytest.raises(ValueError, match="quantized with quanto and is not serializable"):
        load(folders / "causal", "quanto_int8").save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_generation_equals_a_loop_without_a_cache(method, kind, folders):
    quantised = load(folders / kind, method)
    ids = IDS[:1, :6]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = quantised.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for _ in range(6):
        extra = {"prefix_mask": (torch.arange(ids.shape[1]) < 6).long()[None]} if kind == "prefix" else {}
        with torch.no_grad():
            ids = torch.cat([ids, quantised(ids, **extra, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize("method", ["bnb_8bit", "bnb_4bit", "torchao_int8"])
def test_experts_stay_as_they_were(method, tmp_path):
    model = model_for("causal", mlp_type="moe", num_local_experts=4)
    model.save_pretrained(tmp_path)
    experts = load(tmp_path, method).model.layers[0].mlp.experts
    for name, weight in model.model.layers[0].mlp.experts.named_parameters():
        assert torch.equal(getattr(experts, name), weight)


def test_torchaos_own_layout_of_4_bits_is_not_for_cpus(folders):
    from torchao.quantization import Int4WeightOnlyConfig

    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=32))
    with pytest.raises((ImportError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(folders / "causal", quantization_config=config, device_map="cpu")


def adapted(base):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(base, config)


def gradients_of(model, batch):
    model.train()(**batch).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", VARIANTS)
def test_gradients_of_qlora_are_those_of_lora_on_the_rounded_weights(kind, folders):
    batch = collator_for(kind)(counting_documents(8))
    quantised = load(folders / kind, "bnb_4bit")
    plain = adapted(rounded_copy(quantised, kind))
    found = gradients_of(adapted(peft.prepare_model_for_kbit_training(quantised)), batch)
    expected = gradients_of(plain, batch)
    assert len(found) == 2 * 7 * 2 and all("lora" in name for name in found)
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert largest_difference(found, expected) < 1e-5 * scale


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("method", ["bnb_8bit", "bnb_4bit"])
def test_qlora_trains_adapters_only_and_merges(method, kind, folders, tmp_path):
    collator = collator_for(kind)
    rows = pack_dataset(counting_documents(60), collator)
    base = peft.prepare_model_for_kbit_training(load(folders / kind, method))
    layer = base.model.layers[0].mlp.up_proj.weight
    before = layer.data.clone()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules="all-linear")
    trainer = make_trainer(peft.get_peft_model(base, config), rows, collator, tmp_path, num_train_epochs=5)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert torch.equal(layer.data, before)
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora" in name for name in trained)
    trainer.model.save_pretrained(tmp_path / "adapter")
    expected = logits(trainer.model.train(), kind)

    def merged_into(base):
        return peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().float().eval()

    merged = merged_into(load(folders / kind, method).dequantize())
    difference = relative(logits(merged, kind), expected)
    assert difference < (0.03 if method in ROUNDS_ACTIVATIONS else 0.01)
    assert difference < relative(logits(merged_into(model_for(kind)), kind), expected)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded, kind), logits(merged, kind))


@pytest.mark.parametrize("kind", VARIANTS)
def test_training_aware_of_quantisation_ends_as_the_model_that_it_trained(kind, folders, tmp_path):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    target = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    model = model_for(kind)
    plain = logits(model, kind)
    quantize_(model, QATConfig(target, step="prepare"), filter_fn=is_in_a_layer)
    prepared = logits(model, kind)
    assert relative(prepared, plain) > 1e-3
    # Before a step is taken, what the training sees is what quantising the folder gives.
    assert relative(prepared, logits(quantised_afterwards(folders / kind, target), kind)) < 1e-5
    collator = collator_for(kind)
    rows = pack_dataset(counting_documents(60), collator)
    trainer = make_trainer(model, rows, collator, tmp_path, num_train_epochs=4)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    fake = logits(model.eval(), kind)
    quantize_(model, QATConfig(target, step="convert"), filter_fn=is_in_a_layer)
    assert "Intx" in type(model.model.layers[0].mlp.up_proj.weight).__name__
    assert relative(logits(model, kind), fake) < 1e-6


def is_in_a_layer(module, name):
    """All but the head, which transformers leaves as it is when it quantises a folder."""
    return isinstance(module, torch.nn.Linear) and "layers" in name


def quantised_afterwards(folder, target):
    config = TorchAoConfig(target)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of("quantization"), "quantization.md", "exec"), {"__name__": "__main__"})
    assert_shown("quantization", capsys.readouterr().out)
