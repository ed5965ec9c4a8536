"""Mixture of experts beside transformers' Mixtral, with the same weights, and beside the naive twin."""

import pytest
import torch
from matrix_cases import assert_close, batch, double_weights, loud_model, real_tokens, tiny_config
from moe_cases import mixtral_twin
from reference import reference_greedy, reference_logits, router_loss
from transformers import AutoModelForCausalLM, CompileConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.output_capturing import OutputRecorder
from variants import fields_of

from minillm import MiniLLMForCausalLM, MiniLLMForQuestionAnswering, MiniLLMForSequenceClassification, MiniLLMModel
from minillm.loss import load_balancing_loss
from minillm.publishing.description import describe

MOE = {**fields_of("moe"), "router_aux_loss_coef": 0.3}
EXPERTS = ("eager", "grouped_mm", "batched_mm")


def build(**fields):
    return loud_model(tiny_config(**{**MOE, "num_key_value_heads": 2, "eos_token_id": None, **fields}))


def padded():
    """Left and right padding; labels only where both a token and its predecessor are real."""
    ids = torch.randint(1, 19, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": ids.masked_fill(mask * before == 0, -100),
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(model, twin, losses):
    expected = gradients(twin, losses[1])
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients(model, losses[0]).items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


# --- Mixtral ---


@pytest.mark.parametrize("widths", [(32, 3), (32, 10), (32, 12), (36, 24)], ids=str)
def test_widths_that_the_grouped_kernel_does_not_take(widths):
    """It fails in the midst of a forward over rows that are no multiple of 16 bytes."""
    fields = {"hidden_size": widths[0], "intermediate_size": widths[1], "head_dim": 8}
    model = build(**fields)
    assert model.config._experts_implementation == "eager"
    assert torch.isfinite(build(**fields).bfloat16()(**padded()).logits).all()
    weights = double_weights(model)
    inputs = {name: tensor for name, tensor in padded().items() if name != "labels"}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = reference_logits(model.config, weights, **inputs)
        assert_close(model(**inputs).logits[real], expected[real], "logits")
    if widths[1] % 4:
        with pytest.raises(ValueError, match=r"'grouped_mm' with `hidden_size=32` and `intermediate_size="):
            model.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_everything_equals_mixtral(top_k, experts, items):
    model = build(num_experts_per_tok=top_k, output_router_logits=True)
    twin = mixtral_twin(model)
    inputs = padded()
    labels = inputs["labels"].clone()
    for each in (model, twin):
        each.set_experts_implementation(experts)
        assert each.config._experts_implementation == experts
    got, expected = (each(**inputs, num_items_in_batch=items) for each in (model, twin))
    real = inputs["attention_mask"].bool()
    assert_close(got.logits[real], expected.logits[real], "logits")
    for layer, other in zip(got.router_logits, expected.router_logits, strict=True):
        assert_close(layer[real.flatten()], other[real.flatten()], "router logits")
    assert_close(got.aux_loss, expected.aux_loss, "auxiliary loss")
    assert_close(got.loss, expected.loss, "loss")
    assert_same_gradients(model, twin, (got.loss, expected.loss))
    assert torch.equal(inputs["labels"], labels)
    assert list(got.keys()) == list(expected.keys())


def test_without_router_logits_there_is_no_auxiliary_loss():
    model = build()
    twin = mixtral_twin(model)
    got, expected = (each(**padded()) for each in (model, twin))
    assert got.aux_loss is None and got.router_logits is None
    assert_close(got.loss, expected.loss, "loss")
    with_router = model(**padded(), output_router_logits=True)
    assert_close(with_router.loss, got.loss + 0.3 * with_router.aux_loss, "loss")
    model.config.output_router_logits = True
    assert model(**padded(), output_router_logits=False).aux_loss is None


def test_jitter_equals_mixtral_and_is_off_at_inference():
    model = build(router_jitter_noise=0.3, output_router_logits=True)
    twin = mixtral_twin(model)
    plain = build(output_router_logits=True)
    assert torch.equal(model(**padded()).logits, plain(**padded()).logits)
    outputs = []
    for each in (model.train(), twin.train()):
        torch.manual_seed(5)
        outputs.append(each(**padded()))
    got, expected = outputs
    assert_close(got.loss, expected.loss, "loss")
    assert_same_gradients(model, twin, (got.loss, expected.loss))
    assert (got.loss - plain(**padded()).loss).abs() > 1e-3


@pytest.mark.parametrize("wiring", [{"parallel_residual": True}, {"norm_placement": "post"}], ids=str)
def test_jitter_leaves_the_stream_that_others_read(wiring):
    """Attention's gradient, and the residual, need what the router's noise is multiplied into."""
    model = build(router_jitter_noise=0.3, **wiring).train()
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, _: seen.append(args[0].clone()))
    handle_before = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**padded()).loss.backward()
    handle.remove()
    handle_before.remove()
    assert torch.equal(*seen)


