"""Every input of a forward is checked for dtype, shape and range, for every variant alike, by its name."""

import pytest
import torch
from matrix_cases import LENGTH, VOCAB
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from variant_cases import GENERATIVE, VARIANTS, inputs_of, model_of, tokens

from minillm import (
    MiniLLMForCausalLM,
    MiniLLMForQuestionAnswering,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
    MiniLLMModel,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS)
INDEX = torch.arange(LENGTH).expand(2, -1)
ONES = torch.ones(2, LENGTH, dtype=torch.long)
SQUARE = torch.ones(2, 1, LENGTH, LENGTH).tril().bool()


def refusal_of(model, **inputs):
    with torch.no_grad(), pytest.raises(ValueError) as caught:
        model(**{"input_ids": tokens(), **inputs})
    return str(caught.value)


WRONG = {
    "ids_1d": {"input_ids": tokens()[0]},
    "ids_3d": {"input_ids": tokens()[None]},
    "ids_float": {"input_ids": tokens().float()},
    "ids_bool": {"input_ids": tokens() > 5},
    "ids_list": {"input_ids": tokens().tolist()},
    "ids_no_rows": {"input_ids": tokens()[:0]},
    "ids_no_tokens": {"input_ids": tokens()[:, :0]},
    "position_ids_float": {"position_ids": INDEX.float()},
    "position_ids_nan": {"position_ids": INDEX * float("nan")},
    "position_ids_bool": {"position_ids": INDEX > 4},
    "position_ids_negative": {"position_ids": INDEX - 1},
    "position_ids_1d": {"position_ids": INDEX[0]},
    "position_ids_3d": {"position_ids": INDEX.expand(3, -1, -1)},
    "position_ids_long": {"position_ids": torch.arange(LENGTH + 1)[None]},
    "block_position_ids_bool": {"block_position_ids": INDEX > 4},
    "block_position_ids_negative": {"block_position_ids": INDEX - 3},
    "document_ids_bool": {"document_ids": INDEX > 4},
    "document_ids_float": {"document_ids": INDEX.float()},
    "document_ids_1d": {"document_ids": INDEX[0]},
    "attention_mask_numbers": {"attention_mask": 1 + INDEX // 5},
    "attention_mask_minus": {"attention_mask": -ONES},
    "attention_mask_nan": {"attention_mask": ONES * float("nan")},
    "attention_mask_additive_2d": {"attention_mask": torch.where(INDEX > 3, 0.0, -torch.inf)},
    "attention_mask_1d": {"attention_mask": ONES[0]},
    "attention_mask_3d": {"attention_mask": SQUARE[:, 0]},
    "attention_mask_list": {"attention_mask": ONES.tolist()},
    "attention_mask_4d_integers": {"attention_mask": SQUARE.long()},
    "attention_mask_4d_3_of_4_heads": {"attention_mask": SQUARE.expand(-1, 3, -1, -1)},
    "attention_mask_4d_other_rows": {"attention_mask": SQUARE[:1].expand(3, -1, -1, -1)},
    "attention_mask_4d_fewer_keys": {"attention_mask": SQUARE[..., :-1]},
    "attention_mask_4d_more_keys": {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH + 1).bool()},
    "attention_mask_4d_fewer_queries": {"attention_mask": SQUARE[:, :, 1:]},
    "labels_float": {"labels": tokens().float()},
    "labels_short": {"labels": tokens()[:, 1:]},
    "labels_1d": {"labels": tokens()[0]},
    "labels_too_large": {"labels": tokens() + VOCAB},
    "labels_minus_one": {"labels": torch.where(INDEX > 3, tokens(), -1)},
    "shift_labels_too_large": {"labels": tokens(), "shift_labels": tokens() + VOCAB},
    "logits_to_keep_negative": {"logits_to_keep": -1},
}


