"""Forwards of models and batches drawn at random equal the naive twin, by every way of attending, dtype and cache."""

import torch
from hypothesis import assume
from hypothesis import strategies as st
from matrix_cases import double_weights, model_run, reference_run
from random_cases import BACK_ENDS, LONGEST, attending, batches, config_fields, loud, random_test, real_of
from reference import reference_logits
from transformers import StaticCache


@st.composite
def runs(draw, **options):
    """Fields of a config, and a batch that it takes."""
    fields = draw(config_fields(**options))
    return fields, draw(batches(loud(fields).config))


def twin_logits(model, inputs, dtype=torch.float64, weights=None):
    """The twin's logits, in the arithmetic of a dtype."""
    given = double_weights(model) if weights is None else weights
    weights = {name: tensor.detach().to(dtype) for name, tensor in given.items()}
    with torch.no_grad():
        return reference_logits(model.config, weights, **inputs, model_dtype=model.dtype)


def assert_as_exact_as_the_twin(got, model, inputs, dtype, what):
    """Within the rounding that the twin itself shows in a dtype, and some."""
    exact, real = twin_logits(model, inputs), real_of(inputs)
    rounding = (twin_logits(model, inputs, dtype).double() - exact)[real].abs().max() if real.any() else 0.0
    scale = exact[real].abs().max().item() if real.any() else 0.0
    bound = 5 * rounding + 20 * torch.finfo(dtype).eps * scale
    difference = (got.double() - exact)[real].abs().max() if real.any() else 0.0
    assert difference <= bound, f"{what}: off by {difference:.2e}, the twin by {rounding:.2e}, of {scale:.2e}"


@random_test(quick=40, full=4000, run=runs(), back_end=BACK_ENDS)
def test_logits_equal_the_twin(run, back_end):
    fields, inputs = run
    model = loud(fields)
    with attending(model, back_end), torch.no_grad():
        got = model(**inputs).logits
    assert torch.isfinite(got).all()
    assert_as_exact_as_the_twin(got, model, inputs, torch.float32, back_end)


@random_test(quick=25, full=2000, run=runs(), back_end=BACK_ENDS)
def test_gradients_equal_the_twin(run, back_end):
    fields, inputs = run
    model = loud(fields).train()
    config = model.config
    normed = min(config.hidden_size, config.head_dim if config.qk_norm else config.hidden_size)
    # LayerNorm over two channels gives their signs alone: all of its gradient is rounding.
    assume(real_of(inputs).any() and (config.norm_type == "rmsnorm" or normed > 2))
    weights = double_weights(model)
    exact = reference_run(config, weights, inputs, training=True)
    single = {name: weight.detach().float().requires_grad_() for name, weight in weights.items()}
    rounded = reference_run(config, single, inputs, training=True)
    with attending(model, back_end):
        got = model_run(model, inputs)
    largest = max(gradient.abs().max() for gradient in exact[1].values() if gradient is not None)
    for name, wanted in exact[1].items():
        if wanted is None or got[1][name] is None:
            assert all(each[1][name] is None or not each[1][name].any() for each in (exact, got)), name
            continue
        # Where a gradient is next to nothing but rounding the twin has as much.
        rounding = (rounded[1][name].double() - wanted).abs().max()
        difference = (got[1][name].double() - wanted).abs().max()
        assert difference <= 10 * rounding + 1e-5 * max(wanted.abs().max(), 5e-2 * largest), name


@random_test(quick=20, full=1500, run=runs(), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_other_dtypes_round_no_more_than_the_twin(run, dtype):
    fields, inputs = run
    # In 16 bits two experts may be equally probable; in 64 no grouped kernel runs.
    fields = fields | {"mlp_type": "glu"} if fields["mlp_type"] == "moe" else fields
    for name in ("num_local_experts", "num_experts_per_tok"):
        fields.pop(name, None)
    model = loud(fields).to(dtype)
    with torch.no_grad():
        got = model(**inputs).logits
    assert got.dtype == dtype and torch.isfinite(got).all()
    # Cosines and sines are made in float32.
    assert_as_exact_as_the_twin(got, model, inputs, torch.float32 if dtype == torch.float64 else dtype, dtype)


@st.composite
def decodings(draw):
    """Fields, a batch without documents, the ends of its parts, whose first holds any prefix, and a kind of cache."""
    # The scale of cached keys cannot follow a length that is not known yet.
    fields, inputs = draw(
        runs(attention_types=("causal", "prefix")).filter(
            lambda run: (run[0].get("rope_parameters") or {}).get("rope_type") not in ("dynamic", "longrope")
        )
    )
    inputs.pop("document_ids", None)
    length = inputs["input_ids"].shape[1]
    if "position_ids" in inputs and "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    first = 1
    if "prefix_mask" in inputs:
        first = draw(st.integers(1, length))
        inside = (torch.arange(length) < first).long() * (1 if draw(st.booleans()) else 0)
        inputs["prefix_mask"] = inside.expand_as(inputs["input_ids"])
    ends = sorted({*draw(st.lists(st.integers(first, length), max_size=3)), length})
    return fields, inputs, ends, draw(st.sampled_from(["dynamic", "static"]))


@random_test(quick=25, full=2000, decoding=decodings(), back_end=BACK_ENDS)
def test_parts_with_a_cache_equal_the_twin_of_the_whole(decoding, back_end):
    fields, inputs, ends, kind = decoding
    model = loud(fields)
    cache = StaticCache(model.config, max_cache_len=LONGEST + 2) if kind == "static" else None
    got, start = [], 0
    with attending(model, back_end), torch.no_grad():
        for end in ends:
            part = {name: tensor[:, start:end] for name, tensor in inputs.items()}
            for name in ("attention_mask", "position_ids"):
                if name in inputs:
                    part[name] = inputs[name][:, :end]
            if start:
                part.pop("prefix_mask", None)
            output = model(**part, past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, end
            got.append(output.logits)
    assert_as_exact_as_the_twin(torch.cat(got, 1), model, inputs, torch.float32, (kind, ends))
