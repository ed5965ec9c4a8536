"""The loss without the full logits equals the plain one in values and gradients, holds no logits, and refuses what it
cannot honour."""

import pytest
import torch
from largest_tensor import LargestTensor
from matrix_cases import SIZES, loud_model, tiny_config
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from training_cases import counting_documents, losses, make_trainer, tiny_model
from variants import variants

import minillm.loss
from minillm import MiniLLMForCausalLM
from minillm.loss import linear_cross_entropy
from minillm.training import DataCollatorForCausalLM
from minillm.tuning import tuning

LABELLED = {
    "plain": {},
    "total": {"num_items_in_batch": 31},
    "total on the device": {"num_items_in_batch": torch.tensor(31)},
    "shifted": {"shift_labels": torch.randint(19, (3, 11), generator=torch.Generator().manual_seed(5))},
}
MODELS = variants("causal tied norm_head prefix moe-router_loss")


def token_batch(seed=0):
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZES["vocab_size"], (3, 11), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -100, ids)
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs, use_cache=False)
    outputs.loss.backward()
    return outputs, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("chunk", [1, 2, 7, 32, 33, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_function_equals_cross_entropy(chunk, with_bias):
    generator = torch.Generator().manual_seed(chunk)
    hidden, weight = (torch.randn(size, 8, generator=generator, requires_grad=True) for size in (33, 13))
    bias = torch.randn(13, generator=generator, requires_grad=True) if with_bias else None
    target = torch.randint(13, (33,), generator=generator)
    target[::4] = -100
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum")
    found = linear_cross_entropy(hidden, weight, target, bias, chunk=chunk)
    torch.testing.assert_close(found, expected)
    # An upstream gradient other than one must be carried through.
    for own, plain in zip(
        torch.autograd.grad(found * 3, leaves), torch.autograd.grad(expected * 3, leaves), strict=True
    ):
        torch.testing.assert_close(own, plain, atol=1e-5, rtol=1e-5)


def test_backward_twice_gives_the_same():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    loss = linear_cross_entropy(hidden, weight, torch.arange(5))
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_gradients_of_gradients_are_refused():
    hidden = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(7, 4), torch.arange(5))
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_plain_loss(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 32, generator=generator).to(dtype) for size in (300, 50))
    target = torch.randint(50, (300,), generator=generator)

    def run(loss, kind):
        leaves = [tensor.detach().to(kind).requires_grad_() for tensor in (hidden, weight)]
        value = loss(*leaves)
        return [value.detach().double(), *(each.double() for each in torch.autograd.grad(value, leaves))]

    def plain(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")

    exact = run(lambda *leaves: F.cross_entropy(F.linear(*leaves), target, reduction="sum"), torch.float64)
    stock = run(plain, dtype)
    found = run(lambda *leaves: linear_cross_entropy(*leaves, target, chunk=16), dtype)
    for own, usual, true in zip(found, stock, exact, strict=True):
        assert (own - true).abs().max() <= 1.2 * (usual - true).abs().max() + 1e-6 * true.abs().max()


@pytest.mark.parametrize("labelled", LABELLED)
@pytest.mark.parametrize("name", MODELS)
def test_model_without_logits_equals_itself_with_them(name, labelled, monkeypatch):
    monkeypatch.setattr(tuning, "chunk_logits", {"cuda": 4 * SIZES["vocab_size"]})
    model = loud_model(tiny_config(**MODELS[name])).train()
    inputs = {**token_batch(), **LABELLED[labelled]}
    plain, expected = loss_and_gradients(model, **inputs, skip_logits=False)
    outputs, found = loss_and_gradients(model, **inputs, skip_logits=True)
    assert outputs.logits is None
    assert plain.logits is not None
    torch.testing.assert_close(outputs.loss, plain.loss)
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_without_gradients_and_in_evaluation():
    model, inputs = loud_model(tiny_config()), token_batch()
    with torch.no_grad():
        outputs = model(**inputs, skip_logits=True)
        torch.testing.assert_close(outputs.loss, model(**inputs).loss)
    assert outputs.logits is None


def test_no_gradients_are_made_where_none_are_recorded(monkeypatch):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    made, function = [], minillm.loss.chunked_cross_entropy
    monkeypatch.setattr(minillm.loss, "chunked_cross_entropy", lambda *args: made.append(function(*args)) or made[-1])
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, torch.arange(6))
    assert made[0][1:] == (None, None, None)


def test_mixed_precision_equals_the_plain_loss_under_it():
    model, inputs = loud_model(tiny_config()).train(), token_batch()
    with torch.autocast("cpu", torch.bfloat16):
        plain, expected = loss_and_gradients(model, **inputs, skip_logits=False)
        outputs, found = loss_and_gradients(model, **inputs, skip_logits=True)
    torch.testing.assert_close(outputs.loss, plain.loss, atol=1e-2, rtol=1e-2)
    for key, gradient in expected.items():
        assert found[key].dtype == gradient.dtype
        assert (found[key] - gradient).norm() <= 2e-2 * gradient.norm(), key