@pytest.mark.parametrize("case", WRONG)
@every_variant
def test_a_wrong_input_is_named(case, variant):
    """Under both names of the loss: with logits, and without them."""
    model = model_of(variant)
    name = list(WRONG[case])[-1]
    for skip in (False, True) if "labels" in WRONG[case] and "logits" not in case else (None,):
        message = refusal_of(model, **WRONG[case], skip_logits=skip)
        assert f"`{name}" in message, message
        assert any(word in message for word in ("expected", "hold", "negative", "reach beyond")), message


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["attention_mask_4d_integers", "attention_mask_4d_3_of_4_heads"])
def test_a_wrong_mask_is_named_on_every_back_end(case, back_end):
    model = model_of("alibi")
    model.set_attn_implementation(back_end)
    assert "`attention_mask" in refusal_of(model, **WRONG[case])


EMBEDS = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "embeds", [EMBEDS[0], EMBEDS[..., :16], EMBEDS.long(), EMBEDS[:, :0], EMBEDS[:0]], ids=lambda each: str(each.shape)
)
@every_variant
def test_wrong_embeddings_are_named(embeds, variant):
    message = refusal_of(model_of(variant), input_ids=None, inputs_embeds=embeds)
    assert "`inputs_embeds` has" in message and "expected" in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@every_variant
def test_integers_of_every_width_mean_the_same(variant, dtype):
    model = model_of(variant)
    inputs = {**inputs_of(model.config), "attention_mask": ONES, "position_ids": INDEX, "labels": tokens()}
    with torch.no_grad():
        expected = model(**inputs)
        got = model(**{name: tensor.to(dtype) for name, tensor in inputs.items()})
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int8, torch.float32, torch.bfloat16], ids=str)
@every_variant
def test_a_2d_mask_may_have_any_dtype(variant, mask_dtype):
    model = model_of(variant)
    mask = (torch.tensor([[0], [3]]) <= INDEX).long()
    inputs = inputs_of(model.config)
    with torch.no_grad():
        expected = model(**inputs, attention_mask=mask).logits
        assert torch.equal(model(**inputs, attention_mask=mask.to(mask_dtype)).logits, expected)


@every_variant
def test_what_stands_at_padding_is_not_checked(variant):
    """Positions of -1 at padding, as `mask.cumsum(-1) - 1` makes them, and beyond a table; -100 as a label."""
    model = model_of(variant)
    mask = (torch.tensor([[0], [3]]) <= INDEX).long()
    positions = mask.cumsum(-1) - 1
    inputs = {**inputs_of(model.config), "attention_mask": mask}
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions.clamp(min=0)).logits
        for value in (-1, 999):
            got = model(**inputs, position_ids=positions.masked_fill(mask == 0, value)).logits
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: ((),), list, lambda: EncoderDecoderCache(DynamicCache(), DynamicCache())])
@pytest.mark.parametrize("variant", GENERATIVE)
def test_a_wrong_cache_is_named(variant, make):
    assert "cache is a" in refusal_of(model_of(variant), past_key_values=make())


def test_a_4d_mask_for_a_cache_has_its_keys():
    model = model_of("causal")
    for cache, keys in ((DynamicCache(), LENGTH + 2), (StaticCache(model.config, max_cache_len=20), 20)):
        model(tokens(), past_key_values=cache)
        right = torch.ones(2, 1, 2, keys).bool()
        model(tokens(length=2), past_key_values=cache, attention_mask=right)
        message = refusal_of(model, input_ids=tokens(length=2), past_key_values=cache, attention_mask=right[..., 1:])
        assert "`attention_mask` has shape" in message


def classifier(model_class, **fields):
    return model_of("causal", model_class, num_labels=3, **fields)


