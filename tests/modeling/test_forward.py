"""The arguments of a forward: what each does, and what is refused."""

import warnings

import pytest
import torch
from matrix_cases import LENGTH, VOCAB
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from variant_cases import VARIANTS, assert_equal, config_of, inputs_of, model_of, tokens

from minillm import MiniLLMForCausalLM, MiniLLMModel
from minillm.cache import CACHE_NAME

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


# --- what comes out ---


@every_variant
def test_embeddings_stand_in_for_token_ids(variant):
    model = model_of(variant)
    inputs = inputs_of(model.config)
    expected = run(model, **inputs).logits
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_equal(run(model, inputs_embeds=embeds, **inputs).logits, expected)


@every_variant
def test_logits_to_keep(variant):
    model = model_of(variant)
    inputs = inputs_of(model.config)
    expected = run(model, **inputs).logits
    assert_equal(run(model, **inputs, logits_to_keep=3).logits, expected[:, -3:])
    assert_equal(run(model, **inputs, logits_to_keep=torch.tensor([1, 7])).logits, expected[:, [1, 7]])


@every_variant
def test_return_dict_false_gives_the_same_as_a_tuple(variant):
    model = model_of(variant)
    inputs = inputs_of(model.config)
    outputs = run(model, **inputs, labels=inputs["input_ids"], output_hidden_states=True)
    as_tuple = run(model, **inputs, labels=inputs["input_ids"], output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(outputs.to_tuple())
    assert_equal(as_tuple[0], outputs.loss)
    assert_equal(as_tuple[1], outputs.logits)
    assert_equal(run(model.model, **inputs, return_dict=False)[0], run(model.model, **inputs).last_hidden_state)


@every_variant
def test_hidden_states_are_recorded_layer_by_layer(variant):
    model = model_of(variant)
    inputs = inputs_of(model.config)
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert_equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    for state in outputs.hidden_states:
        state.retain_grad()
    outputs.logits.sum().backward()
    assert all(state.grad.abs().max() > 0 for state in outputs.hidden_states)
    # What a list of layers selects is transformers' own affair, and changed between its versions.
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB))
    selected = [run(net, input_ids=tokens(), output_hidden_states=[1]).hidden_states for net in (model, llama)]
    assert [state is None for state in selected[0]] == [state is None for state in selected[1]]
    model.config.output_hidden_states = True
    assert len(run(model, **inputs).hidden_states) == 3


@every_variant
def test_attentions_are_probabilities_or_refused(variant):
    model = model_of(variant, num_key_value_heads=2)
    inputs = inputs_of(model.config)
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match=r"output_attentions=True.*eager"):
            run(model, **inputs, output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = run(model, **inputs, output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(2, 4, LENGTH, LENGTH)] * 2
    assert_equal(attentions[0].sum(-1), torch.ones(2, 4, LENGTH))
    assert (attentions[0][:, :, 0, LENGTH - 1] > 0).all() == (variant == "bidirectional-none")


@every_variant
def test_cache_defaults_and_shapes(variant):
    model = model_of(variant, num_key_value_heads=2)
    inputs = inputs_of(model.config)
    assert run(model, **inputs, use_cache=False).past_key_values is None
    cache = run(model, **inputs).past_key_values
    if variant == "bidirectional-none":
        assert cache is None
        with pytest.raises(ValueError, match=r"cache.*bidirectional"):
            run(model, **inputs, past_key_values=DynamicCache())
        return
    assert isinstance(cache, DynamicCache)
    assert len(cache.layers) == 2
    # A sliding window keeps one token less than it sees: the next token brings itself.
    kept = LENGTH if model.config.sliding_window is None else model.config.sliding_window - 1
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, kept, 8)
    model.config.use_cache = False
    assert run(model, **inputs).past_key_values is None


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "bidirectional-none"])
def test_a_static_cache_in_steps_equals_one_pass(variant):
    model = model_of(variant)
    inputs = inputs_of(model.config)
    expected = run(model, **inputs, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    got = []
    for start, end in ((0, 5), (5, 6), (6, LENGTH)):
        part = {name: tensor[:, start:end] for name, tensor in inputs.items()}
        positions = torch.arange(start, end)[None]
        got.append(run(model, **part, past_key_values=cache, position_ids=positions).logits)
    assert_equal(torch.cat(got, dim=1), expected)


# --- masks, padding, packing ---


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("window-gqa", "bidirectional-none")])
def test_a_4d_mask_is_taken_as_it_is(variant, form, implementation):
    """Three continuations of one prompt, packed in a row behind it, equal three rows of their own."""
    model = model_of(variant)
    model.set_attn_implementation(implementation)
    prompt, endings = tokens(1, 3, seed=5), tokens(3, 1, seed=6)
    rows = torch.cat([prompt.expand(3, -1), endings], dim=1)
    expected = run(model, input_ids=rows).logits[:, -1]
    packed = torch.cat([prompt, endings.T], dim=1)
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]] + [[1, 1, 1, 0, 0, 0]] * 3).bool()
    mask = (mask | torch.eye(6, dtype=torch.bool))[None, None]
    if form == "float":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float).min)
    got = run(model, input_ids=packed, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 3, 3, 3]])).logits
    assert_equal(got[0, 3:], expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["bool", "float"])
