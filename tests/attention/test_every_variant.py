"""All that touches attention, exhaustively: attention type, positions, head sharing, window, batch layout, back end.

Every case equals the naive twin in logits and in the gradients of all parameters.
"""

import pytest
import torch
from matrix_cases import (
    LAYOUTS,
    LENGTH,
    POSITIONS,
    TWO_AXES,
    VOCAB,
    assert_close,
    assert_same_run,
    attention_cases,
    batch,
    double_weights,
    layouts_of,
    loud_model,
    model_run,
    probe,
    real_tokens,
    reference_run,
    rows,
    tiny_config,
    windows_mostly_thorough,
)
from reference import describe_rows, reference_logits

from minillm import blocked_attention
from minillm.tuning import tuning

BACK_ENDS = ("eager", "sdpa")
CASES = dict(attention_cases())


@pytest.fixture
def in_blocks(monkeypatch):
    """Has attention on CPU run in blocks of so many queries, whose masks are kept, or made anew for each layer."""

    def switch(size, kept):
        monkeypatch.setattr(tuning, "blocks_from", size)
        monkeypatch.setattr(blocked_attention, "block_size", lambda length: size)
        monkeypatch.setattr(tuning, "kept_elements", 2**26 if kept else 0)

    return switch


@pytest.mark.parametrize("case", windows_mostly_thorough(CASES))
def test_logits_and_gradients_equal_the_twin(case, in_blocks):
    config = tiny_config(**CASES[case])
    model = loud_model(config)
    weights = double_weights(model)
    for layout in layouts_of(config):
        inputs = batch(config, layout)
        expected = reference_run(config, weights, inputs)
        for back_end in BACK_ENDS:
            model.set_attn_implementation(back_end)
            assert_same_run(model_run(model, inputs), expected, inputs, f"{case}, {layout}, {back_end}")
        for size, kept in ((3, True), (4, False)):
            in_blocks(size, kept)
            assert_same_run(model_run(model, inputs), expected, inputs, f"{case}, {layout}, blocks of {size}")
        in_blocks(LENGTH, True)


@pytest.mark.parametrize(
    ("layout", "left_out"),
    [
        (layout, name)
        for layout, inputs in LAYOUTS.items()
        for name in inputs
        # There the numbers at padding mean something only with the mask.
        if (layout, name) != ("packing_prefix_padding", "attention_mask")
    ],
)
def test_every_input_shows_in_the_logits(layout, left_out):
    """The matrix could not fail if the inputs that make a layout did not matter."""
    # Right padding is hidden from all but a bidirectional model.
    attention_type = "prefix" if left_out == "prefix_mask" else "bidirectional"
    config = tiny_config(attention_type=attention_type, position_embedding_type="alibi")
    inputs = batch(config, layout)
    model = loud_model(config)
    real = real_tokens(inputs)
    without = {name: value for name, value in inputs.items() if name != left_out}
    with torch.no_grad():
        difference = (model(**inputs).logits - model(**without).logits)[real].abs().max()
    assert difference > 1e-2


def sensitive(config, other, layout):
    model = loud_model(config)
    inputs = batch(config, layout)
    weights = double_weights(model)
    with torch.no_grad():
        logits = [reference_logits(each, weights, **inputs) for each in (config, other)]
    return (logits[0] - logits[1])[real_tokens(inputs)].abs().max()


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({"sliding_window": 3}, {}),
        ({"position_embedding_type": "alibi"}, {"position_embedding_type": "none"}),
        ({"position_embedding_type": "sandwich"}, {"position_embedding_type": "none"}),
        ({"rope_interleaved": True}, {}),
        ({"position_embedding_type": "sinusoidal"}, {"position_embedding_type": "none"}),
    ],
    ids=["window", "alibi", "sandwich", "interleaved", "sinusoidal"],
)
def test_every_setting_shows_in_the_twin(fields, others):
    assert sensitive(tiny_config(**fields), tiny_config(**others), "plain") > 1e-2


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("scheme", POSITIONS)
def test_input_embeddings_get_the_same_gradient(scheme, back_end):
    config = tiny_config(**POSITIONS[scheme])
    model = loud_model(config)
    model.set_attn_implementation(back_end)
    inputs = batch(config, "left_padding")
    tokens = inputs.pop("input_ids")
    mask = inputs["attention_mask"]
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    gradient = torch.autograd.grad(probe(model(inputs_embeds=embeddings, **inputs).logits, mask), embeddings)[0]
    # The twin takes ids: one embedding row for each token makes the table's gradient that of the embeddings.
    weights = double_weights(model)
    weights["model.embed_tokens.weight"] = embeddings.detach().double().flatten(0, 1).requires_grad_()
    separate = torch.arange(tokens.numel()).reshape(tokens.shape)
    logits = reference_logits(config, weights, separate, **inputs)
    expected = torch.autograd.grad(probe(logits, mask), weights["model.embed_tokens.weight"])[0]
    assert_close(gradient[mask.bool()], expected.reshape(gradient.shape)[mask.bool()], scheme)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("scheme", [scheme for scheme in POSITIONS if scheme not in ("alibi_bloom", "alibi_falcon")])
