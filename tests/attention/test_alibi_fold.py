"""ALiBi as channels of queries and keys: when it is chosen, how exact it is, and that it never meets a cache.

It is chosen on CUDA alone, and forced here on CPU; the tests marked `gpu` run it where it belongs.
"""

import pytest
import torch
from attention_calls import attention_of, call_of
from matrix_cases import double_weights, loud_model, model_run, reference_run, rows, tiny_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache
from variants import variants

from minillm.alibi import AlibiBias, alibi_slopes
from minillm.back_ends import attention_inputs, folds
from minillm.folded_alibi import FoldedBias, fold_alibi, folded_attention_forward, split
from minillm.tuning import tuning

ALIBI = {"position_embedding_type": "alibi"}
CASES = variants("causal prefix gqa mqa six_heads-gqa steep scaled_down heads_of_20 qk_norm window30")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LENGTH = 24


def config_of(case="causal", **fields):
    config = tiny_config(**{**ALIBI, **CASES[case], **fields})
    config._attn_implementation = "sdpa"
    return config


def model_in(dtype, case="causal", **fields):
    return loud_model(config_of(case, **fields)).to(dtype)


def token_ids(length=LENGTH):
    return torch.randint(3, 19, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def on_cpu(monkeypatch):
    """Folds on CPU, too."""
    monkeypatch.setattr(tuning, "folding_devices", ("cpu", "cuda"))


@pytest.fixture
def calls(monkeypatch):
    """What SDPA gets: the shapes of query, key and value, and its options."""
    seen, scaled = [], F.scaled_dot_product_attention

    def spy(*states, **options):
        seen.append(([tuple(state.shape) for state in states], options))
        return scaled(*states, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def is_folded_call(call):
    (query, key, value), options = call
    is_wide = query[-1] == key[-1] == value[-1] == 16
    return is_wide and query[2] == key[2] and options["attn_mask"] is None and options["is_causal"] is True


@DTYPES
@pytest.mark.parametrize("fields", [{}, {"num_attention_heads": 12}, {"alibi_scale": 0.3}], ids=str)
@pytest.mark.parametrize("head_dim", [8, 20, 128, 248])
def test_slopes_are_exact(head_dim, fields, dtype):
    config = config_of(head_dim=head_dim, **{"num_attention_heads": 16, "hidden_size": 48, **fields})
    fold = fold_alibi(config, 2, dtype, torch.device("cpu"))
    channels = fold.query[0, :, 0].double()
    assert channels.shape == (config.num_attention_heads, -(-(head_dim + 6) // 8) * 8 - head_dim)
    slopes = AlibiBias(config, torch.zeros(1, 1), torch.zeros(1, 1), dtype).head_factors.double()
    for digit, unit in ((channels[:, :3], 256), (channels[:, 3:6], 1)):
        error = digit.sum(-1) * head_dim**-0.5 / unit - slopes
        # Below 2**-14 float16 has a fixed grain, and the float32 slopes of a scale are rounded three times.
        grain = 2.0**-24 * head_dim**-0.5 / unit if dtype == torch.float16 else 0.0
        assert ((error.abs() - grain) / slopes).max() <= (2.0**-22 if "alibi_scale" in fields else 2.0**-24)
    assert not channels[:, 6:].any()
    assert channels.abs().max() <= 256 * head_dim**0.5


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (11, torch.float16)])
def test_a_number_is_the_sum_of_its_parts(bits, dtype):
    for number in (2.0**-0.5, 2.0**-8, 1 / 3, 11.3137, 181.02):
        parts = split(number, bits)
        assert abs(sum(parts) - number) <= number * 2.0 ** (-3 * bits)
        # Below 2**-14 float16 has a fixed grain.
        assert all(torch.tensor(part, dtype=dtype).item() == part or abs(part) < 2.0**-14 for part in parts)


def test_positions_are_exact():
    for dtype in (torch.bfloat16, torch.float16):
        key = fold_alibi(config_of(), 2**16, dtype, torch.device("cpu")).key
        assert key.shape == (1, 1, 2**16, 8) and key.dtype == dtype
        for part in range(3):
            high, low = key[0, 0, :, part].int(), key[0, 0, :, 3 + part].int()
            assert torch.equal(256 * high + low, torch.arange(2**16).int())
        assert not key[..., 6:].any()


def relative(got, expected):
    return (got.double() - expected).norm() / expected.norm()


def attention_run(states, last, weight, attend):
    """The last rows of the output and gradients by query, key and value."""
    output = attend(*states)[:, :, -last:]
    return output.detach(), *torch.autograd.grad((output * weight.to(output)).sum(), states)


@pytest.mark.mostly_thorough("1024-bfloat16", "1024-float16")
@DTYPES
@pytest.mark.parametrize("length", [1024, 8192])
def test_attention_is_as_exact_as_with_a_dense_bias(length, dtype):
    """Against float64, at slopes of 2**-0.5, 2**-2 and 2**-8, forward and backward; the last 64 rows, which have the
    largest biases."""
    last, head_dim, heads = 64, 64, [0, 3, 15]
    config = config_of(num_attention_heads=16, head_dim=head_dim)
    slopes = torch.tensor(alibi_slopes(config), dtype=torch.float64)[heads, None, None]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 3, length, head_dim, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    weight = torch.randn(1, 3, last, head_dim, generator=generator).to(dtype)
    fold = fold_alibi(config, length, dtype, torch.device("cpu"))
    fold = FoldedBias(fold.query[:, heads], fold.key)
    distance = torch.arange(length - last, length)[:, None] - torch.arange(length)
    hidden = distance < 0

    def folded(query, key, value):
        wide = fold.widen(query, key, value)
        return F.scaled_dot_product_attention(*wide, is_causal=True, scale=head_dim**-0.5)[..., :head_dim]

    def dense(query, key, value):
        bias = -slopes.to(torch.promote_types(query.dtype, torch.float32)) * distance
        bias = bias.to(query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)[None]
        return F.scaled_dot_product_attention(query[:, :, -last:], key, value, attn_mask=bias)

    doubles = [state.detach().double().requires_grad_() for state in states]
    expected = attention_run(doubles, last, weight, dense)
    errors = zip(
        attention_run(states, last, weight, folded), attention_run(states, last, weight, dense), expected, strict=True
    )
    for own, other, exact in errors:
        for head in range(3):
            bound = 1.25 * relative(other[:, head], exact[:, head])
            assert relative(own[:, head], exact[:, head]) <= bound < 1e-2


@pytest.mark.parametrize("length", [2**13, 2**16])
def test_scores_stay_exact_up_to_the_longest_text(length):
    """The last row in the arithmetic of a fused kernel: products and sums in float32, probabilities rounded."""
    config = config_of(num_attention_heads=16, head_dim=64)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, count, 64, generator=generator) for heads, count in ((16, 1), (1, length)))
    value = torch.randn(1, 1, length, 64, generator=generator)
    slopes = torch.tensor(alibi_slopes(config))[:, None, None]
    distance = (length - 1 - torch.arange(length))[None]

    def attend(scores, value, dtype):
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return (weights.to(dtype).to(value.dtype) @ value) / weights.sum(-1, keepdim=True)

    for dtype, longest in ((torch.bfloat16, 2**16), (torch.float16, 2**13)):
        if length > longest:
            continue
        query, key, value = (state.to(dtype) for state in (query, key, value))
        wide = fold_alibi(config, length, dtype, torch.device("cpu")).widen(query, key, value)
        exact = (query.double() @ key.double().mT) / 8 - slopes.double() * distance
        expected = attend(exact, value.double(), torch.float64)
        tabled = (query.float() @ key.float().mT) / 8 + (-slopes * distance).to(dtype).float()
        dense = attend(tabled, value.float(), dtype)
        # Channel after channel: in which order a product of matrices adds them depends on the processor.
        scores = sum(
            wide[0][..., c : c + 1].float() * wide[1][..., c].float()[:, :, None] for c in range(wide[0].shape[-1])
        )
        folded = attend(scores / 8, value.float(), dtype)
        assert relative(folded, expected) <= 1.25 * relative(dense, expected) < 1e-2


