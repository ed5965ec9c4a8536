"""Sliding windows: the narrowest and the widest, and padding that one would count."""

import peft
import pytest
import torch
from matrix_cases import HOLES, LAYOUTS, LENGTH, assert_close, batch, double_weights, loud_model, rows, tiny_config
from reference import reference_logits
from transformers import DynamicCache, StaticCache
from variant_cases import tokens

from minillm import blocked_attention
from minillm.tuning import tuning

ATTENTION_TYPES = ("causal", "prefix", "bidirectional")


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_config", "static"])
@pytest.mark.parametrize("scheme", ["rope", "alibi"])
@pytest.mark.parametrize("window", [2, 3, LENGTH - 1, LENGTH, LENGTH + 1])
@torch.no_grad()
def test_every_window_in_every_cache(window, scheme, kind):
    model = loud_model(tiny_config(sliding_window=window, position_embedding_type=scheme))
    ids, weights = tokens(length=2 * LENGTH), double_weights(model)
    expected = reference_logits(model.config, weights, ids)
    for pieces in ([1] * 2 * LENGTH, [4, 1, 7, 8], [2 * LENGTH]):
        cache = {
            "dynamic": DynamicCache,
            "dynamic_config": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(model.config, max_cache_len=2 * LENGTH + 2),
        }[kind]()
        got = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
        assert_close(torch.cat(got, dim=1), expected, f"{kind}, {pieces}")


@pytest.mark.parametrize("window", [2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**33, 2**63 - 1])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_window_beyond_every_index_is_none(attention_type, window, monkeypatch):
    ids = tokens()
    wide, plain = (
        loud_model(tiny_config(attention_type=attention_type, sliding_window=each)) for each in (window, None)
    )
    for back_end in ("eager", "sdpa", "blocks"):
        if back_end == "blocks":
            monkeypatch.setattr(tuning, "blocks_from", 3)
            monkeypatch.setattr(blocked_attention, "block_size", lambda length: 3)
        for model in (wide, plain):
            model.set_attn_implementation("eager" if back_end == "eager" else "sdpa")
        with torch.no_grad():
            torch.testing.assert_close(wide(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        if attention_type != "bidirectional":
            for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
                answers = [
                    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)
                    for model in (wide, plain)
                ]
                assert torch.equal(*answers)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@torch.no_grad()
def test_padding_between_real_tokens_is_refused_with_a_window(attention_type, layout):
    for window in (3, 50):
        model = loud_model(tiny_config(attention_type=attention_type, sliding_window=window))
        inputs = batch(model.config, layout)
        if layout in HOLES:
            with pytest.raises(ValueError, match=r"padding between real tokens.*`sliding_window`"):
                model(**inputs)
        else:
            model(**inputs)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_padding_behind_cached_tokens_is_refused_with_a_window(static):
    """A batch padded on the right and gone on with: the padding would come to lie between real tokens."""
    model = loud_model(tiny_config(sliding_window=4))
    cache = StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    mask = rows("1111100000", "1111111111")
    model(tokens(), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="padding between real tokens"):
        model(tokens(length=1), attention_mask=torch.cat([mask, mask[:, :1]], 1), past_key_values=cache)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_before_left_padding(kind):
    """Right without a window; refused with one, which would count the padding between virtual and real tokens."""
    ids, mask = tokens(), rows("0001111111", "1111111111")
    for window in (None, 4):
        model = peft.get_peft_model(
            loud_model(tiny_config(sliding_window=window)), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ).eval()
        if window:
            with pytest.raises(ValueError, match="padding between real tokens"):
                model(input_ids=ids, attention_mask=mask)
            continue
        with torch.no_grad():
            alone = model(input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:]).logits[:, -7:]
            together = model(input_ids=ids, attention_mask=mask).logits[:1, -7:]
        assert_close(together, alone.double(), kind.__name__)
