"""`attn_implementation="minillm_blocks"` of transformers' own models, against their eager attention."""

import copy
import re
from pathlib import Path

import pytest
import torch
from blocks_cases import (
    BATCHES,
    DECODERS,
    ENCODERS,
    FAMILIES,
    LENGTH,
    MASKED_LAYERS,
    TINY,
    assert_close_to_eager,
    loss_and_gradients,
    model_of,
    packed,
    padded,
    real_tokens,
    scored,
    tokens,
)
from largest_tensor import LargestTensor
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import create_causal_mask

from minillm import blocked_attention
from minillm.blocked_attention import BlockedMask, FlashInParts, block_size
from minillm.capabilities import BLOCKS
from minillm.plugin.blocks_for_any_model import attention_of_any_model
from minillm.tuning import tuning


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """Are worked through in blocks as well."""
    monkeypatch.setattr(tuning, "any_model_blocks_from", 128)


@pytest.fixture(autouse=True)
def compiler():
    """Leaves no graph, and no count of their breaks, to other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def counted(monkeypatch):
    """Calls of attention in blocks."""
    calls = []
    composed, apply = blocked_attention._composed, FlashInParts.apply
    monkeypatch.setattr(blocked_attention, "_composed", lambda *args: calls.append("composed") or composed(*args))
    monkeypatch.setattr(FlashInParts, "apply", lambda *args: calls.append("flash") or apply(*args))
    return calls


def with_labels(inputs):
    return {**inputs, "labels": scored(inputs)}


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs, use_cache=False).logits[real_tokens(inputs)]


def assert_same_logits(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_eager(family, batch, counted):
    inputs = BATCHES[batch]()
    if family in DECODERS:
        inputs = with_labels(inputs)
    elif batch == "packed":
        del inputs["position_ids"]
    model = model_of(family)
    expected = loss_and_gradients(model, inputs)
    model.set_attn_implementation(BLOCKS)
    assert_close_to_eager(loss_and_gradients(model, inputs), expected)
    is_plain = batch == "plain" or (batch == "packed" and family in ENCODERS)
    assert len(counted) == (MASKED_LAYERS.get(family, 0) if is_plain else 2)


def test_plain_texts_are_left_to_sdpa(counted):
    model = model_of("gemma3")
    model.set_attn_implementation(BLOCKS)
    logits_of(model, {"input_ids": tokens()})
    assert len(counted) == 1
    logits_of(model, {"input_ids": tokens(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)})
    assert len(counted) == 2
    logits_of(model, packed())
    assert len(counted) == 4


@pytest.mark.parametrize("length", [1, 20, LENGTH])
def test_short_texts_are_left_to_sdpa(length, counted, monkeypatch):
    monkeypatch.setattr(tuning, "any_model_blocks_from", LENGTH)
    model = model_of("gemma3")
    inputs = {"input_ids": tokens(length=length)}
    expected = logits_of(model, inputs)
    model.set_attn_implementation(BLOCKS)
    assert_same_logits(logits_of(model, inputs), expected)
    assert not counted


@pytest.mark.slow
@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths for flash kernels"])
def test_the_stock_trainer_packs(with_lengths, counted, tmp_path):
    generator, losses = torch.Generator().manual_seed(3), []
    lengths = torch.randint(40, 100, (16,), generator=generator).tolist()
    documents = [{"input_ids": torch.randint(3, 64, (length,), generator=generator).tolist()} for length in lengths]
    for back_end in ("eager", BLOCKS):
        model = model_of("qwen3")
        model.set_attn_implementation(back_end)
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=1, use_cpu=True, report_to=[]
            ),
            train_dataset=documents,
            data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[1]) == 3
    assert counted == ["flash"] * 6


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "llama4 chunks", "deepseek_v3"])
def test_checkpointing_changes_nothing(family, reentrant, counted):
    inputs, model = with_labels(packed()), model_of(family)
    expected = loss_and_gradients(model, inputs)
    model.set_attn_implementation(BLOCKS)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close_to_eager(loss_and_gradients(model, inputs), expected)
    # Two layers, each a second time in the backward pass.
    assert len(counted) == 4


@pytest.mark.parametrize("batch", ["packed", "padded left"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral window"])
def test_half_precision_is_as_close_to_float64_as_sdpa(family, how, dtype, batch, counted):
    inputs = with_labels(BATCHES[batch]())
    model = model_of(family)
    # transformers' eager attention is NaN in float64 where a row sees no key.
    model.set_attn_implementation("sdpa")
    exact = loss_and_gradients(copy.deepcopy(model).double(), inputs)
    model = model.to(dtype) if how == "weights" else model
    distances = {}
    for back_end in ("sdpa", BLOCKS):
        model.set_attn_implementation(back_end)
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            found = loss_and_gradients(model, inputs)
        total = sum((found[1][name].double() - exact[1][name]).square().sum() for name in exact[1])
        distances[back_end] = torch.stack([total.sqrt(), (found[0].double() - exact[0]).abs()])
    assert counted == ["flash"] * 2
    assert distances[BLOCKS][0] <= 1.2 * distances["sdpa"][0]
    assert distances[BLOCKS][1] <= 1.2 * distances["sdpa"][1] + 0.02 * exact[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_drops_probabilities(dropout, counted):
    """Its mean over many draws is attention without it."""
    model = model_of("llama", num_hidden_layers=1, attention_dropout=dropout).train()
    model.set_attn_implementation(BLOCKS)
    attention, inputs, drawn = model.model.layers[0].self_attn, packed(), []
    attention.register_forward_hook(lambda module, args, output: drawn.append(output[0].detach()))
    torch.manual_seed(0)
    for _ in range(200):
        logits_of(model, inputs)
    assert (drawn[0] == drawn[1]).all() == (dropout == 0)
    assert counted == ["composed" if dropout else "flash"] * 200
    logits_of(model.eval(), inputs)
    spread = torch.stack(drawn[:-1]).std(0).mean() / len(drawn) ** 0.5
    assert (torch.stack(drawn[:-1]).mean(0) - drawn[-1]).abs().mean() <= 2 * spread + 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients(mode, counted):
    model, inputs = model_of("cohere2"), packed()
    expected = logits_of(model, inputs)
    model.set_attn_implementation(BLOCKS)
    with mode():
        assert_same_logits(model(**inputs, use_cache=False).logits.flatten(0, 1), expected)
    assert counted == ["flash"] * 2


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "quantized": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 8},
    },
    "none": {"use_cache": False},
    "prefilled in parts": {"prefill_chunk_size": 60},
    "beams": {"num_beams": 3},
    "looked up": {"prompt_lookup_num_tokens": 3},
}


WITH_WINDOWS = ("gemma3", "mistral window")
CACHED = [
    (family, cache)
    for family in ("llama", "gpt2", *WITH_WINDOWS)
    for cache in CACHES
    # transformers refuses it by name.
    if not (cache == "quantized" and family in WITH_WINDOWS)
]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(("family", "cache"), CACHED)
def test_generated_text_equals_eager(family, cache, padding, counted):
    inputs = padded("left", 135) if padding == "left" else {"input_ids": tokens()}
    inputs.setdefault("attention_mask", torch.ones(2, LENGTH, dtype=torch.long))
    if cache == "looked up":
        inputs = {name: part[:1] for name, part in inputs.items()}
    model, texts = model_of(family), []
    model.generation_config.eos_token_id = None
    for back_end in ("eager", BLOCKS):
        model.set_attn_implementation(back_end)
        texts.append(model.generate(**inputs, **CACHES[cache], max_new_tokens=5, do_sample=False))
    assert torch.equal(*texts)
    needs_no_mask = padding == "none" and family not in MASKED_LAYERS
    assert counted or cache in ("static", "prefilled in parts") or needs_no_mask


def test_tokens_behind_cached_ones_equal_one_forward():
    model = model_of("qwen2 windows")
    expected = logits_of(model, {"input_ids": tokens()})
    model.set_attn_implementation(BLOCKS)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in tokens().split([135, 14, 1], dim=1)]
    assert_same_logits(torch.cat(parts, 1).flatten(0, 1), expected)


def test_buffers_may_be_filled_anew_before_the_backward_pass(monkeypatch):
    monkeypatch.setattr(tuning, "kept_elements", 0)
    inputs = with_labels(padded("left"))
    model = model_of("gemma3")
    expected = loss_and_gradients(model, inputs)[1]
    model.set_attn_implementation(BLOCKS)
    model.zero_grad()
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    loss = model(**inputs, use_cache=False).loss
    inputs["attention_mask"].fill_(True)
    loss.backward()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_model_has_the_mask_of_sdpa(dynamic, counted):
    model = model_of("gemma3")
    expected = logits_of(model, packed())
    model.set_attn_implementation(BLOCKS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same_logits(logits_of(compiled, packed()), expected)
    assert not counted


@pytest.mark.slow
def test_compiled_layers_run_blocks_between_their_graphs(counted):
    model = model_of("gemma3")
    lengths = [(30, 65, 55), (60, 80, 20), (70, 70, 60)]
    expected = [logits_of(model, packed(each)) for each in lengths]
    model.set_attn_implementation(BLOCKS)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for each, logits in zip(lengths, expected, strict=True):
        assert_same_logits(logits_of(model, packed(each)), logits)
    assert len(counted) == 6
    torch.compiler.reset()
    model.model.layers[0].compile(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"blocks_from = 2\*\*62"):
        logits_of(model, packed())


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_model_has_the_mask_of_sdpa(strict):
    model, inputs = model_of("llama"), {**packed(), "use_cache": False}
    expected = logits_of(model, packed())
    model.set_attn_implementation(BLOCKS)
    exported = torch.export.export(model, (), inputs, strict=strict).module()
    assert_same_logits(exported(**inputs).logits.flatten(0, 1).detach(), expected)


def test_a_model_within_vmap_has_the_mask_of_sdpa(counted):
    model = model_of("llama")
    expected = logits_of(model, {"input_ids": tokens()})
    model.set_attn_implementation(BLOCKS)
    with torch.no_grad():
        found = torch.func.vmap(lambda row: model(row[None], use_cache=False).logits[0])(tokens())
    assert_same_logits(found.flatten(0, 1), expected)
    assert not counted


def test_memory_grows_with_the_length():
    model = model_of("llama", num_hidden_layers=1, max_position_embeddings=4096)
    model.set_attn_implementation(BLOCKS)
    inputs = packed((100, 1000, 400, 48, 500))
    with LargestTensor() as watch:
        loss_and_gradients(model, with_labels(inputs))
    # The mask of a block, of which there are eight.
    assert watch.largest <= 2 * 2048 * block_size(2048)


@pytest.mark.parametrize("length", [20, LENGTH])
def test_a_bias_on_scores_is_refused(length):
    config = CONFIG_MAPPING["t5"](vocab_size=64, num_layers=2, d_model=32, d_kv=8, num_heads=4)
    model = AutoModel.from_config(config, attn_implementation=BLOCKS).eval()
    with pytest.raises(ValueError, match=r"T5Attention hands `position_bias` to attention.*'eager'"):
        model(tokens(length=length), decoder_input_ids=tokens(length=3))


@pytest.mark.parametrize("length", [20, LENGTH])
def test_a_soft_cap_is_refused(length):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma2"](**TINY), attn_implementation=BLOCKS)
    # transformers 5.24 says that SDPA cannot serve the model; 5.17 does not.
    with pytest.raises(ValueError, match=r"cannot serve the model of Gemma2Config|hands `softcap` to attention"):
        model(tokens(length=length))


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias", "block_indices"])
@pytest.mark.parametrize("length", [20, LENGTH])
def test_keywords_that_change_scores_are_refused(length, keyword):
    model = model_of("llama")
    model.set_attn_implementation(BLOCKS)
    with pytest.raises(ValueError, match=f"hands `{keyword}` to attention"):
        model(tokens(length=length), **{keyword: torch.ones(4)})


NOT_SERVED = {
    # They add the mask to their scores themselves.
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4},
    "xglm": {"vocab_size": 64, "d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 48},
    # They say that SDPA cannot serve them, which knows no sinks, and would take an encoder for a decoder.
    "gpt_oss": {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "splinter": {name: size for name, size in TINY.items() if name not in ("head_dim", "num_key_value_heads")},
}


@pytest.mark.parametrize("length", [20, LENGTH])
@pytest.mark.parametrize("model_type", NOT_SERVED)
def test_a_model_that_sdpa_cannot_serve_is_refused(model_type, length):
    config = CONFIG_MAPPING[model_type](**NOT_SERVED[model_type])
    model = AutoModel.from_config(config, attn_implementation=BLOCKS)
    with pytest.raises(ValueError, match=f"cannot serve the model of {type(config).__name__}"):
        model(tokens(length=length))
    with pytest.raises(Exception, match="cannot serve the model of"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(length=length))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("falcon", {"num_hidden_layers": 1, "num_attention_heads": 4}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    ],
)
def test_a_model_that_looks_its_classes_up_by_back_end_fails_as_it_is_made(model_type, sizes):
    config = CONFIG_MAPPING[model_type](vocab_size=64, hidden_size=32, bos_token_id=1, eos_token_id=2, **sizes)
    with pytest.raises(KeyError, match=BLOCKS):
        AutoModel.from_config(config, attn_implementation=BLOCKS)


def test_the_page_names_every_family_that_is_tested():
    page = " ".join((Path(__file__).parents[2] / "docs" / "blocks.md").read_text("utf-8").split())
    listed = page.partition("tests/plugin/test_blocks_any_model.py) on ")[2].partition(", packed,")[0]
    names = {re.sub(r" \(.*\)|'s chunks|[ -]", "", name).lower() for name in re.split(r", | and ", listed)}
    assert names == {family.partition(" ")[0].replace("_", "") for family in FAMILIES}


@pytest.mark.parametrize("length", [20, LENGTH])
def test_other_keywords_are_refused(length):
    model = model_of("llama")
    model.set_attn_implementation(BLOCKS)
    model(tokens(length=length), output_attentions=False, softcap=None)
    with pytest.raises(ValueError, match="LlamaAttention hands `made_up` to attention"):
        model(tokens(length=length), made_up=3)
    with pytest.raises(ValueError, match="keeps no probabilities"):
        model(tokens(length=length), output_attentions=True)


def test_what_losses_read_is_let_through():
    model, inputs = model_of("llama"), tokens()
    expected = model(inputs, labels=inputs, shift_labels=inputs.roll(-1, 1), use_cache=False).loss
    model.set_attn_implementation(BLOCKS)
    found = model(
        inputs, labels=inputs, shift_labels=inputs.roll(-1, 1), use_cache=False, num_items_in_batch=None
    ).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("lengths", [(30, 65, 55), (5, 7, 8), (1, 1, 20), (300, 1000)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2 windows", "deepseek_v3"])
def test_documents_that_transformers_would_mix_are_refused(family, lengths):
    inputs = packed(lengths)
    model = model_of(family, max_position_embeddings=2048)
    model.set_attn_implementation(BLOCKS)
    for more in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(inputs["input_ids"])}):
        for positions in (inputs["position_ids"], 7 + inputs["position_ids"]):
            if lengths[0] == 1 and positions[0, 0] == 7:
                continue
            with pytest.raises(ValueError, match=r"restart, as in packed documents.*use_cache=False.*Attention here"):
                model(inputs["input_ids"], position_ids=positions, **more)
    model(**inputs, use_cache=False)


def test_documents_behind_a_padded_row_are_refused():
    model, inputs = model_of("llama"), packed()
    model.set_attn_implementation(BLOCKS)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 100:] = 0
    inputs["position_ids"][0] = torch.arange(LENGTH) * mask[0]
    with pytest.raises(ValueError, match="restart, as in packed documents"):
        model(**inputs, attention_mask=mask)


def test_documents_are_refused_where_a_later_layer_is_the_first_with_attention():
    model, inputs = model_of("gemma3", sliding_window=1), packed()
    model.set_attn_implementation(BLOCKS)
    with pytest.raises(ValueError, match="restart, as in packed documents"):
        model(**inputs, use_cache=True)


def test_documents_are_refused_in_a_compiled_model():
    model, inputs = model_of("llama"), packed()
    model.set_attn_implementation(BLOCKS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = {**inputs, "position_ids": torch.arange(LENGTH).repeat(2, 1)}
    mask = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        compiled(**plain, attention_mask=mask)
        compiled(**inputs, use_cache=False)
        with pytest.raises(RuntimeError, match="restart, as in packed documents"):
            compiled(**inputs, attention_mask=mask)


def test_axes_of_positions_are_told_apart():
    model, inputs = model_of("llama"), packed()
    positions = inputs["position_ids"]
    attention = model.model.layers[0].self_attn
    states = torch.zeros(2, 4, LENGTH, 8)
    for given in (positions, torch.stack([positions] * 3)):
        with pytest.raises(ValueError, match="restart, as in packed documents"):
            attention_of_any_model(attention, states, states, states, None, position_ids=given)
    # As of an image: its rows stand at one time.
    places = torch.stack([torch.arange(LENGTH) // 7, torch.arange(LENGTH) % 7, torch.arange(LENGTH)])
    attention_of_any_model(attention, states, states, states, None, position_ids=places[:, None])


def test_positions_of_padding_are_no_restart():
    """`generate()` gives padding position 0, between real tokens too."""
    model = model_of("llama")
    model.set_attn_implementation(BLOCKS)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, [1, 2, 70]], mask[1, :140] = 0, 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for stop in (LENGTH, 20):
        model(tokens()[:, :stop], attention_mask=mask[:, :stop], position_ids=positions[:, :stop])


def test_an_additive_mask_of_ones_own_is_taken_at_its_word():
    model, inputs = model_of("llama"), packed()
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e9)
    model.set_attn_implementation(BLOCKS)
    model(**inputs, attention_mask=mask)


def blocked_mask(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return create_causal_mask(model.config, embeds, None, None, inputs["position_ids"])


def test_a_mask_made_before_is_handed_back():
    model, inputs = model_of("llama"), packed()
    expected = logits_of(model, inputs)
    model.set_attn_implementation(BLOCKS)
    mask = blocked_mask(model, inputs)
    assert isinstance(mask, BlockedMask)
    with torch.no_grad():
        found = model(**inputs, attention_mask=mask, use_cache=False).logits
    assert_same_logits(found.flatten(0, 1), expected)


def test_any_other_use_of_the_mask_meets_the_dense_one():
    model, inputs = model_of("llama"), packed()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    model.set_attn_implementation("sdpa")
    expected = create_causal_mask(model.config, embeds, None, None, inputs["position_ids"])
    model.set_attn_implementation(BLOCKS)
    mask = blocked_mask(model, inputs)
    assert mask.shape == expected.shape and mask.ndim == expected.ndim and mask.dtype == torch.bool
    zero = torch.zeros(())
    for use in (
        lambda mask: mask[:, :, 10:100, :50],
        lambda mask: ~mask,
        lambda mask: mask & torch.ones(LENGTH, dtype=torch.bool),
        lambda mask: torch.ones(LENGTH, dtype=torch.bool) & mask,
        lambda mask: torch.where(mask, zero, -1.0),
        lambda mask: torch.cat([mask, mask], dim=-1),
        lambda mask: zero.expand(mask.shape).masked_fill(mask, 2.0),
        lambda mask: mask.to(torch.float32).sum(-1),
    ):
        assert torch.equal(use(mask), use(expected))
    with pytest.raises(AttributeError, match="made_up"):
        mask.made_up  # noqa: B018


def test_states_of_another_length_than_the_mask_are_refused():
    model, inputs = model_of("llama"), packed()
    model.set_attn_implementation(BLOCKS)
    mask = blocked_mask(model, inputs)
    with pytest.raises(
        ValueError, match=r"`attention_mask` has shape \[2, 1, 150, 150\], queries have \[2, 4, 100, 8"
    ):
        model(inputs["input_ids"][:, :100], attention_mask=mask)
    with pytest.raises(ValueError, match=r"queries have \[1, 4, 150, 8"):
        model(inputs["input_ids"][:1], attention_mask=mask)


def test_queries_that_see_no_key_at_all_raise_nothing():
    mask = BlockedMask(
        1, 300, lambda block: torch.zeros(1, 1, *(part.stop - part.start for part in block), dtype=bool)
    )
    states = torch.randn(1, 2, 300, 8)
    assert blocked_attention.blocked_attention_forward(None, states, states, states, mask)[0].isfinite().all()


def test_masks_by_functions_of_ones_own_are_those_of_sdpa(counted):
    """They may not be written for tensors of indices."""
    model, inputs = model_of("llama"), packed()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    masks = []
    for back_end in ("sdpa", BLOCKS):
        model.set_attn_implementation(back_end)
        more = {"and_mask_function": lambda batch, head, query, key: query - key < 7}
        masks.append(create_causal_mask(model.config, embeds, None, None, **more))
    assert torch.equal(*masks) and isinstance(masks[1], torch.Tensor)


@pytest.mark.parametrize("batch", BATCHES)
def test_lora_trains_the_same(batch, counted):
    inputs, found = with_labels(BATCHES[batch]()), []
    for back_end in ("eager", BLOCKS):
        torch.manual_seed(0)
        adapted = get_peft_model(model_of("gemma3"), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
        adapted.set_attn_implementation(back_end)
        found.append(loss_and_gradients(adapted.eval(), inputs))
    assert_close_to_eager(found[1], found[0])
    assert counted


def test_prefix_tuning_has_the_mask_of_sdpa(counted):
    model = get_peft_model(model_of("llama"), PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    inputs = padded("right")
    expected = logits_of(model, inputs)
    model.set_attn_implementation(BLOCKS)
    assert_same_logits(logits_of(model, inputs), expected)
    assert not counted