def run_in(model, ids):
    logits, gradients = model_run(model, {"input_ids": ids})
    return {"logits": logits, **gradients}


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_as_exact_as_with_a_dense_bias(case, dtype, monkeypatch, calls, poisoned_memory):
    """Against the twin in double precision, whose weights are those rounded to `dtype`."""
    model, ids = model_in(dtype, case), token_ids()
    logits, gradients = reference_run(model.config, double_weights(model), {"input_ids": ids})
    dense = run_in(model, ids)
    assert all(options["attn_mask"] is not None for _, options in calls)
    calls.clear()
    monkeypatch.setattr(tuning, "folding_devices", ("cpu",))
    folded = run_in(model, ids)
    width = 32 if case == "heads_of_20" else 16
    assert [shape[-1] for states, _ in calls for shape in states] == [width] * 6
    assert all(options["attn_mask"] is None and options["is_causal"] for _, options in calls)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, expected in {"logits": logits, **gradients}.items():
        noise = (dense[name].double() - expected).norm()
        assert folded[name].isfinite().all()
        assert (folded[name].double() - expected).norm() <= 1.5 * noise + 1e-3 * largest, name


def test_sdpa_s_flash_kernel_takes_it(on_cpu, calls):
    """One width of all three, no mask, and the kernel that refuses anything else."""
    model = model_in(torch.bfloat16, "six_heads-gqa")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(token_ids(), use_cache=False).logits.float().sum().backward()
    assert len(calls) == 2
    for states, options in calls:
        assert states == [(2, 6, LENGTH, 16), (2, 2, LENGTH, 16), (2, 2, LENGTH, 16)]
        assert options["attn_mask"] is None and options["is_causal"] is True and options["enable_gqa"] is True
        assert options["scale"] == model.config.head_dim**-0.5


