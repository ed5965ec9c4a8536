"""What a model costs, against torch's own count of operations and the model itself."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from variants import variants

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.experiments.cost import read_cost

SIZE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
VARIANTS = variants("rope tied-gqa learned-mlp-layernorm wide_heads-mqa norm_head prefix-glm_2d-tied moe")


@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_are_those_that_torch_counts(variant):
    config = MiniLLMConfig(**SIZE, **VARIANTS[variant])
    # Of a mixture, each token's experts one by one: that is what is computed at least.
    model = MiniLLMForCausalLM._from_config(config, attn_implementation="eager")
    if config.mlp_type == "moe":
        model.set_experts_implementation("eager")
    ids = torch.randint(0, 96, (2, 12))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    cost = read_cost(config)
    # Eager attention multiplies whole squares, masked or not.
    assert counter.get_total_flops() == ids.numel() * cost.forward_flops(keys=12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_the_models(variant):
    config = MiniLLMConfig(**SIZE, **VARIANTS[variant])
    model = MiniLLMForCausalLM(config)
    cost = read_cost(config)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    tables = [weight for name, weight in model.named_parameters() if "embed" in name and weight.ndim == 2]
    assert cost.embeddings == sum(table.numel() for table in tables)
    cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    values = sum(layer.keys[:, :, :5].numel() + layer.values[:, :, :5].numel() for layer in cache.layers)
    assert cost.cache_bytes * 5 == 2 * values


def test_a_training_step_holds_what_is_said():
    model = MiniLLMForCausalLM(MiniLLMConfig(**SIZE))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 5, dtype=torch.long), labels=torch.zeros(1, 5, dtype=torch.long)).loss.backward()
    optimizer.step()
    held = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    held += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert read_cost(model.config).training_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
