"""Where dropout stands: on what each part of a block adds, and on all that goes into the first block.

With a probability of 1 nothing is random: what is dropped is gone, and the rest is left as it is.
"""

import pytest
import torch
from matrix_cases import loud_model, tiny_config

WIRINGS = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "deepnorm": {"norm_placement": "deepnorm"},
    "sandwich": {"norm_placement": "sandwich"},
    "parallel": {"parallel_residual": True},
    "parallel with two norms": {"parallel_residual": True, "num_parallel_norms": 2},
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.mark.parametrize("part", ["attention", "feed-forward", "both"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_block_without_its_parts_is_the_stream(wiring, part):
    model = loud_model(tiny_config(hidden_dropout=0.5, num_hidden_layers=1, **WIRINGS[wiring]))
    layer = model.model.layers[0]
    after = wiring in ("post", "deepnorm")
    seen = {}
    layer.register_forward_hook(lambda module, inputs, output: seen.update(stream=inputs[0], output=output))
    with torch.no_grad():
        # The other part adds nothing of itself.
        if part == "attention":
            layer.mlp.down_proj.weight.zero_()
        elif part == "feed-forward":
            layer.self_attn.o_proj.weight.zero_()
        layer.dropout.p = 1.0
        model.train()(IDS, use_cache=False)
        expected = seen["stream"]
        if after:
            expected = layer.post_attention_layernorm(layer.alpha * layer.input_layernorm(layer.alpha * expected))
        torch.testing.assert_close(seen["output"], expected, atol=1e-6, rtol=1e-6)
        model.eval()(IDS, use_cache=False)
        assert (seen["output"] - expected).abs().max() > 0.1


@pytest.mark.parametrize("scheme", ["rope", "learned", "sinusoidal", "glm_2d"])
def test_the_embedding_is_dropped_with_its_positions_and_its_norm(scheme):
    fields = {"embedding_norm": True, "norm_type": "layernorm", "position_embedding_type": scheme}
    model = loud_model(tiny_config(embedding_dropout=0.5, **fields))
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.model.embed_dropout.p = 1.0
    model.train()(IDS, use_cache=False)
    model.eval()(IDS, use_cache=False)
    assert not seen[0].any() and seen[1].abs().max() > 0.1