def test_no_square_of_the_length_is_made(on_cpu):
    length = 4096
    inputs = attention_of(config_of(), torch.zeros(1, length, 32, dtype=torch.bfloat16))
    assert inputs.attention_mask is None and isinstance(inputs.position_bias, FoldedBias)
    assert sum(channels.numel() for channels in inputs.position_bias) <= 8 * (length + 4)


def would_fold(config, length=LENGTH, kind="sdpa", device="cuda", dtype=torch.bfloat16, cache=None, **inputs):
    config._attn_implementation = kind
    call = call_of(config, torch.zeros(2, length, 0, dtype=dtype), cache, **inputs)
    with pytest.MonkeyPatch.context() as patch:
        # On CPU, if `device` may fold.
        patch.setattr(tuning, "folding_devices", ("cpu",) if device in tuning.folding_devices else ())
        if kind != "sdpa":
            return attention_inputs(call).function is folded_attention_forward
        return folds(call)


def filled_cache(config):
    cache = DynamicCache(config=config)
    state = torch.zeros(2, 4, 3, 8)
    for layer in range(2):
        cache.update(state, state, layer)
    return cache


ONES = torch.ones(2, LENGTH, dtype=torch.long)
FOLDED = {
    "plain": {},
    "float16": {"dtype": torch.float16, "length": 2**13},
    "as long as positions go": {"length": 2**16},
    "nothing is padding": {"attention_mask": ONES},
    "positions that are the default": {"position_ids": torch.arange(LENGTH).expand(2, -1)},
    "an empty cache": {"cache": DynamicCache()},
    "an empty cache of fixed size": {"cache": StaticCache(config_of(), max_cache_len=40)},
}
DENSE = {
    "cpu": {"device": "cpu"},
    "float32": {"dtype": torch.float32},
    "eager": {"kind": "eager"},
    "flex": {"kind": "flex_attention"},
    "too long": {"length": 2**16 + 1},
    "too long for float16": {"dtype": torch.float16, "length": 2**13 + 1},
    "one query": {"length": 1},
    "left padding": {"attention_mask": rows("000" + "1" * 21, "1" * 24)},
    "right padding": {"attention_mask": rows("1" * 21 + "000", "1" * 24)},
    "packed": {"document_ids": rows("0" * 12 + "1" * 12, "0" * 12 + "1" * 12)},
    "packed by positions": {"position_ids": torch.arange(12).repeat(2).expand(2, -1)},
    "positions of choice": {"position_ids": torch.arange(LENGTH).flip(0).expand(2, -1)},
}