def test_frozen_head_gets_no_gradient():
    model, inputs = loud_model(tiny_config()).train(), token_batch()
    model.lm_head.weight.requires_grad_(False)
    _, expected = loss_and_gradients(model, **inputs, skip_logits=False)
    _, found = loss_and_gradients(model, **inputs, skip_logits=True)
    assert model.lm_head.weight.grad is None
    assert "lm_head.weight" not in found
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-4)


def test_compiled_without_a_break():
    model, inputs = loud_model(tiny_config()).train(), token_batch()
    plain, expected = loss_and_gradients(model, **inputs, skip_logits=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**inputs, use_cache=False, skip_logits=True).loss
    loss.backward()
    torch.testing.assert_close(loss, plain.loss)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_no_tensor_of_all_logits(skip, monkeypatch):
    vocab, tokens = 1000, 4 * 64
    monkeypatch.setattr(tuning, "chunk_logits", {"cpu": 16 * vocab, "cuda": 1})
    model = MiniLLMForCausalLM(tiny_config(vocab_size=vocab, max_position_embeddings=64))
    ids = torch.randint(vocab, (4, 64))
    with LargestTensor() as watch:
        model(ids, labels=ids, use_cache=False, skip_logits=skip).loss.backward()
    weights = vocab * SIZES["hidden_size"]
    assert watch.largest == (weights if skip else vocab * tokens)


@pytest.mark.parametrize("skip", [None, False])
def test_logits_are_returned_however_many_there_are(skip):
    """2^26 of them, in training: nobody asked for them to be left out."""
    vocab = 2**17
    model = MiniLLMForCausalLM(
        tiny_config(vocab_size=vocab, hidden_size=4, num_attention_heads=1, head_dim=4, skip_logits=skip)
    )
    ids = torch.randint(vocab, (8, 65))
    assert model.train()(ids, labels=ids, use_cache=False).logits.shape == (8, 65, vocab)


def test_the_config_asks_for_training_steps_alone():
    model, inputs = loud_model(tiny_config(skip_logits=True)).train(), token_batch()
    outputs = model(**inputs)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, model(**inputs, skip_logits=False).loss)
    assert model(inputs["input_ids"]).logits is not None
    assert model.eval()(**inputs).logits is not None


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, {"labels": None}, "without `labels`"),
        ({}, {"logits_to_keep": 3}, "logits_to_keep"),
        ({"loss_function": lambda *args, **kwargs: None}, {}, "loss function was replaced"),
        ({"lm_head": torch.nn.Sequential()}, {}, "Sequential"),
    ],
)
def test_refused_where_it_cannot_be(change, arguments, words):
    model = loud_model(tiny_config()).train()
    for name, value in change.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match="skip_logits=True`, but") as error:
        model(**{**token_batch(), **arguments}, skip_logits=True)
    assert words in str(error.value)
    model.config.skip_logits = True
    if arguments != {"labels": None}:
        with pytest.raises(ValueError, match="skip_logits=True` in the config, but") as error:
            model(**{**token_batch(), **arguments})
        assert words in str(error.value)


def test_refused_with_an_adapter_or_a_hook_on_the_head():
    adapted = get_peft_model(loud_model(tiny_config()), LoraConfig(r=2, target_modules=["lm_head"])).train()
    hooked = loud_model(tiny_config()).train()
    hooked.lm_head.register_forward_hook(lambda *call: None)
    for model, words in ((adapted, "whose weight is not all"), (hooked, "the head has hooks")):
        assert model(**token_batch()).logits is not None
        with pytest.raises(ValueError, match=f"skip_logits=True`, but .*{words}"):
            model(**token_batch(), skip_logits=True)


def test_trainer_learns_the_same(tmp_path):
    data, found = counting_documents(24), {}
    for skip in (False, True):
        model = tiny_model(skip_logits=skip)
        collator = DataCollatorForCausalLM(max_length=32, pad_token_id=0)
        trainer = make_trainer(
            model, data, collator, tmp_path / str(skip), max_steps=6, gradient_accumulation_steps=2, seed=0
        )
        trainer.train()
        found[skip] = losses(trainer)
    assert len(found[True]) > 2
    assert found[True] == pytest.approx(found[False], abs=1e-5)


def test_nothing_to_score_leaves_the_weights_alone():
    """A mean over no token is no number, but its gradients are 0, as those of transformers' own models."""
    ids = torch.randint(3, 19, (2, 6), generator=torch.Generator().manual_seed(0))
    for skip in (True, False):
        model = loud_model(tiny_config()).train()
        output = model(ids, labels=torch.full_like(ids, -100), skip_logits=skip)
        output.loss.backward()
        assert output.loss.isnan() and (output.logits is None) == skip
        assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_skip_logits_is_true_or_false():
    ids = torch.randint(3, 19, (1, 4), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="`skip_logits='no'`"):
        loud_model(tiny_config())(ids, labels=ids, skip_logits="no")
