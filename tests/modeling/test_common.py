"""What transformers demands of any model: its config, its parameters, saving and loading, training."""

import copy
import dataclasses
import inspect
import json
import logging

import pytest
import torch
from matrix_cases import VOCAB
from safetensors import safe_open
from variant_cases import GENERATIVE, VARIANTS, assert_equal, config_of, inputs_of, model_of, tokens

from minillm import (
    MiniLLMConfig,
    MiniLLMForCausalLM,
    MiniLLMForQuestionAnswering,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
    MiniLLMModel,
    MiniLLMPreTrainedModel,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS)
CLASSES = (
    MiniLLMModel,
    MiniLLMForCausalLM,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
    MiniLLMForQuestionAnswering,
)
every_class = pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)


def logits_of(model, **more):
    with torch.no_grad():
        outputs = model(**inputs_of(model.config), **more)
    return outputs.logits if "logits" in outputs else outputs[0]


def gradients_of(model):
    """Gradients by parameter name of the causal loss in training mode."""
    model.train()
    model.zero_grad()
    inputs = inputs_of(model.config)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- config ---


@every_variant
def test_a_config_survives_a_file_and_a_dictionary(variant, tmp_path):
    config = config_of(variant, num_labels=5, problem_type="regression", id2label={0: "a", 1: "b", 2: "c"})
    config.save_pretrained(tmp_path)
    expected = config.to_dict()
    assert MiniLLMConfig.from_pretrained(tmp_path).to_dict() == expected
    assert MiniLLMConfig(**json.loads((tmp_path / "config.json").read_text())).to_dict() == expected
    assert MiniLLMConfig.from_dict(expected).to_dict() == expected
    assert copy.deepcopy(config).to_dict() == expected
    assert MiniLLMConfig.from_pretrained(tmp_path, use_cache=False).use_cache is False


def test_every_field_stands_in_the_signature():
    named = set(inspect.signature(MiniLLMConfig.__init__).parameters)
    assert {field.name for field in dataclasses.fields(MiniLLMConfig)} - named <= {"transformers_version"}
    assert {"hidden_size", "rope_parameters", "use_cache", "pad_token_id", "tie_word_embeddings"} <= named


