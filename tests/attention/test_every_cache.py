"""Cached equals uncached: token by token and in chunks, in dynamic, sliding and static caches.

For every attention type that has a cache, position scheme, head sharing and window, against the twin, which knows
no cache.
"""

import pytest
import torch
from matrix_cases import (
    HOLES,
    LENGTH,
    POSITIONS,
    VOCAB,
    assert_close,
    attention_cases,
    batch,
    double_weights,
    has_two_axes,
    loud_model,
    rows,
    tiny_config,
    windows_mostly_thorough,
)
from reference import reference_logits
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from minillm.cache import CACHE_NAME, with_room
from minillm.tuning import tuning

CASES = dict(attention_cases(("causal", "prefix")))
BACK_ENDS = ("eager", "sdpa")
# Lengths of the pieces that go in. The first holds every prefix of the layouts below.
SPLITS = {"token_by_token": [4] + [1] * 6, "chunks": [4, 3, 1, 2]}
LAYOUTS = {
    "plain": {"prefix_mask": rows("1111000000", "1100000000")},
    "left_padding": {
        "attention_mask": rows("0011111111", "0111111111"),
        "prefix_mask": rows("0011000000", "0110000000"),
    },
    "hole": {
        "attention_mask": rows("1110011111", "1101011111"),
        "prefix_mask": rows("1110000000", "1101000000"),
    },
}


@pytest.fixture(autouse=True)
def room_from_the_second_token(monkeypatch):
    monkeypatch.setattr(tuning, "growing_elements", 0)


def make_cache(kind, config):
    if kind == "static":
        return StaticCache(config=config, max_cache_len=LENGTH + 3)
    # Without the config every layer keeps all keys; with it, those of a windowed model drop what no query needs,
    # and the others have room to grow.
    return with_room(DynamicCache(config=config)) if kind == "dynamic_config" else DynamicCache()


def run_in_pieces(model, inputs, pieces, cache):
    """Logits [batch, length, vocab] of the pieces one after the other; the mask covers the tokens so far."""
    logits, start = [], 0
    for size in pieces:
        end = start + size
        piece = {
            name: value[:, :end] if name == "attention_mask" else value[:, start:end] for name, value in inputs.items()
        }
        logits.append(model(**piece, past_key_values=cache, use_cache=True).logits)
        start = end
    return torch.cat(logits, dim=1)


def inputs_of(config, layout):
    inputs = {"input_ids": batch(config, "plain")["input_ids"], **LAYOUTS[layout]}
    if config.attention_type != "prefix":
        del inputs["prefix_mask"]
    if has_two_axes(config):
        inputs["block_position_ids"] = rows("0000123456", "0000012301")
    return inputs


