"""A caller's own masks, boolean or additive, of any content: the naive twin attends to what they show."""

import pytest
import torch
from hypothesis import strategies as st
from matrix_cases import double_weights
from random_cases import BACK_ENDS, VOCAB, attending, config_fields, loud, random_test, some_rows, table
from reference import reference_logits

HIDDEN = -torch.inf


@st.composite
def masked_runs(draw):
    """Fields, token ids with positions perhaps, and what the mask adds to scores; each query sees a key."""
    fields = draw(config_fields())
    rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    inputs = {"input_ids": table(draw, (rows, length), st.integers(0, VOCAB - 1))}
    if draw(st.booleans()):
        inputs["position_ids"] = table(draw, some_rows(draw, (rows, length)), st.integers(0, 7))
    heads = draw(st.sampled_from([1, fields["num_attention_heads"]]))
    copies = draw(st.sampled_from([1, rows])) * heads
    values = st.just(HIDDEN) | st.just(0.0) | (st.floats(-3, 3, width=16) if draw(st.booleans()) else st.nothing())
    added = table(draw, (copies * length, length), values).float()
    seen = table(draw, (1, copies * length), st.integers(0, length - 1))[0]
    added[torch.arange(copies * length), seen] = added[torch.arange(copies * length), seen].clamp(min=-5)
    return fields, inputs, added.view(-1, heads, length, length)


@random_test(
    quick=40,
    full=3000,
    run=masked_runs(),
    form=st.sampled_from(["bool", "lowest", "infinite"]),
    back_end=BACK_ENDS,
)
def test_own_masks_are_the_whole_mask(run, form, back_end):
    fields, inputs, added = run
    if form == "bool":
        added = torch.where(added > HIDDEN, 0.0, HIDDEN)
    mask = {
        "bool": added > HIDDEN,
        "lowest": added.clamp(min=torch.finfo(torch.float32).min),
        "infinite": added,
    }[form]
    model = loud(fields)
    with attending(model, back_end), torch.no_grad():
        got = model(**inputs, attention_mask=mask).logits
    weights = {name: tensor.detach() for name, tensor in double_weights(model).items()}
    # A mask says nothing of documents, so that positions may stand in any order.
    positions = inputs.get("position_ids", torch.arange(mask.shape[-1])[None])
    everywhere = torch.ones_like(inputs["input_ids"])
    twin = {"input_ids": inputs["input_ids"], "position_ids": positions, "attention_mask": everywhere}
    with torch.no_grad():
        expected = reference_logits(model.config, weights, **twin, own_mask=added)
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max())


def test_a_drawn_mask_shows():
    """The property above could not fail if masks did not matter."""
    model = loud({"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1})
    ids = torch.arange(4)[None]
    masks = torch.ones(4, 4).bool(), torch.ones(4, 4).tril().bool()
    with torch.no_grad():
        one, other = (model(ids, attention_mask=mask[None, None]).logits for mask in masks)
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_query_that_sees_nothing_leaves_the_others_alone(kind):
    model = loud({"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1})
    ids, visible = torch.arange(4)[None], torch.ones(4, 4).tril().bool()
    blind = visible.clone()
    blind[2] = False
    masks = [
        mask[None, None] if kind == torch.bool else torch.where(mask, 0.0, torch.finfo(kind).min)[None, None]
        for mask in (visible, blind)
    ]
    with torch.no_grad():
        one, other = (model(ids, attention_mask=mask).logits[0] for mask in masks)
    kept = [0, 1, 3]
    assert torch.isfinite(other).all() and (one - other)[kept].abs().max() < 1e-5