def test_the_default_config_logs_nothing(caplog, monkeypatch):
    for name in ("transformers", "minillm"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with caplog.at_level(logging.DEBUG):
        MiniLLMConfig()
    assert not caplog.records


def test_attributes_can_be_assigned_after_construction():
    config = config_of("causal")
    for name, value in {
        "is_decoder": True,
        "eos_token_id": None,
        "tie_word_embeddings": True,
        "gradient_checkpointing": True,
        "output_hidden_states": True,
        "an_unknown_attribute": 1,
    }.items():
        setattr(config, name, value)
        assert getattr(config, name) == value
    model = MiniLLMForCausalLM(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model(tokens()).hidden_states) == 3


def test_a_meaningless_assignment_is_refused_when_the_model_is_built():
    config = config_of("alibi")
    config.rope_interleaved = True
    with pytest.raises(ValueError, match=r"rope_interleaved.*position_embedding_type"):
        MiniLLMModel(config)


# --- names ---


@every_class
def test_the_base_model_stands_under_its_prefix(model_class):
    model = model_class(config_of("causal"))
    assert isinstance(model.base_model, MiniLLMModel)
    assert (model.base_model is model) == (model_class is MiniLLMModel)
    assert model.get_input_embeddings() is model.base_model.embed_tokens
    assert model.dummy_inputs is not None
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"


def test_a_classifier_dropout_of_null_falls_back():
    for value, expected in ((None, 0.25), (0.5, 0.5)):
        config = config_of("causal", classifier_dropout=value, hidden_dropout=0.25)
        assert MiniLLMForTokenClassification(config).dropout.p == expected


@every_class
@every_variant
def test_every_tensor_is_a_parameter_or_a_buffer_and_the_plans_match(variant, model_class):
    model = model_class(config_of(variant))
    for name, module in model.named_modules():
        loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not loose, f"{name} holds plain tensors: {loose}"
    named = [*model.base_model.named_modules(), *model.base_model.named_parameters()]
    names = {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in named}
    assert set(model.config.base_model_tp_plan) <= names


@every_class
@every_variant
def test_initial_weights_come_from_init_weights_alone(variant, model_class, poisoned_memory, monkeypatch):
    # The same draws for a module whenever its turn comes: construction and loading visit them in different orders.
    original = MiniLLMPreTrainedModel._init_weights

    def seeded(self, module):
        torch.manual_seed(sum(map(ord, str(module))))
        original(self, module)

    monkeypatch.setattr(MiniLLMPreTrainedModel, "_init_weights", seeded)
    constructed = model_class(config_of(variant))
    loaded = model_class.from_pretrained(None, config=config_of(variant), state_dict={})
    expected = dict([*constructed.named_parameters(), *constructed.named_buffers()])
    got = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.isfinite().all() and torch.equal(got[name], tensor), name


# --- gradients ---


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    for name, gradient in gradients_of(model_of(variant)).items():
        assert gradient is not None, name
        # A key's bias shifts a whole row of scores where nothing rotates it, so the softmax forgets it.
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@every_variant
def test_gradient_checkpointing_changes_no_gradient(variant, reentrant):
    model = model_of(variant)
    expected = gradients_of(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    got = gradients_of(model)
    handle.remove()
    assert len(calls) == 2
    for name, gradient in expected.items():
        assert_equal(got[name], gradient)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_input_gradients_can_be_required_for_adapters_under_checkpointing():
    model = model_of("prefix-alibi")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.self_attn.q_proj" in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    assert gradients_of(model)["model.layers.0.self_attn.q_proj.weight"].abs().max() > 0


@every_variant
def test_a_model_learns_a_text_by_heart(variant):
    torch.manual_seed(0)
    model = MiniLLMForCausalLM(config_of(variant)).train()
    inputs = inputs_of(model.config, batch=2, length=12)
    inputs["input_ids"] = torch.stack([torch.randperm(VOCAB - 3)[:12] + 3 for _ in range(2)])
    # A bidirectional model, and a prefix, see the token to predict: only what follows the prefix is learned.
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    if variant in GENERATIVE:
        prompt = {"input_ids": inputs["input_ids"][:, :5]}
        if model.config.attention_type == "prefix":
            prompt["prefix_mask"] = inputs["prefix_mask"][:, :5]
        if "block_position_ids" not in inputs:
            generated = model.eval().generate(**prompt, max_new_tokens=7, do_sample=False, eos_token_id=None)
            assert torch.equal(generated, inputs["input_ids"])


# --- saving, loading, resizing ---


@every_class
@every_variant
def test_a_saved_model_loads_equal_into_poisoned_memory(variant, model_class, tmp_path, poisoned_memory):
    model = model_of(variant, model_class)
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    assert torch.equal(logits_of(loaded), logits_of(model))
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[name], buffer)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_stored_only_if_it_is_not_the_embedding(tied, tmp_path):
    model = model_of("causal", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = list(file.keys())
    assert ("lm_head.weight" in stored) != tied
    loaded = MiniLLMForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_base_and_heads_load_one_another(tmp_path):
    language_model = model_of("gpt2")
    language_model.save_pretrained(tmp_path / "lm")
    base, report = MiniLLMModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(logits_of(base), logits_of(language_model.model))
    base.save_pretrained(tmp_path / "base")
    head, report = MiniLLMForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=4, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"score.weight"}
    assert head.score.weight.shape == (4, 32) and head.score.weight.isfinite().all()


def test_mismatched_shapes_load_only_on_request(tmp_path):
    model_of("causal").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MiniLLMForCausalLM.from_pretrained(tmp_path, vocab_size=VOCAB + 4)
    loaded = MiniLLMForCausalLM.from_pretrained(tmp_path, vocab_size=VOCAB + 4, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape[0] == VOCAB + 4 and loaded.lm_head.weight.isfinite().all()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
@pytest.mark.parametrize("variant", ["causal", "prefix-alibi", "prefix-glm_2d"])
def test_device_maps(variant, device_map, tmp_path):
    model = model_of(variant)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MiniLLMForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("variant", ["causal", "prefix-alibi", "deepnorm-layernorm-geglu", "prefix-glm_2d"])
def test_half_precision_is_stored_and_loaded_as_such(variant, tmp_path):
    model_of(variant).save_pretrained(tmp_path / "wide")
    narrow = MiniLLMForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    again = MiniLLMForCausalLM.from_pretrained(tmp_path / "narrow")
    assert narrow.dtype == again.dtype == torch.bfloat16
    assert torch.equal(logits_of(again), logits_of(narrow))
    wide = MiniLLMForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    assert_equal(logits_of(wide), logits_of(narrow).float(), tolerance=0.15)


HEADS = {"tied": {"tie_word_embeddings": True}, "untied": {}, "norm_head": {"norm_head": True}}


@pytest.mark.parametrize("size", [VOCAB + 5, VOCAB - 4], ids=["grow", "shrink"])
@pytest.mark.parametrize("head", HEADS)
def test_resizing_the_vocabulary_keeps_the_rows_that_stay(head, size, tmp_path):
    model = model_of("causal", **HEADS[head])
    input_ids = tokens() % (VOCAB - 4)
    before = model(input_ids).logits.detach()
    head_class = type(model.lm_head)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.vocab_size == size == model.get_output_embeddings().out_features
    assert type(model.lm_head) is head_class
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head == "tied")
    logits = model(input_ids, labels=input_ids).logits
    kept = min(size, VOCAB)
    assert logits.shape[-1] == size
    assert_equal(logits[..., :kept], before[..., :kept])
    model(input_ids, labels=input_ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.shape[0] == size
    model.save_pretrained(tmp_path)
    loaded = MiniLLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, logits)


def test_post_init_again_leaves_the_weights():
    model = model_of("deepnorm-layernorm-geglu")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.post_init()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("variant", ["prefix-alibi", "rope_2d", "window-gqa"])
def test_a_copy_computes_the_same(variant):
    model = model_of(variant)
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
