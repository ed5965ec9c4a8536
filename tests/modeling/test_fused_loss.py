"""The loss by Liger's kernel: what is handed over, what comes back, and where torch alone is used.

A stand-in computes what Liger documents. With TRITON_INTERPRET=1 the same tests meet the kernel itself, run by
Triton's interpreter on CPU, as `.ci/run` does; those marked `gpu` meet it on CUDA.
"""

import inspect
import os
import sys
import types

import pytest
import torch
from matrix_cases import SIZES, loud_model, tiny_config
from torch.nn import functional as F
from variants import variants

import minillm.fused_loss
import minillm.loss
from minillm.fused_loss import find_liger
from minillm.loss import linear_cross_entropy
from minillm.tuning import tuning

LIGER = "liger_kernel.ops.fused_linear_cross_entropy"
MODELS = variants("causal tied norm_head prefix moe-router_loss")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = ["stand-in", *(["interpreted"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]


def stand_in(
    _input,
    weight,
    target,
    ce_weight=None,
    bias=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    accum_dtype=None,
    compute_gradients=None,
    weight_requires_grad=None,
    chunk_mem_const=1,
):
    """What Liger's function of that name returns: loss, three extras, gradients by input, weight and bias."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in (_input, weight, bias)]
    with torch.enable_grad(), torch.autocast(_input.device.type, enabled=False):
        loss = F.cross_entropy(F.linear(*leaves).float(), target, ignore_index=ignore_index, reduction=reduction)
        gradients = torch.autograd.grad(loss, [each for each in leaves if each is not None])
    of_input, of_weight, of_bias = [*gradients, None][:3]
    if not compute_gradients:
        return loss.detach(), None, None, None, torch.zeros_like(_input), None, None
    return loss.detach(), None, None, None, of_input, of_weight if weight_requires_grad else None, of_bias


class Calls(list):
    """The arguments of each call of the kernel, by name, and the device that it runs on."""

    device: str


@pytest.fixture(params=KERNELS)
def calls(request, monkeypatch):
    found = Calls()
    found.device = "cuda" if request.param == "cuda" else "cpu"
    function = stand_in if request.param == "stand-in" else find_liger()
    if isinstance(function, str):
        # The interpreter was asked for; a device is there without having been.
        (pytest.fail if request.param == "interpreted" else pytest.skip)(function)

    def recorded(*args, **kwargs):
        found.append(inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    monkeypatch.setattr(minillm.fused_loss, "DEVICES", (found.device,))
    monkeypatch.setattr(minillm.fused_loss, "find_liger", lambda: recorded)
    return found


def leaves_and_target(device="cpu", dtype=torch.float32, with_bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(33, 8), (13, 8), *([(13,)] if with_bias else [])]
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    target = torch.randint(13, (33,), generator=generator)
    target[::4] = -100
    return leaves, target.to(device)


def plain_loss(leaves, target):
    return F.cross_entropy(F.linear(*leaves).float(), target, reduction="sum")


def fused(leaves, target):
    hidden, weight, *bias = leaves
    return linear_cross_entropy(hidden, weight, target, *bias)


@pytest.mark.parametrize("with_bias", [False, True])
def test_what_is_handed_over(calls, with_bias):
    leaves, target = leaves_and_target(calls.device, with_bias=with_bias)
    fused(leaves, target)
    (call,) = calls
    tensors = [call.pop(name) for name in ("_input", "weight", "target")]
    assert [each.data_ptr() for each in tensors] == [each.data_ptr() for each in (*leaves[:2], target)]
    bias = call.pop("bias")
    assert torch.equal(bias, leaves[2]) if with_bias else bias is None
    assert call.pop("chunk_mem_const") > 1
    assert call == {
        "ignore_index": -100,
        "reduction": "sum",
        "accum_dtype": torch.float32,
        "compute_gradients": True,
        "weight_requires_grad": True,
    }


@pytest.mark.parametrize("needed", [(1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("limit", [1, 2**27])
def test_equals_cross_entropy_whatever_is_frozen(calls, needed, limit, monkeypatch):
    monkeypatch.setattr(tuning, "chunk_logits", {"cuda": limit})
    leaves, target = leaves_and_target(calls.device)
    for leaf, trained in zip(leaves, needed, strict=True):
        leaf.requires_grad_(bool(trained))
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    found, expected = fused(leaves, target), plain_loss(leaves, target)
    assert calls
    torch.testing.assert_close(found, expected)
    # An upstream gradient other than one, and a second pass, which must not scale what is saved once more.
    wanted = torch.autograd.grad(expected * 3, trained)
    for _ in range(2):
        for own, plain in zip(torch.autograd.grad(found * 3, trained, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(own, plain, atol=1e-5, rtol=1e-5)


def test_without_gradients(calls):
    leaves, target = leaves_and_target(calls.device)
    with torch.no_grad():
        torch.testing.assert_close(fused(leaves, target), plain_loss(leaves, target))
    assert calls[0]["compute_gradients"] is False


def test_gradients_of_gradients_are_refused(calls):
    leaves, target = leaves_and_target(calls.device)
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        torch.autograd.grad(fused(leaves, target), leaves, create_graph=True)


def test_half_precision_is_as_exact_as_the_plain_loss(calls, monkeypatch):
    monkeypatch.setattr(tuning, "chunk_logits", {"cuda": 1})
    generator = torch.Generator().manual_seed(0)
    # Triton's interpreter cuts bfloat16 off where CUDA rounds; float16 is rounded by both.
    hidden, weight = (torch.randn(size, 32, generator=generator).to(calls.device, torch.half) for size in (300, 500))
    target = torch.randint(500, (300,), generator=generator).to(calls.device)

    def run(loss, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
        value = loss(leaves, target)
        return [value.detach().double(), *(each.double() for each in torch.autograd.grad(value, leaves))]

    exact = run(lambda leaves, target: F.cross_entropy(F.linear(*leaves), target, reduction="sum"), torch.float64)
    stock, found = run(plain_loss, torch.half), run(fused, torch.half)
    assert len(calls) == 1
    for own, usual, true in zip(found, stock, exact, strict=True):
        assert (own - true).norm() <= 1.2 * (usual - true).norm() + 1e-6 * true.norm()


def test_mixed_precision_hands_over_one_type(calls):
    leaves, target = leaves_and_target(calls.device)
    with torch.autocast(calls.device, torch.bfloat16):
        found, expected = fused(leaves, target), plain_loss(leaves, target)
    assert {calls[0][name].dtype for name in ("_input", "weight", "bias")} == {torch.bfloat16}
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    for own, plain in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert own.dtype == torch.float32
        assert (own - plain).norm() <= 2e-2 * plain.norm()


@pytest.mark.parametrize("arguments", [{}, {"num_items_in_batch": 31}], ids=["mean", "total"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_itself_with_logits(calls, name, arguments):
    model = loud_model(tiny_config(**MODELS[name])).train().to(calls.device)
    ids = torch.randint(SIZES["vocab_size"], (3, 11), generator=torch.Generator().manual_seed(0)).to(calls.device)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    found = {}
    for skip in (False, True):
        model.zero_grad()
        loss = model(ids, labels=labels, use_cache=False, skip_logits=skip, **arguments).loss
        loss.backward()
        found[skip] = {"loss": loss.detach(), **{key: each.grad.clone() for key, each in model.named_parameters()}}
    assert len(calls) == 1
    for key, expected in found[False].items():
        torch.testing.assert_close(
            found[True][key], expected, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("label", [13, -1])
def test_labels_outside_the_vocabulary_are_refused(calls, label):
    leaves, target = leaves_and_target(calls.device)
    target[3] = label
    with pytest.raises(IndexError, match="-100 or from 0 to 12"):
        fused(leaves, target)
    assert not calls


def test_torch_where_liger_is_not_to_be_used(calls, monkeypatch):
    leaves, target = leaves_and_target(calls.device)
    linear_cross_entropy(*leaves[:2], target, chunk=5)
    linear_cross_entropy(*(leaf.double() for leaf in leaves[:2]), target)
    linear_cross_entropy(leaves[0][:0], leaves[1], target[:0])
    torch.compile(fused, fullgraph=True, backend="eager")(leaves, target)
    monkeypatch.setattr(tuning, "use_liger", False)
    fused(leaves, target)
    assert not calls
    monkeypatch.setattr(tuning, "use_liger", True)
    fused(leaves, target)
    assert calls


def test_torch_on_cpu_and_where_liger_is_missing(monkeypatch):
    leaves, target = leaves_and_target()
    monkeypatch.setattr(minillm.fused_loss, "find_liger", lambda: pytest.fail("asked for on CPU"))
    fused(leaves, target)
    monkeypatch.setattr(minillm.fused_loss, "DEVICES", ("cpu",))
    monkeypatch.setattr(minillm.fused_loss, "find_liger", lambda: "not there")
    torch.testing.assert_close(fused(leaves, target), plain_loss(leaves, target))


def of_an_old_release(_input, weight, target, accum_dtype=None):
    pass


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (stand_in, None),
        (of_an_old_release, "too old, it lacks compute_gradients, weight_requires_grad, chunk_mem_const"),
        (None, "cannot import name"),
    ],
)
def test_what_is_found(function, words, monkeypatch):
    module = types.ModuleType(LIGER)
    if function is not None:
        module.fused_linear_cross_entropy_forward = function
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, LIGER, module)
    found = find_liger.__wrapped__()
    assert found is stand_in if words is None else words in found
