"""`attn_implementation="minillm_blocks"` of transformers' own models, against their eager attention."""

import pytest
from blocks_cases import BATCHES, DECODERS, ENCODERS, FAMILIES, loss_and_gradients, model_of, scored

from minillm import blocked_attention
from minillm.blocked_attention import FlashInParts
from minillm.capabilities import BLOCKS


@pytest.fixture
def counted(monkeypatch):
    """Calls of attention in blocks."""
    calls = []
    for name in ("_composed",):
        run = getattr(blocked_attention, name)
        monkeypatch.setattr(blocked_attention, name, lambda *args, run=run: calls.append(1) or run(*args))
    apply = FlashInParts.apply
    monkeypatch.setattr(FlashInParts, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def assert_close_to_eager(found, expected, tolerance=1e-5):
    assert abs(found[0] - expected[0]) <= 1e-6 * max(1.0, abs(expected[0]))
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        difference = (gradient - expected[1][name]).abs().max()
        assert difference <= tolerance * largest, (name, float(difference / largest))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_eager(family, batch, counted):
    inputs = BATCHES[batch]()
    if family in DECODERS:
        inputs["labels"] = scored(inputs)
    elif batch == "packed":
        del inputs["position_ids"]
    model = model_of(family)
    expected = loss_and_gradients(model, inputs)
    model.set_attn_implementation(BLOCKS)
    found = loss_and_gradients(model, inputs)
    assert_close_to_eager(found, expected)
    # Full attention without a mask is SDPA's own.
    is_open = batch in ("plain", "packed") and family in ENCODERS
    assert len(counted) == (2 - (1 if family == "modernbert" else 2) * is_open)
