"""The memory of a training step: by formula what is held between steps, by a probe what a forward pass keeps."""

import pytest
import torch
from cli_cases import small_model, small_tokenizer
from peft import LoraConfig, get_peft_model

from minillm.experiments.memory import peak_bytes, probe_activations, training_memory
from minillm.training import DataCollatorForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def row(tokenizer, length=48):
    return DataCollatorForCausalLM(tokenizer, max_length=64)([{"input_ids": list(range(5, 5 + length))}])


def state_bytes(optimizer):
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )


@pytest.mark.parametrize(("name", "kind"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_weights_gradients_and_state_are_what_a_step_makes(name, kind, tokenizer):
    model = small_model(tokenizer)
    memory = training_memory(model, name, row(tokenizer), 3)
    optimizer = kind(model.parameters(), lr=1e-3)
    model(**row(tokenizer)).loss.backward()
    optimizer.step()
    held = list(model.parameters())
    assert memory.weights == sum(parameter.numel() * 4 for parameter in held)
    assert memory.gradients == sum(parameter.grad.numel() * 4 for parameter in held)
    assert memory.optimizer == state_bytes(optimizer)
    assert memory.activations == 3 * probe_activations(model, row(tokenizer))
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_an_adapter_has_gradients_of_its_own_only(tokenizer):
    adapted = get_peft_model(small_model(tokenizer), LoraConfig(r=4, task_type="CAUSAL_LM"))
    memory = training_memory(adapted, "adamw_torch_fused", row(tokenizer), 1)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    assert training_memory(adapted, "ademamix", row(tokenizer), 1).optimizer is None


def test_the_probe_changes_nothing_and_grows_with_the_row(tokenizer):
    model = small_model(tokenizer, hidden_dropout=0.5)
    state = torch.get_rng_state()
    short, long = (probe_activations(model, row(tokenizer, length)) for length in (16, 48))
    assert 0 < short < long
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_probe_counts_what_backward_needs():
    """One matrix product keeps its input: 4 x 8 numbers; the weight is the model's own."""
    linear = torch.nn.Linear(8, 2, bias=False)
    wrapped = torch.nn.Module()
    wrapped.linear = linear
    wrapped.forward = lambda x: linear(x)
    assert probe_activations(wrapped, {"x": torch.ones(4, 8)}) == 4 * 8 * 4


def test_the_peak_is_that_of_the_process():
    before = peak_bytes("cpu")
    ballast = torch.ones(40_000_000)
    assert peak_bytes("cpu") >= max(before, 4 * ballast.numel())
