"""Attention on CPU in blocks of queries: which keys a block meets, equality at lengths that have several blocks, and
memory that grows with the length. The matrix of variants runs in blocks in `test_matrix.py`."""

import pytest
import torch
from matrix_cases import loud_model, tiny_config
from test_loss import LargestTensor

from minillm import blocked_attention, layout, masks
from minillm.blocked_attention import BlockedMask
from minillm.masks import build_attention_inputs

LENGTH = 300
VARIANTS = {
    "causal": {},
    "prefix": {"attention_type": "prefix"},
    "alibi": {"position_embedding_type": "alibi"},
    "prefix alibi": {"attention_type": "prefix", "position_embedding_type": "alibi"},
    "window": {"sliding_window": 40},
    "bidirectional window": {"attention_type": "bidirectional", "sliding_window": 40},
    "bidirectional alibi": {"attention_type": "bidirectional", "position_embedding_type": "alibi"},
    "gqa": {"num_key_value_heads": 2},
}


def config_of(variant):
    return tiny_config(max_position_embeddings=512, **VARIANTS[variant])


def token_batch(variant, packed):
    ids = torch.randint(19, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if packed:
        inputs["document_ids"] = (torch.arange(LENGTH) // 70)[None].repeat(2, 1)
    if "prefix" in variant:
        within = torch.arange(LENGTH) % 70 if packed else torch.arange(LENGTH)
        inputs["prefix_mask"] = torch.stack([(within < 30).long(), (within < (50 if packed else 200)).long()])
    return inputs


def logits_and_gradients(model, inputs):
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)).sum().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made anew"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_eager_at_length(variant, packed, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(blocked_attention, "KEPT_ELEMENTS", 2**26 if kept else 0)
    scaled = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        blocked_attention.F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or scaled(*args, **kw)
    )
    model, inputs = loud_model(config_of(variant)), token_batch(variant, packed)
    found = logits_and_gradients(model, inputs)
    # Two layers of three blocks, run again in the backward pass if their masks are not kept.
    assert len(calls) == (6 if kept else 12)
    model.set_attn_implementation("eager")
    expected = logits_and_gradients(model, inputs)
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    for own, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(own, other, atol=2e-5 * float(other.abs().max()) + 1e-6, rtol=1e-4)


def key_ranges(variant, length=256, **inputs):
    embeds = torch.zeros(1, length, 32)
    config = config_of(variant)
    config._attn_implementation = "sdpa"
    mask = build_attention_inputs(config, embeds, **inputs).attention_mask
    assert isinstance(mask, BlockedMask)
    return [(block.keys.start, block.keys.stop) for block in mask.blocks]


def test_a_block_meets_only_the_keys_that_it_sees():
    prefix = (torch.arange(256) < 100).long()[None]
    longer = (torch.arange(256) < 200).long()[None]
    documents = (torch.arange(256) >= 130).long()[None]
    assert key_ranges("causal") == [(0, 128), (0, 256)]
    assert key_ranges("alibi") == [(0, 128), (0, 256)]
    assert key_ranges("prefix", prefix_mask=prefix) == [(0, 128), (0, 256)]
    assert key_ranges("prefix", prefix_mask=longer) == [(0, 200), (0, 256)]
    assert key_ranges("window") == [(0, 128), (128 - 39, 256)]
    assert key_ranges("bidirectional window") == [(0, 128 + 39), (128 - 39, 256)]
    assert key_ranges("causal", length=384, document_ids=(torch.arange(384) >= 128).long()[None]) == [
        (0, 128),
        (128, 256),
        (128, 384),
    ]
    assert key_ranges("causal", document_ids=documents) == [(0, 128), (0, 256)]


def test_attention_that_is_short_or_plain_and_long_has_no_blocks():
    for length, variant in ((layout.SHORT, "causal"), (256, "bidirectional"), (masks.LONGEST_PLAIN + 1, "causal")):
        config = tiny_config(attention_type=variant)
        config._attn_implementation = "sdpa"
        assert build_attention_inputs(config, torch.zeros(1, length, 32)).attention_mask is None


@pytest.mark.parametrize("variant", ["prefix", "alibi", "prefix alibi", "window"])
def test_memory_grows_with_the_length(variant, monkeypatch):
    monkeypatch.setattr(blocked_attention, "KEPT_ELEMENTS", 0)
    largest = {}
    for length in (1024, 2048):
        model = loud_model(tiny_config(max_position_embeddings=2048, num_hidden_layers=1, **VARIANTS[variant]))
        ids = torch.zeros(1, length, dtype=torch.long)
        prefix = {"prefix_mask": (torch.arange(length) < 100).long()[None]} if "prefix" in variant else {}
        with LargestTensor() as watch:
            model(ids, use_cache=False, **prefix).logits.sum().backward()
        largest[length] = watch.largest
    heads = model.config.num_attention_heads
    assert largest[2048] <= heads * 2048 * blocked_attention.block_size(2048)
    assert largest[2048] < heads * 2048**2 / 4


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [10, LENGTH])
def test_a_soft_cap_is_refused_and_not_ignored(length, back_end):
    model = loud_model(config_of("causal"))
    model.set_attn_implementation(back_end)
    with pytest.raises(ValueError, match=r"`softcap=30.0`.*leave it out"):
        model(torch.ones(1, length, dtype=torch.long), softcap=30.0)


def test_dropout_reaches_the_blocks():
    model = loud_model(tiny_config(max_position_embeddings=512, attention_dropout=0.5))
    ids = token_batch("causal", False)["input_ids"]
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", ["causal", "prefix", "alibi"])
def test_generated_text_after_a_long_prompt_equals_eager(variant):
    model, ids = loud_model(config_of(variant)), token_batch(variant, False)["input_ids"]
    texts = []
    for back_end in ("sdpa", "eager"):
        model.set_attn_implementation(back_end)
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=-1))
    assert torch.equal(*texts)


def test_gradient_checkpointing_over_blocks_changes_nothing():
    model, inputs = loud_model(config_of("prefix alibi")).train(), token_batch("prefix alibi", True)
    expected = logits_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = logits_and_gradients(model, inputs)
    assert torch.equal(found[0], expected[0])
    for own, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(own, other)