def test_a_4d_mask_separates_two_texts_of_an_encoder(form, implementation):
    model = model_of("bidirectional")
    model.set_attn_implementation(implementation)
    texts = tokens(2, 5)
    expected = run(model, input_ids=texts).logits
    mask = torch.block_diag(torch.ones(5, 5), torch.ones(5, 5)).bool()[None, None]
    if form == "float":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float).min)
    positions = torch.arange(5).repeat(2)[None]
    got = run(model, input_ids=texts.reshape(1, 10), attention_mask=mask, position_ids=positions).logits
    assert_equal(got.reshape(expected.shape), expected)


@every_variant
def test_padding_on_either_side_changes_nothing(variant):
    model = model_of(variant)
    inputs = inputs_of(model.config, batch=1)
    expected = run(model, **inputs).logits
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded = {name: torch.nn.functional.pad(tensor, (left, right), value=1) for name, tensor in inputs.items()}
        padded["attention_mask"] = torch.nn.functional.pad(torch.ones(1, LENGTH), (left, right))
        got = run(model, **padded).logits[:, left : left + LENGTH]
        assert_equal(got, expected)


@every_variant
@pytest.mark.parametrize("by", ["positions", "document_ids"])
def test_packed_documents_equal_padded_ones(variant, by):
    model = model_of(variant)
    lengths = (4, 6, 1)
    alone, packed = [], []
    for seed, length in enumerate(lengths):
        inputs = inputs_of(model.config, prefix_length=2, batch=1, length=length, seed=seed)
        if by == "positions":
            # A second axis says that positions mean GLM's blocks, not packing.
            inputs.pop("block_position_ids", None)
        alone.append(run(model, **inputs).logits)
        packed.append(inputs)
    row = {name: torch.cat([inputs[name] for inputs in packed], dim=1) for name in packed[0]}
    if by == "positions":
        row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        row["document_ids"] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    assert_equal(run(model, **row).logits, torch.cat(alone, dim=1))
    assert_equal(run(model, **row, use_cache=False).logits, torch.cat(alone, dim=1))


