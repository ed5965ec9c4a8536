"""Named tiny variants, for the tests of what every model must do whatever it is made of."""

import torch
from matrix_cases import LENGTH, SIZES, VOCAB
from variants import fields_of

from minillm import MiniLLMConfig, MiniLLMForCausalLM

VARIANTS = (
    "causal prefix alibi prefix-alibi gpt2 deepnorm-layernorm-geglu sandwich_norm-sinusoidal sandwich-post "
    "prefix-glm_2d-embedding_norm window-gqa prefix-rope_2d parallel_two_norms-norm_head-qk_norm moe "
    "bidirectional-none"
).split()
GENERATIVE = [name for name in VARIANTS if "bidirectional" not in name]


def config_of(variant, **fields):
    return MiniLLMConfig(**{**SIZES, "pad_token_id": 0, **fields_of(variant), **fields})


def make_loud(model, seed=0, scale=0.2):
    """Weights so large that every mask, bias and position shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model.eval()


def model_of(variant, model_class=MiniLLMForCausalLM, **fields):
    torch.manual_seed(0)
    return make_loud(model_class(config_of(variant, **fields)))


def tokens(batch=2, length=LENGTH, seed=3):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(config, prefix_length=4, **shape):
    """Token ids and every per-token input that the variant reads; no labels."""
    input_ids = tokens(**shape)
    inputs = {"input_ids": input_ids}
    if config.attention_type == "prefix":
        inputs["prefix_mask"] = (torch.arange(input_ids.shape[1]) < prefix_length).long().expand_as(input_ids)
    if config.rope_2d or config.position_embedding_type == "glm_2d":
        inputs["block_position_ids"] = torch.arange(input_ids.shape[1]).sub(prefix_length).clamp(min=0)
        inputs["block_position_ids"] = inputs["block_position_ids"].expand_as(input_ids)
    return inputs


def assert_equal(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
