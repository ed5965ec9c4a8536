"""Flex attention: mask and bias in closed form against the naive twin; on CUDA gradients, generation and flash, too.

On CPU it runs uncompiled, which takes nothing of flex attention's meaning: `torch.nn.attention.flex_attention` then
evaluates mask and score functions for every pair. The compiled forward is a slow test.
"""

import pytest
import torch
import transformers.integrations.flex_attention as stock
from attention_calls import attention_of
from matrix_cases import (
    LAYOUTS,
    VOCAB,
    assert_close,
    batch,
    double_weights,
    layouts_of,
    loud_model,
    model_run,
    real_tokens,
    reference_run,
    rows,
    tiny_config,
)
from reference import reference_logits
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import DynamicCache
from variants import variants

from minillm.position_bias import PositionBias

ALIBI = {"position_embedding_type": "alibi"}
PREFIX = {"attention_type": "prefix"}
CASES = variants(
    "causal gqa alibi_scaled alibi_bloom alibi_falcon sandwich learned window window-alibi prefix prefix-rope_2d-mqa "
    "prefix-alibi prefix-sandwich prefix-window prefix-glm_2d bidirectional bidirectional-alibi bidirectional-window "
    # transformers repeats the keys where the number of heads is no power of two.
    "six_heads-alibi-gqa"
)
COMPILED = ("causal", "alibi_scaled", "sandwich", "window", "prefix", "prefix-alibi", "bidirectional")


@pytest.fixture
def uncompiled(monkeypatch):
    """Calls torch's flex attention as it is, and counts the calls."""
    calls = []

    def plain(query, key, value, training=False, **kwargs):
        calls.append(kwargs)
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(stock, "compile_friendly_flex_attention", plain)
    return calls


def flex_model(fields, **sizes):
    return loud_model(tiny_config(attn_implementation="flex_attention", **fields, **sizes))


# Every case with all that a batch can bring, and two of them with every batch there is.
EVERYTHING = [
    (case, layout)
    for case in CASES
    for layout in LAYOUTS
    if layout in ("packing_prefix_padding", "positions_of_choice") or case in ("prefix-alibi", "bidirectional-window")
    if layout in layouts_of(tiny_config(**CASES[case]))
]


@pytest.mark.parametrize(("case", "layout"), EVERYTHING)
def test_logits_equal_the_twin(case, layout, uncompiled):
    model = flex_model(CASES[case])
    inputs = batch(model.config, layout)
    real = real_tokens(inputs)
    with torch.no_grad():
        got = model(**inputs, use_cache=False).logits
        expected = reference_logits(model.config, double_weights(model), **inputs)
    assert_close(got[real], expected[real], f"{case}, {layout}")
    assert len(uncompiled) == model.config.num_hidden_layers
    assert all(isinstance(call["block_mask"], BlockMask) for call in uncompiled)


@pytest.mark.parametrize("case", CASES)
def test_no_square_of_the_length_is_made(case):
    """Neither mask nor bias holds a number for each pair of tokens, but for the blocks of 128 x 128."""
    length = 700
    config = tiny_config(attn_implementation="flex_attention", max_position_embeddings=length, **CASES[case])
    inputs = attention_of(config, torch.zeros(1, length, config.hidden_size))
    held = [tensor for tensor in vars(inputs.attention_mask).values() if isinstance(tensor, torch.Tensor)]
    if config.position_embedding_type in ("alibi", "sandwich"):
        assert isinstance(inputs.position_bias, PositionBias)
        held += [value for value in vars(inputs.position_bias).values() if isinstance(value, torch.Tensor)]
    else:
        assert inputs.position_bias is None
    assert held and max(tensor.numel() for tensor in held) <= length


@pytest.mark.parametrize("case", ["causal", "alibi_scaled", "prefix-alibi", "window", "window-alibi"])
def test_a_second_forward_from_the_cache_equals_one(case, uncompiled):
    """Blocks of several tokens: single steps are left to the back ends that generate."""
    model = flex_model(CASES[case])
    inputs = batch(model.config, "left_padding")
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        expected = model(**inputs).logits
        # Cached tokens cannot see later ones, so that the cut stands behind the prefix.
        cache, got = DynamicCache(config=model.config), []
        for start, end in ((0, 7), (7, 10)):
            prefix = inputs["prefix_mask"][:, start:end] if "prefix_mask" in inputs else None
            step = model(tokens[:, start:end], attention_mask=mask[:, :end], prefix_mask=prefix, past_key_values=cache)
            got.append(step.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(got, dim=1)[real], expected[real], atol=2e-5, rtol=1e-5)


def custom_mask(batch_size, heads=1):
    """A causal 4D mask with holes of its own; a token sees itself."""
    generator = torch.Generator().manual_seed(8)
    mask = torch.rand(batch_size, heads, 10, 10, generator=generator) > 0.4
    return mask & torch.ones(10, 10).tril().bool() | torch.eye(10).bool()


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("case", ["causal", "alibi_scaled", "window"])
def test_a_mask_of_one_s_own_equals_eager(case, batch_size, additive, uncompiled):
    mask = custom_mask(batch_size)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    model = flex_model(CASES[case])
    tokens = batch(model.config, "plain")["input_ids"]
    with torch.no_grad():
        got = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(got, model(tokens, attention_mask=mask).logits, atol=2e-5, rtol=1e-5)
        assert (got - model(tokens).logits).abs().max() > 1e-2