@pytest.mark.parametrize("case", windows_mostly_thorough(CASES))
@torch.no_grad()
def test_pieces_equal_the_twin(case):
    config = tiny_config(**CASES[case])
    model = loud_model(config)
    weights = double_weights(model)
    for layout in LAYOUTS:
        if config.sliding_window is not None and layout in HOLES:
            continue
        inputs = inputs_of(config, layout)
        real = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
        expected = reference_logits(config, weights, **inputs)
        for split, pieces in SPLITS.items():
            for index, kind in enumerate(("dynamic", "dynamic_config", "static")):
                # Both back ends see every cache, layout and split, but not every product of them.
                model.set_attn_implementation(BACK_ENDS[(index + len(layout) + len(split)) % 2])
                got = run_in_pieces(model, inputs, pieces, make_cache(kind, config))
                assert_close(got[real], expected[real], f"{case}, {layout}, {split}, {kind}")


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_config", "static"])
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("scheme", [scheme for scheme in POSITIONS if scheme not in ("alibi_bloom", "alibi_falcon")])
@torch.no_grad()
def test_prompt_answer_prompt(scheme, back_end, kind):
    """A second prefix block arrives at a filled cache: what was cached never sees it, so uncached is the same."""
    config = tiny_config(attention_type="prefix", **POSITIONS[scheme])
    model = loud_model(config)
    model.set_attn_implementation(back_end)
    inputs = inputs_of(config, "left_padding")
    # What `generate()` makes of ones, zeros and ones: a number for each block.
    inputs["prefix_mask"] = rows("0011002220", "0110000222")
    real = inputs["attention_mask"].bool()
    expected = reference_logits(config, double_weights(model), **inputs)
    # A block must go in as a whole: both second blocks lie in the third piece.
    got = run_in_pieces(model, inputs, [4, 2, 4], make_cache(kind, config))
    assert_close(got[real], expected[real], "cached")
    uncached = model(**inputs, use_cache=False).logits
    assert_close(uncached[real], expected[real], "uncached")


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("scheme", ["rope", "alibi_scaled", "sandwich", "learned", "sinusoidal"])
@pytest.mark.parametrize("form", ["new", "cached_and_new"])
@torch.no_grad()
def test_positions_of_choice_with_a_cache(scheme, back_end, form):
    """`position_ids` of the new tokens continue from counted ones; those of cached and new tokens say all."""
    config = tiny_config(**POSITIONS[scheme])
    model = loud_model(config)
    model.set_attn_implementation(back_end)
    positions = rows("0123456789", "0123579888") if form == "new" else rows("0246813579", "1133557799")
    inputs = {"input_ids": batch(config, "plain")["input_ids"], "attention_mask": torch.ones(2, LENGTH).long()}
    expected = reference_logits(config, double_weights(model), **inputs, position_ids=positions)
    cache, logits, start = DynamicCache(), [], 0
    for end in (4, 5, 10):
        logits.append(
            model(
                inputs["input_ids"][:, start:end],
                attention_mask=inputs["attention_mask"][:, :end],
                position_ids=positions[:, (start if form == "new" else 0) : end],
                past_key_values=cache,
            ).logits
        )
        # With the short form the cached keys count 0, 1, 2, ...: later pieces of chosen positions need the long form.
        if form == "new" and end == 5:
            break
        start = end
    got = torch.cat(logits, dim=1)
    assert_close(got, expected[:, : got.shape[1]], f"{scheme}, {form}")


@pytest.mark.parametrize("empty", [DynamicCache, lambda: None], ids=["empty_cache", "no_cache"])
@torch.no_grad()
def test_packed_prefill_into_an_empty_cache(empty):
    config = tiny_config(attention_type="prefix", position_embedding_type="alibi")
    model = loud_model(config)
    inputs = batch(config, "packing_prefix_padding")
    real = inputs["attention_mask"].bool()
    expected = reference_logits(config, double_weights(model), **inputs)
    got = model(**inputs, past_key_values=empty(), use_cache=True).logits
    assert_close(got[real], expected[real], "packed")


@torch.no_grad()
def test_document_ids_are_refused_with_a_filled_cache():
    model = loud_model(tiny_config())
    cache = getattr(model(torch.ones(1, 3, dtype=torch.long), use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match="document_ids"):
        model(
            torch.ones(1, 2, dtype=torch.long),
            past_key_values=cache,
            document_ids=torch.zeros(1, 2, dtype=torch.long),
        )


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@torch.no_grad()
def test_rope_that_follows_the_length_equals_llama_step_by_step(rope_type):
    """Beyond the original length frequencies change with the text, while cached keys keep theirs, so that cached
    differs from uncached: Llama's rule.
    """
    rope = {"rope_type": rope_type, "rope_theta": 100.0, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {
            "original_max_position_embeddings": 6,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 2.5, 3.0],
        }
    sizes = {"max_position_embeddings": 6 if rope_type == "dynamic" else 12}
    config = tiny_config(**sizes, rope_parameters=dict(rope))
    model = loud_model(config)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: getattr(config, name) for name in names}, **sizes, rope_parameters=dict(rope))
    ).eval()
    llama.load_state_dict(model.state_dict())
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(8))
    caches = DynamicCache(), DynamicCache()
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 11), (11, 12)):
        got, expected = (
            each(tokens[:, start:end], **{CACHE_NAME: cache}).logits
            for each, cache in zip((model, llama), caches, strict=True)
        )
        assert_close(got, expected.double(), f"tokens {start} to {end}")
    # A short text afterwards goes back to the original frequencies.
    assert_close(model(tokens[:, :3]).logits, llama(tokens[:, :3]).logits.double(), "short again")