@pytest.mark.mostly_thorough("prefix-alibi-training", "moe-evaluation")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@every_variant
def test_the_forward_compiles_without_a_graph_break(variant, training):
    model = model_of(variant).train(training)
    inputs = inputs_of(model.config)
    attention_mask = torch.ones(2, LENGTH, dtype=torch.long)
    attention_mask[0, :2] = 0
    documents = torch.tensor([[0] * 6 + [1] * 4] * 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for more in ({}, {"attention_mask": attention_mask}, {"document_ids": documents}, {"labels": inputs["input_ids"]}):
        expected, got = model(**inputs, **more, use_cache=False), compiled(**inputs, **more, use_cache=False)
        assert_equal(got.logits, expected.logits)
        if "labels" in more:
            assert_equal(got.loss, expected.loss)


def test_a_prefix_model_without_a_prefix_compiles_in_training():
    model = model_of("prefix").train()
    torch._dynamo.reset()
    assert_equal(torch.compile(model, fullgraph=True, backend="eager")(tokens()).logits, model(tokens()).logits)


def test_a_cut_config_runs_the_first_layers_only():
    model = model_of("causal")
    expected = run(model, input_ids=tokens(), output_hidden_states=True).hidden_states[1]
    model.config.num_hidden_layers = 1
    assert_equal(run(model, input_ids=tokens()).logits, model.lm_head(model.model.norm(expected)))


@pytest.mark.parametrize("variant", ["causal", "prefix-alibi", "gpt2"])
def test_the_forward_can_be_exported(variant):
    model = model_of(variant)
    inputs = inputs_of(model.config)
    exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    assert_equal(exported.module()(**inputs, use_cache=False).logits, run(model, **inputs).logits)


# --- loss ---


def test_the_loss_predicts_the_next_token():
    model = model_of("causal")
    input_ids = tokens()
    labels = input_ids.clone()
    labels[0, :4] = -100
    untouched = labels.clone()
    outputs = run(model, input_ids=input_ids, labels=labels)
    expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    count = (labels[:, 1:] != -100).sum()
    assert_equal(outputs.loss, expected / count)
    assert torch.equal(labels, untouched)
    for items in (40, torch.tensor(40)):
        assert_equal(run(model, input_ids=input_ids, labels=labels, num_items_in_batch=items).loss, expected / 40)


def test_shifted_labels_replace_labels():
    model = model_of("causal")
    input_ids, shifted = tokens(), tokens(seed=8)
    outputs = run(model, input_ids=input_ids, labels=input_ids, shift_labels=shifted)
    assert_equal(outputs.loss, cross_entropy(outputs.logits.flatten(0, 1), shifted.flatten()))


def test_the_sum_of_two_halves_is_the_whole_batch():
    model = model_of("prefix-alibi")
    inputs = inputs_of(model.config, batch=4)
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    labels[0, :8] = -100
    count = (labels[:, 1:] != -100).sum()
    model(**inputs, labels=labels).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        model(**part, labels=labels[rows], num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, whole[name])


# --- training only ---


def test_the_embedding_gradient_is_shrunk_and_the_values_are_not():
    plain, shrunk = model_of("gpt2"), model_of("gpt2", embedding_gradient_scale=0.1)
    inputs = inputs_of(plain.config)
    for model in (plain, shrunk):
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    # Bit for bit, also in bfloat16.
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(run(shrunk.to(dtype), **inputs).logits, run(plain.to(dtype), **inputs).logits)
    for name, parameter in plain.named_parameters():
        factor = 0.1 if name == "model.embed_tokens.weight" else 1.0
        assert_equal(shrunk.get_parameter(name).grad, factor * parameter.grad, tolerance=1e-2)


@pytest.mark.parametrize("field", ["attention_dropout", "hidden_dropout", "embedding_dropout"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_acts_in_training_only(field, implementation):
    model = MiniLLMForCausalLM._from_config(config_of("alibi", **{field: 0.5}), attn_implementation=implementation)
    input_ids = tokens()
    torch.manual_seed(0)
    model.eval()
    assert torch.equal(run(model, input_ids=input_ids).logits, run(model, input_ids=input_ids).logits)
    model.train()
    assert not torch.equal(run(model, input_ids=input_ids).logits, run(model, input_ids=input_ids).logits)


def test_a_prefix_model_that_trains_without_a_prefix_warns(caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    from minillm import modeling_minillm

    modeling_minillm.logger.warning_once.cache_clear()
    messages = []
    monkeypatch.setattr(modeling_minillm.logger, "warning_once", lambda message, *_: messages.append(message))
    model = model_of("prefix").train()
    run(model, **inputs_of(model.config))
    assert not messages
    run(model, input_ids=tokens())
    assert len(messages) == 1 and "training without `prefix_mask`" in messages[0]


# --- bad inputs ---

PREFIX = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]] * 2)
FALLING = torch.tensor([[2, 2, 1, 0, 0, 0, 0, 0, 0, 0]] * 2)
BROKEN = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0, 0, 0]] * 2)
REAL = torch.tensor([[1] * LENGTH, [0] * 3 + [1] * 7])
TWO_DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2)
ODD = torch.zeros(2, LENGTH - 1, dtype=torch.long)

