"""Attention on CPU in blocks of queries: which keys a block meets, equality at lengths that have several blocks, and
memory that grows with the length. The matrix of variants runs in blocks in `test_matrix.py`."""

import collections

import pytest
import torch
from attention_calls import attention_of
from largest_tensor import LargestTensor
from matrix_cases import loud_model, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from variants import variants

from minillm.blocked_attention import BlockedMask, block_size, blocked_attention_forward
from minillm.tuning import tuning

LENGTH = 300
VARIANTS = variants(
    "causal prefix alibi prefix-alibi alibi_bloom sandwich window40 bidirectional-window40 bidirectional-alibi gqa"
)


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


class CountedKernels(TorchDispatchMode):
    """Counts the calls of attention kernels, forward and backward."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if "scaled_dot_product" in name:
            self.counts["backward" if name.endswith("backward") else "forward"] += 1
        return func(*args, **(kwargs or {}))


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    for own, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(own, other, atol=2e-5 * float(other.abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("shortest", [16, 1000], ids=["in parts", "in one piece"])
@pytest.mark.parametrize("kept", [2**26, 40000, 0], ids=["kept", "some kept", "made anew"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_eager_at_length(variant, packed, kept, shortest, monkeypatch):
    monkeypatch.setattr(tuning, "kept_elements", kept)
    monkeypatch.setattr(tuning, "open_block_keys", shortest)
    model, inputs = loud_model(config_of(variant)), token_batch(variant, packed)
    with CountedKernels() as counted:
        found = logits_and_gradients(model, inputs)
    # Two layers of three blocks, each of which is cut where a document begins; nothing is computed twice.
    fewest = 12 if packed else 6
    assert counted.counts["forward"] == counted.counts["backward"] >= fewest
    assert counted.counts["forward"] == fewest or shortest == 16
    model.set_attn_implementation("eager")
    assert_same(found, logits_and_gradients(model, inputs))


def key_ranges(variant, length=256, **inputs):
    embeds = torch.zeros(max(len(each) for each in [[0], *inputs.values()]), length, 32)
    config = config_of(variant)
    config._attn_implementation = "sdpa"
    mask = attention_of(config, embeds, **inputs).attention_mask
    assert isinstance(mask, BlockedMask)
    return [(parts[0].block.keys.start, parts[-1].block.keys.stop) for parts in mask.blocks]


def test_a_block_meets_only_the_keys_that_it_sees():
    prefix = (torch.arange(256) < 100).long()[None]
    longer = (torch.arange(256) < 200).long()[None]
    documents = (torch.arange(256) >= 130).long()[None]
    assert key_ranges("causal") == [(0, 128), (0, 256)]
    assert key_ranges("alibi") == [(0, 128), (0, 256)]
    assert key_ranges("prefix", prefix_mask=prefix) == [(0, 128), (0, 256)]
    assert key_ranges("prefix", prefix_mask=longer) == [(0, 200), (0, 256)]
    assert key_ranges("window40") == [(0, 128), (128 - 39, 256)]
    assert key_ranges("bidirectional-window40") == [(0, 128 + 39), (128 - 39, 256)]
    assert key_ranges("causal", length=384, document_ids=(torch.arange(384) >= 128).long()[None]) == [
        (0, 128),
        (128, 256),
        (128, 384),
    ]
    # A document's first tokens are too few to be a block, where it begins just behind one.
    assert key_ranges("causal", document_ids=documents) == [(0, 128), (0, 256)]
    packed = (torch.arange(256) // 80).long()[None]
    assert key_ranges("causal", document_ids=packed) == [(0, 80), (80, 128), (80, 160), (160, 240), (240, 256)]
    # Rows of which one has a document there, and one has not.
    mixed = torch.cat([packed, torch.zeros_like(packed)])
    assert key_ranges("causal", document_ids=mixed) == [(0, 128), (0, 256)]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_name_for_any_model_means_the_same(variant, packed):
    model, inputs = loud_model(config_of(variant)), token_batch(variant, packed)
    expected = logits_and_gradients(model, inputs)
    model.set_attn_implementation("minillm_blocks")
    with CountedKernels() as counted:
        found = logits_and_gradients(model, inputs)
    assert counted.counts["forward"] == (12 if packed else 6)
    assert torch.equal(found[0], expected[0])
    short = {name: part[:, :20] for name, part in inputs.items()}
    found = logits_and_gradients(model, short)
    model.set_attn_implementation("eager")
    assert_same(found, logits_and_gradients(model, short))


def test_attention_that_is_short_or_plain_and_long_has_no_blocks():
    for length, variant in (
        (tuning.blocks_from, "causal"),
        (256, "bidirectional"),
        (tuning.plain_blocks_up_to + 1, "causal"),
    ):
        config = tiny_config(attention_type=variant)
        config._attn_implementation = "sdpa"
        assert attention_of(config, torch.zeros(1, length, 32)).attention_mask is None


@pytest.mark.parametrize("variant", ["prefix", "alibi", "prefix-alibi", "window40"])
def test_memory_grows_with_the_length(variant, monkeypatch):
    monkeypatch.setattr(tuning, "kept_elements", 0)
    largest = {}
    for length in (1024, 2048):
        model = loud_model(tiny_config(max_position_embeddings=2048, num_hidden_layers=1, **VARIANTS[variant]))
        ids = torch.zeros(1, length, dtype=torch.long)
        prefix = {"prefix_mask": (torch.arange(length) < 100).long()[None]} if "prefix" in variant else {}
        with LargestTensor() as watch:
            model(ids, use_cache=False, **prefix).logits.sum().backward()
        largest[length] = watch.largest
    heads = model.config.num_attention_heads
    assert largest[2048] <= heads * 2048 * block_size(2048)
    assert largest[2048] < heads * 2048**2 / 4


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [10, LENGTH])
def test_a_soft_cap_is_refused_and_not_ignored(length, back_end):
    model = loud_model(config_of("causal"))
    model.set_attn_implementation(back_end)
    with pytest.raises(ValueError, match=r"`softcap=30.0`.*leave it out"):
        model(torch.ones(1, length, dtype=torch.long), softcap=30.0)


@pytest.mark.parametrize("kept", [2**26, 0], ids=["kept", "made anew"])
@pytest.mark.parametrize("shortest", [16, 1000], ids=["in parts", "in one piece"])
@pytest.mark.parametrize("variant", ["prefix-alibi", "gqa"])
def test_bfloat16_is_as_near_as_eager(variant, shortest, kept, monkeypatch):
    monkeypatch.setattr(tuning, "kept_elements", kept)
    monkeypatch.setattr(tuning, "open_block_keys", shortest)
    model, inputs = loud_model(config_of(variant)), token_batch(variant, False)
    exact = logits_and_gradients(model, inputs)
    model.to(torch.bfloat16)
    found = logits_and_gradients(model, inputs)
    model.set_attn_implementation("eager")
    eager = logits_and_gradients(model, inputs)

    def error(run):
        pairs = zip([run[0], *run[1]], [exact[0], *exact[1]], strict=True)
        return sum(float((own.float() - other).norm() / other.norm().clamp(min=1e-6)) for own, other in pairs)

    assert error(found) <= 1.1 * error(eager)


def test_autocast_reaches_the_blocks():
    model, inputs = loud_model(config_of("prefix-alibi")), token_batch("prefix-alibi", False)
    exact = logits_and_gradients(model, inputs)
    seen = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is kernel:
                seen.extend(states.dtype for states in args[:3])
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watch():
        found = logits_and_gradients(model, inputs)
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(found[0].float(), exact[0], atol=0.05 * float(exact[0].abs().max()), rtol=0)


def qkv(heads=4, key_heads=2, length=LENGTH, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, "query"), (key_heads, "key"), (key_heads, "value"))
    return [torch.randn(1, count, length, head_dim, generator=generator).requires_grad_() for count, _ in shapes]


def attend(states, variant="prefix-alibi", dropout=0.0):
    config = config_of(variant)
    config._attn_implementation = "sdpa"
    prefix = {"prefix_mask": (torch.arange(LENGTH) < 200).long()[None]} if "prefix" in variant else {}
    mask = attention_of(config, torch.zeros(1, LENGTH, 32), **prefix).attention_mask
    return blocked_attention_forward(None, *states, mask, dropout, 0.3)[0]


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True), (True, False, True)], ids=str)
def test_only_the_gradients_that_are_asked_for(needed):
    expected = qkv()
    attend(expected).square().sum().backward()
    states = [own.detach().requires_grad_(wants) for own, wants in zip(qkv(), needed, strict=True)]
    attend(states).square().sum().backward()
    for own, other, wants in zip(states, expected, needed, strict=True):
        assert torch.equal(own.grad, other.grad) if wants else own.grad is None


def test_channels_that_do_not_lie_side_by_side():
    expected = attend(states := qkv())
    wanted = torch.autograd.grad(expected.square().sum(), states)
    for index in range(3):
        strided = [own.detach() for own in states]
        strided[index] = strided[index].transpose(2, 3).contiguous().transpose(2, 3)
        found = attend([own.requires_grad_() for own in strided])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), strided), wanted)


def test_a_second_derivative_is_refused_or_right():
    states = qkv()
    for loss in (attend(states).sum(), attend(states).square().sum()):
        first = torch.autograd.grad(loss, states, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative: use attn_implementation='eager'"):
            torch.autograd.grad(first[0].square().sum(), states[1], allow_unused=True)
    with sdpa_kernel(SDPBackend.MATH):
        double = [own.detach().double().requires_grad_() for own in states]
        first_double = torch.autograd.grad(attend(double).square().sum(), double, create_graph=True)
        for own, other in zip(first_double, first, strict=True):
            torch.testing.assert_close(own.float(), other, atol=1e-4, rtol=1e-4)
        second = torch.autograd.grad(first_double[0].square().sum(), double)
    assert all(float(own.abs().max()) > 0 for own in second)


@pytest.mark.parametrize("kept", [2**26, 0], ids=["kept", "made anew"])
@pytest.mark.parametrize("shortest", [16, 1000], ids=["in parts", "in one piece"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sdpa_itself_computes_the_same(variant, shortest, kept, monkeypatch):
    monkeypatch.setattr(tuning, "kept_elements", kept)
    monkeypatch.setattr(tuning, "open_block_keys", shortest)
    states = qkv()
    expected = attend(states, variant)
    gradients = torch.autograd.grad(expected.square().sum(), states)
    with sdpa_kernel(SDPBackend.MATH):
        found = attend(states, variant)
        own_gradients = torch.autograd.grad(found.square().sum(), states)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for own, other in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_transforms_of_functions():
    states = qkv()
    expected = torch.autograd.grad(attend(states).square().sum(), states)
    found = torch.func.grad(lambda *states: attend(states).square().sum(), argnums=(0, 1, 2))(*states)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_a_rank_takes_its_own_heads():
    states = qkv(key_heads=4)
    config = config_of("alibi")
    config._attn_implementation = "sdpa"
    mask = attention_of(config, torch.zeros(1, LENGTH, 32)).attention_mask
    expected = blocked_attention_forward(None, *states, mask, 0.0, 0.3)[0]
    part, heads = [own[:, 2:] for own in states], slice(2, 4)
    mask = attention_of(config, torch.zeros(1, LENGTH, 32), heads=heads).attention_mask
    found = blocked_attention_forward(None, *part, mask, 0.0, 0.3)[0]
    torch.testing.assert_close(found, expected[:, :, 2:])


def test_rows_of_a_batch_may_differ(monkeypatch):
    monkeypatch.setattr(tuning, "open_block_keys", 16)
    ids = token_batch("causal", False)["input_ids"]
    padding = (torch.arange(LENGTH) >= torch.tensor([[0], [37]])).long()
    documents = (torch.arange(LENGTH) >= torch.tensor([[250], [90]])).long()
    for variant, extra in (
        ("alibi", {"attention_mask": padding}),
        ("causal", {"document_ids": documents}),
        ("alibi", {"document_ids": documents, "attention_mask": padding}),
    ):
        model, inputs = loud_model(config_of(variant)), {"input_ids": ids, **extra}
        found = logits_and_gradients(model, inputs)
        model.set_attn_implementation("eager")
        assert_same(found, logits_and_gradients(model, inputs))


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


@pytest.mark.parametrize("name", ["attention_mask", "document_ids", "prefix_mask"])
def test_buffers_may_be_filled_anew_before_the_backward_pass(name, monkeypatch):
    monkeypatch.setattr(tuning, "kept_elements", 0)
    model, inputs = loud_model(config_of("prefix-alibi")), token_batch("prefix-alibi", False)
    first = (torch.arange(LENGTH) < 200).repeat(2, 1)
    inputs[name] = {"attention_mask": first, "document_ids": (~first).long(), "prefix_mask": first.long()}[name]

    def gradients(refill):
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        if refill:
            inputs[name].fill_(1)
        logits[:, :200].square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_gradient_checkpointing_over_blocks_changes_nothing():
    model, inputs = loud_model(config_of("prefix-alibi")).train(), token_batch("prefix-alibi", True)
    expected = logits_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = logits_and_gradients(model, inputs)
    assert torch.equal(found[0], expected[0])
    for own, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(own, other)