@pytest.mark.parametrize(
    ("model_class", "wrong"),
    [
        (MiniLLMForSequenceClassification, {"labels": torch.tensor([0, 3])}),
        (MiniLLMForSequenceClassification, {"labels": torch.tensor([0])}),
        (MiniLLMForSequenceClassification, {"labels": torch.tensor([0, -1])}),
        (MiniLLMForTokenClassification, {"labels": tokens()}),
        (MiniLLMForTokenClassification, {"labels": tokens()[:, 1:]}),
        (MiniLLMForTokenClassification, {"labels": ONES.float()}),
        (MiniLLMForQuestionAnswering, {"start_positions": torch.tensor([1, 2])}),
        (MiniLLMForQuestionAnswering, {"end_positions": torch.tensor([1, 2])}),
        (
            MiniLLMForQuestionAnswering,
            {"end_positions": torch.tensor([1, 2]), "start_positions": torch.tensor([-1, 2])},
        ),
        (
            MiniLLMForQuestionAnswering,
            {"end_positions": torch.tensor([1, 2]), "start_positions": torch.tensor([1.0, 2.0])},
        ),
    ],
)
def test_labels_of_the_heads_are_checked(model_class, wrong):
    assert f"`{list(wrong)[-1]}`" in refusal_of(classifier(model_class), **wrong)


def test_labels_of_the_heads_that_are_right():
    single, spans = torch.tensor([0, 2]), torch.tensor([1, LENGTH + 5])
    for model, labels in (
        (classifier(MiniLLMForSequenceClassification), {"labels": single}),
        (classifier(MiniLLMForSequenceClassification), {"labels": torch.rand(2, 3)}),
        (classifier(MiniLLMForTokenClassification), {"labels": torch.where(INDEX > 3, INDEX % 3, -100)}),
        (classifier(MiniLLMForQuestionAnswering), {"start_positions": spans, "end_positions": spans}),
    ):
        assert torch.isfinite(model(input_ids=tokens(), **labels).loss)


def test_the_base_model_checks_too():
    message = refusal_of(model_of("causal", MiniLLMModel), position_ids=INDEX.float())
    assert "`position_ids` has dtype" in message
    assert isinstance(model_of("causal", MiniLLMModel)(tokens()), BaseModelOutputWithPast)


def test_a_loss_of_ones_own_takes_labels_of_its_own():
    model = model_of("causal", MiniLLMForCausalLM)
    model.loss_function = lambda logits, labels, **kwargs: (logits.sum(-1) * labels).mean()
    assert torch.isfinite(model(tokens(), labels=torch.rand(2, LENGTH)).loss)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32], ids=str
)
@pytest.mark.parametrize("variant", ["causal", "gpt2", "prefix-glm_2d", "alibi", "sandwich_norm-sinusoidal"])
def test_no_integer_type_wraps(variant, dtype):
    """A table of more rows, and a vocabulary of more ids, than 8 bits count to; -100 is no label of 156."""
    model = model_of(variant, vocab_size=300, max_position_embeddings=300)
    inputs = {**inputs_of(model.config), "position_ids": INDEX, "attention_mask": ONES, "labels": tokens()}
    with torch.no_grad():
        expected = model(**inputs)
        inputs |= {name: inputs[name].to(dtype) for name in inputs if name not in ("input_ids", "prefix_mask")}
        got = model(**inputs)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
    small = model_of(variant, vocab_size=100)
    assert "`labels`" in refusal_of(small, labels=torch.full((2, LENGTH), 156, dtype=torch.uint8))