def test_packed_equals_apart(scheme, back_end):
    """Documents with prefixes in one row, and each of them alone, in one model and without the twin."""
    config = tiny_config(attention_type="prefix", **POSITIONS[scheme])
    model = loud_model(config)
    model.set_attn_implementation(back_end)
    inputs = batch(config, "packing")
    with torch.no_grad():
        packed = model(**inputs).logits
        for start, end in ((0, 4), (4, 7), (7, 10)):
            alone = {name: value[:1, start:end] for name, value in inputs.items() if name != "document_ids"}
            torch.testing.assert_close(packed[:1, start:end], model(**alone).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("scheme", ["rope", "alibi_scaled", "glm_2d"])
def test_what_stands_at_padding_does_not_matter(scheme, back_end):
    config = tiny_config(attention_type="prefix", **POSITIONS[scheme])
    model = loud_model(config)
    model.set_attn_implementation(back_end)
    inputs = batch(config, "packing_prefix_padding")
    hidden = ~real_tokens(inputs)
    other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(hidden, 7))
    other["document_ids"] = inputs["document_ids"].masked_fill(hidden, 99)
    with torch.no_grad():
        expected, got = model(**inputs).logits, model(**other).logits
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(got[~hidden], expected[~hidden], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["rope", "alibi_scaled", "learned"])
def test_packing_is_read_from_positions_with_and_without_cache(scheme):
    config = tiny_config(**POSITIONS[scheme])
    model = loud_model(config)
    inputs = batch(config, "packing_by_positions")
    weights = double_weights(model)
    with torch.no_grad():
        expected = reference_logits(config, weights, **inputs)
        for use_cache in (True, False):
            assert_close(model(**inputs, use_cache=use_cache).logits, expected, f"use_cache={use_cache}")


@pytest.mark.parametrize("scheme", TWO_AXES)
def test_second_axis_says_that_nothing_is_packed(scheme):
    """GLM's Part B restarts neither at a document nor anywhere: its first axis may even be 0 again."""
    config = tiny_config(attention_type="prefix", **POSITIONS[scheme])
    model = loud_model(config)
    inputs = {
        "input_ids": torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(5)),
        "position_ids": rows("0123400002"),
        "block_position_ids": rows("0000012341"),
        "prefix_mask": rows("1111100000"),
    }
    assert describe_rows((1, LENGTH), **{k: v for k, v in inputs.items() if k != "input_ids"})[0].document == [0] * 10
    with torch.no_grad():
        assert_close(model(**inputs).logits, reference_logits(config, double_weights(model), **inputs), scheme)


@pytest.mark.parametrize("scheme", ["alibi_scaled", "sandwich", "rope", "sinusoidal", "none"])
def test_runs_past_max_position_embeddings(scheme):
    config = tiny_config(max_position_embeddings=4, num_hidden_layers=1, **POSITIONS[scheme])
    model = loud_model(config)
    tokens = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        assert_close(model(tokens).logits, reference_logits(config, double_weights(model), tokens), scheme)


@pytest.mark.parametrize("rounding", ["bloom", "falcon"])
def test_rounded_alibi_in_bfloat16(rounding):
    """The bias is what Bloom and Falcon round it to; the rest is bfloat16 noise, far below what that moves."""
    config = tiny_config(
        position_embedding_type="alibi", alibi_rounding=rounding, num_hidden_layers=1, num_attention_heads=4
    )
    exact = tiny_config(position_embedding_type="alibi", num_hidden_layers=1, num_attention_heads=4)
    model = loud_model(config).bfloat16()
    weights = double_weights(model)
    tokens = torch.randint(0, VOCAB, (1, 6), generator=torch.Generator().manual_seed(7))
    # At positions around 3000 a bfloat16 product keeps steps of 2 to 4: rounding moves the scores by whole units.
    positions = torch.tensor([[3001, 3003, 3005, 3010, 3013, 3019]])
    inputs = {"position_ids": positions, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        got = model(tokens, **inputs).logits.double()
        rounded = reference_logits(config, weights, tokens, model_dtype=torch.bfloat16, **inputs)
        plain = reference_logits(exact, weights, tokens, **inputs)
    noise = 0.05 * rounded.abs().max()
    assert (got - rounded).abs().max() < noise < (got - plain).abs().max()