@pytest.mark.parametrize("cache", ["dynamic", "static", "compiled", None])
@pytest.mark.parametrize("fields", [{}, {"output_router_logits": True}, {"num_experts_per_tok": 1}], ids=str)
def test_greedy_text_equals_mixtral_and_the_naive_loop(fields, cache):
    torch._dynamo.reset()
    model = build(pad_token_id=0, **fields)
    inputs = {"input_ids": padded()["input_ids"][:2], "attention_mask": padded()["attention_mask"][:2]}
    options = {"max_new_tokens": 6, "do_sample": False}
    twin = mixtral_twin(model)
    twin.config.output_router_logits = False  # with it Mixtral fails on a batch and a cache
    expected = twin.generate(**inputs, **options)
    kind = {"dynamic": {}, None: {"use_cache": False}}.get(cache, {"cache_implementation": "static"})
    if cache == "compiled":
        kind["compile_config"] = CompileConfig(backend="eager", fullgraph=True, mode=None)
        kind["compile_config"]._compile_all_devices = True
    got = model.generate(**inputs, **options, **kind)
    assert torch.equal(got, expected)
    with torch.no_grad():
        naive = reference_greedy(model.config, double_weights(model), **inputs, max_new_tokens=6)
    assert got[:, 8:].tolist() == naive


def test_the_recorder_and_the_names_are_mixtrals():
    model = build()
    assert isinstance(MiniLLMForCausalLM._can_record_outputs["router_logits"], OutputRecorder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".layers.0.mlp." in name}
    assert shapes == {
        "model.layers.0.mlp.gate.weight": (4, 32),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 48, 32),
        "model.layers.0.mlp.experts.down_proj": (4, 32, 24),
    }


# --- the load-balancing loss ---


def some_router_logits(layers=3, rows=12, experts=5):
    generator = torch.Generator().manual_seed(6)
    return tuple(2 * torch.randn(rows, experts, generator=generator) for _ in range(layers))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_loss_equals_the_twin_and_mixtrals(top_k, masked):
    logits = some_router_logits()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]])
    got = load_balancing_loss(logits, top_k, mask if masked else None)
    assert_close(got, router_loss(logits, top_k, mask if masked else torch.ones_like(mask)), "twin")
    assert_close(got, load_balancing_loss_func(logits, 5, top_k, mask if masked else None), "Mixtral")


def test_the_loss_by_hand():
    """Two tokens, two experts: both go to expert 0, whose mean probability is 3/4: 2 * (1 * 3/4 + 0 * 1/4)."""
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    assert load_balancing_loss((logits,), 1).item() == pytest.approx(1.5)
    # Alike: each expert has half of the tokens and half of the probability.
    assert load_balancing_loss((torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log(),), 1).item() == pytest.approx(1.0)
    assert load_balancing_loss((logits,), 2).item() == pytest.approx(2.0)


def test_columns_of_cached_tokens_do_not_count():
    logits = some_router_logits()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]])
    cached = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], dim=1)
    assert torch.equal(load_balancing_loss(logits, 2, cached), load_balancing_loss(logits, 2, mask))
    assert load_balancing_loss(logits, 2, torch.zeros_like(mask)) == 0
    four = torch.ones(2, 1, 6, 6)
    assert torch.equal(load_balancing_loss(logits, 2, four), load_balancing_loss(logits, 2))


# --- in company ---