def test_a_mask_for_each_head_is_refused():
    """transformers hands flex attention the first head's alone."""
    model = flex_model({})
    tokens = batch(model.config, "plain")["input_ids"]
    with torch.no_grad(), pytest.raises(ValueError, match="one mask for all heads; use 'sdpa' or 'eager'"):
        model(tokens, attention_mask=custom_mask(2, heads=4))


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_logits_equal_the_twin(case):
    torch._dynamo.reset()
    model = flex_model(CASES[case])
    packed = "packing" if model.config.sliding_window else "packing_prefix_padding"
    for layout in ("plain", packed):
        inputs = batch(model.config, layout)
        real = real_tokens(inputs)
        with torch.no_grad():
            got = model(**inputs, use_cache=False).logits
            expected = reference_logits(model.config, double_weights(model), **inputs)
        assert_close(got[real], expected[real], f"{case}, {layout}")


def on_cuda(fields, back_end):
    """The kernels need heads of 16 channels at least."""
    model = loud_model(tiny_config(attn_implementation=back_end, **{"hidden_size": 64, **fields}))
    return model.to("cuda")


def to_cuda(inputs):
    return {name: tensor.to("cuda") for name, tensor in inputs.items()}


def wide(case):
    return {**CASES[case], "head_dim": 16}


@pytest.fixture
def full_float32():
    """Without TF32, whose products have ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "layout"), [(case, layout) for case in CASES for layout in layouts_of(tiny_config(**CASES[case]))]
)
def test_gradients_on_cuda_equal_the_twin(case, layout, full_float32):
    torch._dynamo.reset()
    model = on_cuda(wide(case), "flex_attention")
    inputs = batch(model.config, layout)
    weights = {name: weight.cpu().detach().requires_grad_() for name, weight in double_weights(model).items()}
    expected_logits, expected = reference_run(model.config, weights, inputs)
    logits, gradients = model_run(model, to_cuda(inputs))
    real = real_tokens(inputs)
    assert_close(logits.cpu()[real], expected_logits[real], f"{case}, {layout}", tolerance=1e-4)
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is not None:
            assert gradients[name] is not None, name
            assert (gradients[name].cpu().double() - gradient).abs().max() <= 1e-4 * largest, name


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bidirectional")])
def test_generation_on_cuda_equals_eager(case, cache, full_float32):
    torch._dynamo.reset()
    prompt = {
        "input_ids": torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3)).cuda(),
        "attention_mask": rows("111111", "001111").cuda(),
    }
    found = []
    for back_end in ("eager", "flex_attention"):
        model = on_cuda(wide(case), back_end)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        found.append(model.generate(**prompt, **options, cache_implementation=cache))
    assert torch.equal(*found)


FLASH_CASES = ("causal", "gqa", "learned", "window", "bidirectional", "bidirectional-window")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["plain", "left_padding", "right_padding"])
@pytest.mark.parametrize("case", FLASH_CASES)
@pytest.mark.parametrize("back_end", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_equals_eager(back_end, case, layout):
    """In bfloat16, the only kind of number that these kernels take: as near to float32 as eager in bfloat16 is."""
    pytest.importorskip("flash_attn" if back_end == "flash_attention_2" else "flash_attn_interface")
    exact = on_cuda(wide(case), "eager")
    inputs = to_cuda(batch(exact.config, layout))
    real = real_tokens(inputs)

    def run(model):
        logits, gradients = model_run(model, inputs)
        return {"logits": logits[real].float(), **{name: gradient.float() for name, gradient in gradients.items()}}

    expected = run(exact)
    rounded, got = (run(on_cuda(wide(case), name).bfloat16()) for name in ("eager", back_end))
    largest = max(tensor.norm() for name, tensor in expected.items() if name != "logits")
    for name, tensor in expected.items():
        noise = (rounded[name] - tensor).norm()
        assert noise < 0.2 * tensor.norm() + 0.01 * largest, f"{name}: too loud to tell anything"
        assert (got[name] - tensor).norm() < 3 * noise + 0.01 * tensor.norm() + 0.001 * largest, name


@pytest.mark.gpu
def test_flash_attention_keeps_packed_positions_apart():
    """Positions that restart, in one row and without a mask, as `DataCollatorWithFlattening` makes them."""
    pytest.importorskip("flash_attn")
    model = on_cuda({"head_dim": 16}, "flash_attention_2").bfloat16()
    tokens = torch.randint(3, VOCAB, (1, 10), generator=torch.Generator().manual_seed(3)).cuda()
    with torch.no_grad():
        packed = model(tokens, position_ids=rows("0123012345").cuda(), use_cache=False).logits
        apart = [model(part, use_cache=False).logits for part in tokens.split((4, 6), dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), atol=0.05, rtol=0.05)
    with torch.no_grad(), pytest.raises(ValueError, match="documents"):
        model(tokens.expand(2, -1), position_ids=rows("0123012345", "0123456789").cuda(), use_cache=False)