@pytest.mark.parametrize("call", FOLDED)
def test_a_call_is_folded(call):
    assert would_fold(config_of(), **FOLDED[call])
    assert would_fold(config_of("prefix"), **FOLDED[call])


@pytest.mark.parametrize("call", DENSE)
def test_a_call_is_left_to_a_dense_bias(call):
    assert not would_fold(config_of(), **DENSE[call])


def test_a_prefix_and_a_filled_cache_are_left_to_a_dense_bias():
    assert not would_fold(config_of("prefix"), prefix_mask=ONES * (torch.arange(LENGTH) < 4))
    assert not would_fold(config_of(), cache=filled_cache(config_of()))


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "rope"},
        {"position_embedding_type": "sandwich", "sandwich_dim": 6},
        {"alibi_rounding": "bloom"},
        {"alibi_rounding": "falcon"},
        {"alibi_scale": 1.5},
        {"attention_type": "bidirectional"},
        {"sliding_window": 3},
        {"head_dim": 256},
    ],
    ids=str,
)
def test_a_config_is_left_to_a_dense_bias(fields):
    assert not would_fold(config_of(**fields))


def test_the_widest_head_is_folded():
    assert would_fold(config_of(head_dim=248))


def test_a_mask_of_one_s_own_is_left_to_a_dense_bias(on_cpu):
    embeds = torch.zeros(2, LENGTH, 32, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    inputs = attention_of(config_of(), embeds, attention_mask=mask)
    assert inputs.position_bias is None and inputs.attention_mask.shape == (1, 4, LENGTH, LENGTH)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_decides_over_weights_in_float32(enabled, on_cpu, calls):
    model, ids = model_in(torch.float32), token_ids()
    expected = model(ids, use_cache=False).logits
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        got = model(ids, use_cache=False).logits
    assert [is_folded_call(call) for call in calls] == [enabled] * 2
    assert relative(got, expected.double()) < 2e-2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("case", ["causal", "prefix", "gqa"])
def test_decoding_after_a_folded_prefill(case, kind, on_cpu, calls):
    """The cache holds heads of their own width, and steps from it equal one forward without it."""
    model, ids = model_in(torch.bfloat16, case), token_ids()
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    with torch.no_grad():
        parts = [model(ids[:, :-6], past_key_values=cache).logits]
        assert all(is_folded_call(call) for call in calls)
        calls.clear()
        parts += [model(part, past_key_values=cache).logits for part in ids[:, -6:].split((3, 1, 1, 1), dim=1)]
        assert not any(is_folded_call(call) for call in calls)
        whole = model(ids, use_cache=False).logits
        exact = model.double()(ids, use_cache=False).logits
    assert all(layer.keys.shape[-1] == layer.values.shape[-1] == model.config.head_dim for layer in cache.layers)
    noise = relative(whole, exact)
    assert relative(torch.cat(parts, dim=1), exact) <= 1.5 * noise < 3e-2


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_generation_folds_the_prompt(cache, on_cpu, calls):
    model, ids = model_in(torch.bfloat16), token_ids()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    text = model.generate(ids, **options, cache_implementation=cache, disable_compile=True)
    folded = [is_folded_call(call) for call in calls]
    assert folded[:2] == [True, True] and not any(folded[2:]) and len(folded) > 2
    assert torch.equal(text[:, :-4], ids)
    # Each token is likeliest, or as good as, in one forward over the text.
    with torch.no_grad():
        logits = model.double()(text, use_cache=False).logits[:, -5:-1]
    chosen = logits.gather(2, text[:, -4:, None])[..., 0]
    assert (logits.max(-1).values - chosen).max() < 0.05 * logits.std()


def test_one_graph_serves_the_whole_model(on_cpu, calls):
    torch._dynamo.reset()
    model, ids = model_in(torch.bfloat16), token_ids()
    expected = run_in(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    calls.clear()
    model.zero_grad()
    logits, gradients = model_run(compiled, {"input_ids": ids})
    assert len(calls) == 2 and all(is_folded_call(call) for call in calls)
    for name, got in {"logits": logits, **gradients}.items():
        torch.testing.assert_close(got, expected[name.removeprefix("_orig_mod.")], atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_a_compiler_that_rewrites_the_graph_keeps_every_part():
    """A rounding that is undone at once is among what a compiler removes."""
    torch._dynamo.reset()
    config = config_of(num_attention_heads=12, hidden_size=48, head_dim=128)
    arguments = config, 300, torch.bfloat16, torch.device("cpu")
    expected, found = fold_alibi(*arguments), torch.compile(fold_alibi, fullgraph=True)(*arguments)
    assert torch.equal(found.query, expected.query) and torch.equal(found.key, expected.key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, on_cpu, calls):
    model, ids = model_in(torch.bfloat16).train(), token_ids()
    expected = run_in(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls.clear()
    found = run_in(model, ids)
    assert [is_folded_call(call) for call in calls] == [True] * 4
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_dropout_reaches_folded_attention(on_cpu, calls):
    model, ids = model_in(torch.bfloat16, attention_dropout=0.5), token_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    assert [options["dropout_p"] for _, options in calls] == [0.0] * 4 + [0.5] * 4
    assert all(is_folded_call(call) for call in calls)


def test_a_rank_of_tensor_parallelism_has_the_slopes_of_its_heads(on_cpu):
    """Each half of the heads by itself, side by side, is the whole."""
    config = config_of("gqa")
    attention = loud_model(config).bfloat16().model.layers[0].self_attn
    states = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def attend(heads):
        call = call_of(config, states, heads=heads)
        return attention(states, **attention_inputs(call).keywords)[0]

    attention.o_proj = torch.nn.Identity()
    whole, outputs = attend(None), []
    linears = {name: getattr(attention, name).weight.detach() for name in ("q_proj", "k_proj", "v_proj")}
    for rank in (0, 1):
        for name, weight in linears.items():
            getattr(attention, name).weight = torch.nn.Parameter(weight.chunk(2)[rank])
        outputs.append(attend(slice(2 * rank, 2 * rank + 2)))
    assert torch.equal(torch.cat(outputs, dim=-1), whole)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_a_model_on_cuda_folds_and_is_as_exact_as_eager(case, dtype, calls):
    model, ids = model_in(dtype, case, max_position_embeddings=600).cuda(), token_ids(600).cuda()
    folded = run_in(model, ids)
    assert all((options["attn_mask"] is None) == (case != "window30") for _, options in calls)
    model.set_attn_implementation("eager")
    dense, exact = run_in(model, ids), run_in(model.double(), ids)
    largest = max(tensor.norm() for name, tensor in exact.items() if name != "logits")
    for name, tensor in exact.items():
        noise = (dense[name] - tensor).norm()
        assert (folded[name] - tensor).norm() <= 2 * noise + 1e-3 * largest, name


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_flash_kernel_on_cuda_takes_it(key_heads, dtype):
    """Without a square of the length in memory, which for four heads would be half a gigabyte."""
    model = model_in(dtype, num_key_value_heads=key_heads, head_dim=64, max_position_embeddings=8192).cuda()
    ids = token_ids(8192).cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(ids, use_cache=False).logits.float().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**28
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_generation_on_cuda_after_a_folded_prompt(cache, calls):
    model, ids = model_in(torch.bfloat16).cuda(), token_ids().cuda()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    text = model.generate(ids, **options, cache_implementation=cache, disable_compile=True)
    assert is_folded_call(calls[0])
    with torch.no_grad():
        logits = model.double()(text, use_cache=False).logits[:, -5:-1]
    chosen = logits.gather(2, text[:, -4:, None])[..., 0]
    assert (logits.max(-1).values - chosen).max() < 0.1 * logits.std()