@pytest.mark.parametrize("layout", ["left_padding", "hole", "packing", "packing_by_positions"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"attention_type": "prefix"}, {"attention_type": "prefix", "position_embedding_type": "alibi"}],
    ids=["causal", "prefix", "prefix_alibi"],
)
def test_the_loss_of_a_padded_or_packed_batch_is_that_of_its_real_tokens(fields, layout):
    model = build(output_router_logits=True, **fields)
    inputs = batch(model.config, layout)
    outputs = model(**inputs, labels=inputs["input_ids"])
    real = real_tokens(inputs)
    logits = tuple(layer.detach().double() for layer in outputs.router_logits)
    assert_close(outputs.aux_loss, router_loss(logits, 2, real), "auxiliary loss")
    without = model(**inputs, labels=inputs["input_ids"], output_router_logits=False)
    assert_close(outputs.loss, without.loss + 0.3 * outputs.aux_loss, "loss")
    if layout == "left_padding":
        noise = inputs["input_ids"].clone()
        noise[~real] = (noise[~real] + 5) % 19
        assert_close(model(**{**inputs, "input_ids": noise}).aux_loss, outputs.aux_loss, "padding")


def test_packed_documents_route_as_alone():
    model = build(output_router_logits=True)
    ids = padded()["input_ids"]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    packed = model(ids[:1], document_ids=documents).router_logits
    alone = [model(part).router_logits for part in (ids[:1, :3], ids[:1, 3:])]
    for layer, first, second in zip(packed, *alone, strict=True):
        assert_close(layer, torch.cat([first, second]), "router logits")


def test_checkpointing_keeps_the_router_s_gradient_or_is_refused():
    model = build(output_router_logits=True, router_jitter_noise=0.1).train()
    runs = []
    for way in (None, False, True):
        if way is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": way})
        torch.manual_seed(3)
        if way:
            with pytest.raises(ValueError, match="use_reentrant"):
                model(**padded())
            continue
        outputs = model(**padded())
        assert len(outputs.router_logits) == 2
        runs.append(gradients(model, outputs.loss))
    for name, gradient in runs[0].items():
        assert_close(runs[1][name], gradient, name)


BACKWARD_COMPILES = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")
BACKENDS = ["eager", pytest.param("aot_eager", marks=pytest.mark.skipif(not BACKWARD_COMPILES, reason="as Mixtral"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    model = build(output_router_logits=True).train()
    expected = model(**padded())
    grads = gradients(model, expected.loss)
    got = torch.compile(model, fullgraph=True, backend=backend)(**padded())
    assert_close(got.loss, expected.loss, "loss")
    for name, gradient in gradients(model, got.loss).items():
        assert_close(gradient, grads[name], name)


def test_saved_as_it_is_and_loaded(tmp_path):
    model = build(output_router_logits=True, num_experts_per_tok=3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (
        loaded.config.to_diff_dict().items() >= {**MOE, "num_experts_per_tok": 3, "output_router_logits": True}.items()
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(**padded()).loss, model(**padded()).loss)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert plain.config._experts_implementation == "eager"
    assert_close(plain(**padded()).loss, model(**padded()).loss, "loss")


def test_half_precision_stays_close():
    model = build()
    narrow = build().to(torch.bfloat16)
    with torch.no_grad():
        got, expected = (each(**padded()).logits for each in (narrow, model))
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


# --- refusals, words ---


def test_a_model_without_experts_has_no_router_logits():
    model = loud_model(tiny_config())
    with pytest.raises(ValueError, match=r"output_router_logits=True.*mlp_type='glu'"):
        model(**padded(), output_router_logits=True)
    with pytest.raises(ValueError, match=r"output_router_logits=True.*mlp_type='glu'"):
        model.model(padded()["input_ids"], output_router_logits=True)
    outputs = model(**padded(), output_router_logits=False)
    assert type(outputs).__name__ == "CausalLMOutputWithPast"


@pytest.mark.parametrize("head", [MiniLLMForSequenceClassification, MiniLLMForQuestionAnswering])
def test_a_task_head_refuses_router_logits(head):
    model = head(tiny_config(**MOE, pad_token_id=0, output_router_logits=True))
    with pytest.raises(ValueError, match=r"output_router_logits=True.*task head"):
        model(padded()["input_ids"])
    model.config.output_router_logits = False
    model(padded()["input_ids"])
    with pytest.raises(ValueError, match=r"output_router_logits=True.*task head"):
        model(padded()["input_ids"], output_router_logits=True)


def test_the_base_model_records_router_logits():
    model = MiniLLMModel(tiny_config(**MOE))
    outputs = model(padded()["input_ids"], output_router_logits=True)
    assert [tuple(layer.shape) for layer in outputs.router_logits] == [(24, 4)] * 2
    assert "router_logits" not in model(padded()["input_ids"])


def test_a_description_names_the_experts():
    words = describe(tiny_config(**MOE))["feed-forward"]
    assert words == "mixture of 4 gated experts, 2 for each token, silu, inner width 24"