@pytest.mark.parametrize(
    "wanted",
    [
        torch.tensor([[1, 2]]),
        torch.tensor([[1], [2], [3]]),
        torch.ones(2, 2, 2, dtype=torch.long),
        torch.tensor(True),
        torch.tensor([True, False]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([LENGTH]),
        torch.tensor([-LENGTH - 1]),
        torch.tensor([[0], [-1]]),
        1.5,
        [1, 2],
        True,
    ],
    ids=str,
)
def test_a_wrong_choice_of_logits_is_named(wanted):
    assert "`logits_to_keep" in refusal_of(model_of("causal"), logits_to_keep=wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_choices_of_logits(dtype):
    model = model_of("causal")
    with torch.no_grad():
        expected = model(tokens()).logits
        for wanted in ([1, 7], [[1, 2], [3, 4]]):
            got = model(tokens(), logits_to_keep=torch.tensor(wanted).to(dtype)).logits
            index = torch.tensor(wanted).expand(2, -1)
            assert torch.equal(got, torch.stack([row[own] for row, own in zip(expected, index, strict=True)]))
        mask = INDEX > 6
        assert torch.equal(model(tokens(), logits_to_keep=mask).logits, expected[mask])
        assert torch.equal(model(tokens(), logits_to_keep=mask[0]).logits, expected[:, mask[0]])
        # A product of fewer rows may add in another order.
        last = model(tokens(), logits_to_keep=torch.tensor([-1])).logits
        torch.testing.assert_close(last, expected[:, -1:])


TEXT_LABELS = [
    (None, [0, 2], [[0, 3], [0.5, 0.5], [[0.0, 1.0]], [0], [[1.0] * 4] * 2]),
    (None, [[0.0, 1.0, 1.0]] * 2, [[0.5, 0.5], [[0.5]] * 2]),
    ("single_label_classification", [[0], [2]], [[0.5, 1.0], [0, 1, 2]]),
    ("multi_label_classification", [[0, 1, 1]] * 2, [[0, 1], [[1, 1]] * 2]),
    ("regression", [[0.5, 1.0, 2.0]] * 2, [[0.5, 1.0], [[0.5]] * 2]),
]


@pytest.mark.parametrize(("problem_type", "right", "wrong"), TEXT_LABELS, ids=lambda part: str(part)[:24])
def test_labels_of_a_text_follow_the_problem(problem_type, right, wrong):
    fields = {"problem_type": problem_type} if problem_type else {}
    for labels in wrong:
        # A model each time: transformers keeps the problem that it found in the first labels.
        message = refusal_of(classifier(MiniLLMForSequenceClassification, **fields), labels=torch.tensor(labels))
        assert "`labels`" in message
    assert "`labels` is a list" in refusal_of(classifier(MiniLLMForSequenceClassification, **fields), labels=right)
    model = classifier(MiniLLMForSequenceClassification, **fields)
    assert torch.isfinite(model(tokens(), labels=torch.tensor(right)).loss)


def test_regression_of_one_value():
    model = model_of("causal", MiniLLMForSequenceClassification, num_labels=1)
    losses = [model(tokens(), labels=labels).loss for labels in (torch.tensor([1.0, 2.0]), torch.tensor([[1], [2]]))]
    assert torch.allclose(*losses)
    assert "`labels`" in refusal_of(model, labels=torch.tensor([1.0, 2.0, 3.0]))


def test_spans_may_have_any_integer_type_and_a_column():
    model = classifier(MiniLLMForQuestionAnswering)
    spans = torch.tensor([1, 4])
    expected = model(tokens(), start_positions=spans, end_positions=spans).loss
    for other in (spans.int(), spans[:, None], spans.to(torch.uint8)):
        assert torch.equal(model(tokens(), start_positions=other, end_positions=other).loss, expected)
    for wrong in (spans[:1], spans[None].expand(2, -1), torch.tensor(1)):
        assert "`start_positions` has shape" in refusal_of(model, start_positions=wrong, end_positions=wrong)


@pytest.mark.parametrize("wrong", [{}, [], 1.5, "text"], ids=str)
def test_embeddings_and_ids_that_are_no_tensors_are_named(wrong):
    for model in (
        model_of("causal"),
        classifier(MiniLLMForTokenClassification),
        classifier(MiniLLMForQuestionAnswering),
    ):
        assert "`inputs_embeds` is a" in refusal_of(model, input_ids=None, inputs_embeds=wrong)
        assert "`input_ids` is a" in refusal_of(model, input_ids=wrong)


def test_gradients_of_each_sample():
    """Transforms of functions look at no value: `vmap` has none to show."""
    model, ids = model_of("causal"), tokens(batch=3)
    weights = dict(model.named_parameters())

    def loss(weights, row):
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, weights, (), inputs).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for number, row in enumerate(ids):
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][number], weight.grad, atol=1e-5, rtol=1e-4)