REFUSED = {
    "no_input": ("causal", {"input_ids": None}, "exactly one of `input_ids` and `inputs_embeds`"),
    "two_inputs": ("causal", {"inputs_embeds": torch.zeros(2, LENGTH, 32)}, "exactly one of"),
    "id_too_large": ("causal", {"input_ids": torch.tensor([[3, VOCAB]])}, f"vocabulary of {VOCAB} tokens"),
    "id_negative": ("causal", {"input_ids": torch.tensor([[3, -1]])}, "`input_ids`.*vocabulary"),
    "mask_too_short": ("causal", {"attention_mask": ODD}, r"`attention_mask` has shape \[2, 9\].*\[2, 10\]"),
    "mask_too_long": ("causal", {"attention_mask": torch.ones(2, 11)}, r"`attention_mask` has shape \[2, 11\]"),
    "mask_of_other_rows": ("causal", {"attention_mask": torch.ones(3, LENGTH)}, "`attention_mask` has shape"),
    "mask_3d": ("causal", {"attention_mask": torch.ones(2, LENGTH, LENGTH)}, "`attention_mask` has shape"),
    "mask_4d_of_wrong_length": ("alibi", {"attention_mask": torch.ones(2, 1, 4, LENGTH)}, "`attention_mask`"),
    "positions_too_short": ("causal", {"position_ids": ODD}, "`position_ids` has shape"),
    "positions_beyond_the_table": (
        "gpt2",
        {"position_ids": torch.arange(LENGTH)[None] + 23},
        "position_table_size=32",
    ),
    "positions_negative": ("gpt2", {"position_ids": torch.arange(LENGTH)[None] - 1}, "position_table_size=32"),
    "prompt_beyond_the_table": ("gpt2", {"input_ids": tokens(1, 33)}, "position_table_size=32"),
    "prefix_on_causal": ("causal", {"prefix_mask": PREFIX}, r"prefix_mask.*attention_type='causal'"),
    "prefix_on_bidirectional": ("bidirectional", {"prefix_mask": PREFIX}, r"prefix_mask.*'bidirectional'"),
    "prefix_of_wrong_shape": ("prefix", {"prefix_mask": ODD}, r"`prefix_mask` has shape \[2, 9\]"),
    "prefix_1d": ("prefix", {"prefix_mask": PREFIX[0]}, "`prefix_mask` has shape"),
    "prefix_broken": ("prefix", {"prefix_mask": BROKEN}, r"comes back.*`minillm.number_prompts`"),
    "prefix_broken_bool": ("prefix", {"prefix_mask": BROKEN.bool()}, r"comes back.*`minillm.number_prompts`"),
    "prefix_falling": ("prefix", {"prefix_mask": FALLING}, r"comes back.*`minillm.number_prompts`"),
    "prefix_broken_in_second_document": (
        "prefix-alibi",
        {"prefix_mask": torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1, 0, 0]] * 2), "document_ids": TWO_DOCUMENTS},
        "comes back",
    ),
    "prefix_broken_around_padding": (
        "prefix",
        {"prefix_mask": torch.tensor([[1] * 4 + [0] * 6, [0] * 3 + [1, 0, 1] + [0] * 4]), "attention_mask": REAL},
        "comes back",
    ),
    "prefix_float": ("prefix", {"prefix_mask": PREFIX.float()}, "`prefix_mask` has dtype torch.float32"),
    "prefix_negative": ("prefix", {"prefix_mask": -PREFIX}, "`prefix_mask` holds a negative value"),
    "prefix_and_4d_mask": (
        "prefix",
        {"prefix_mask": PREFIX, "attention_mask": torch.ones(2, 1, LENGTH, LENGTH).bool()},
        "`prefix_mask` and a 4D `attention_mask`",
    ),
    "documents_and_4d_mask": (
        "causal",
        {"document_ids": TWO_DOCUMENTS, "attention_mask": torch.ones(2, 1, LENGTH, LENGTH).bool()},
        "`document_ids` and a 4D `attention_mask`",
    ),
    "documents_fractions": (
        "causal",
        {"document_ids": TWO_DOCUMENTS / 2},
        "`document_ids` has dtype torch.float32",
    ),
    "block_positions_fractions": (
        "rope_2d",
        {"block_position_ids": torch.rand(2, LENGTH)},
        "`block_position_ids` has dtype torch.float32",
    ),
    "documents_decreasing": ("causal", {"document_ids": 1 - TWO_DOCUMENTS}, "`document_ids` decrease"),
    "documents_decreasing_between_padding": (
        "causal",
        {"document_ids": 1 - TWO_DOCUMENTS, "attention_mask": REAL},
        "`document_ids` decrease",
    ),
    "documents_of_wrong_shape": ("causal", {"document_ids": ODD}, "`document_ids` has shape"),
    "block_positions_of_wrong_shape": (
        "prefix-glm_2d",
        {"block_position_ids": ODD},
        "`block_position_ids` has shape",
    ),
    "block_positions_on_one_axis_of_wrong_shape": ("causal", {"block_position_ids": ODD}, "`block_position_ids`"),
    "unknown_tensor": ("causal", {"token_type_ids": torch.zeros(2, LENGTH)}, "`token_type_ids` is a tensor"),
    "head_mask": ("causal", {"head_mask": torch.ones(2, 4)}, "`head_mask` is a tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_inputs_are_refused_by_name(case):
    variant, inputs, message = REFUSED[case]
    model = model_of(variant)
    with pytest.raises(ValueError, match=message):
        run(model, **{"input_ids": tokens(), **inputs})


def test_block_positions_beyond_the_table_are_refused():
    model = model_of("prefix-glm_2d")
    with pytest.raises(ValueError, match="position_table_size=33"):
        run(model, input_ids=tokens(), block_position_ids=torch.full((2, LENGTH), 33))


def test_documents_with_a_filled_cache_are_refused():
    model = model_of("causal")
    cache = DynamicCache()
    run(model, input_ids=tokens(), document_ids=TWO_DOCUMENTS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"`document_ids`.*cache that holds 10 tokens"):
        run(model, input_ids=tokens(), document_ids=TWO_DOCUMENTS, past_key_values=cache)


def test_a_mask_that_forgets_the_cached_tokens_is_refused():
    model = model_of("prefix-alibi")
    cache = run(model, input_ids=tokens()).past_key_values
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \[2, 1\]; expected \[2, 11\]"):
        run(model, input_ids=tokens(length=1), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_what_only_repeats_the_positions_is_accepted_unread():
    model = model_of("causal")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
    expected = run(model, input_ids=tokens(), position_ids=positions).logits
    bounds = torch.tensor([0, 4, 10, 14, 20], dtype=torch.int32)
    got = run(
        model,
        input_ids=tokens(),
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=6,
        max_length_k=6,
    ).logits
    assert_equal(got, expected)


def test_the_base_model_refuses_as_the_heads_do():
    with pytest.raises(ValueError, match="attention_type='causal'"):
        model_of("causal", MiniLLMModel)(input_ids=tokens(), prefix_mask=PREFIX)


def test_the_cache_has_two_names():
    model = model_of("causal")
    ids = tokens(length=LENGTH)
    expected = run(model, input_ids=ids).logits[:, 4:]
    for name in ("cache", "past_key_values"):
        filled = DynamicCache()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run(model, input_ids=ids[:, :4], **{name: filled})
            assert_equal(run(model, input_ids=ids[:, 4:], **{name: filled}).logits, expected)
        # Where transformers has another name, it warns as transformers' own models do.
        old = [warning for warning in told if "`past_key_values` is deprecated" in str(warning.message)]
        assert len(old) == (2 if (name, CACHE_NAME) == ("past_key_values", "cache") else 0)
        assert all(warning.category is FutureWarning for warning in old)
    with pytest.raises(ValueError, match="two names of one thing"):
        run(model, input_ids=ids, cache=DynamicCache(), past_key_values=DynamicCache())
