"""Residual wirings: how a block's attention and feed-forward meet the stream.

`RESIDUALS[name]` holds the norms that a wiring needs beside `input_layernorm` and `post_attention_layernorm`, and the
function that runs a block. Each function takes the block `layer` (with its norms, `self_attn`, `mlp` and `dropout`),
the stream `hidden_states` [batch, length, hidden] and `attend`, which runs the attention on a normalised stream.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from minillm.configuration.configuration_minillm import MiniLLMConfig

Attend = Callable[[torch.Tensor], torch.Tensor]


def pre_norm(layer: Any, hidden_states: torch.Tensor, attend: Attend) -> torch.Tensor:
    """`h + attention(norm(h))`, then `h + mlp(norm(h))`."""
    hidden_states = hidden_states + layer.dropout(attend(layer.input_layernorm(hidden_states)))
    return hidden_states + layer.dropout(layer.mlp(layer.post_attention_layernorm(hidden_states)))


def post_norm(layer: Any, hidden_states: torch.Tensor, attend: Attend) -> torch.Tensor:
    """`norm(alpha * h + f(h))`: the first Transformer (arXiv 1706.03762) with alpha 1, else DeepNorm (2203.00555)."""
    hidden_states = layer.input_layernorm(layer.alpha * hidden_states + layer.dropout(attend(hidden_states)))
    return layer.post_attention_layernorm(layer.alpha * hidden_states + layer.dropout(layer.mlp(hidden_states)))


def sandwich_norm(layer: Any, hidden_states: torch.Tensor, attend: Attend) -> torch.Tensor:
    """`h + norm'(f(norm(h)))` (CogView, arXiv 2105.13290)."""
    attended = layer.attention_output_layernorm(attend(layer.input_layernorm(hidden_states)))
    hidden_states = hidden_states + layer.dropout(attended)
    fed = layer.mlp_output_layernorm(layer.mlp(layer.post_attention_layernorm(hidden_states)))
    return hidden_states + layer.dropout(fed)


def parallel(layer: Any, hidden_states: torch.Tensor, attend: Attend) -> torch.Tensor:
    """`h + attention(norm(h)) + mlp(norm(h))` with one norm for both (GPT-J, Falcon 7B)."""
    normed = layer.input_layernorm(hidden_states)
    return hidden_states + layer.dropout(attend(normed)) + layer.dropout(layer.mlp(normed))


def parallel_two_norms(layer: Any, hidden_states: torch.Tensor, attend: Attend) -> torch.Tensor:
    """As `parallel`, with a norm for each (Falcon 40B)."""
    attended = layer.dropout(attend(layer.input_layernorm(hidden_states)))
    return hidden_states + attended + layer.dropout(layer.mlp(layer.post_attention_layernorm(hidden_states)))


class Residual(NamedTuple):
    run: Callable[[Any, torch.Tensor, Attend], torch.Tensor]
    norms: tuple[str, ...]


TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
RESIDUALS = {
    "pre": Residual(pre_norm, TWO_NORMS),
    "post": Residual(post_norm, TWO_NORMS),
    "deepnorm": Residual(post_norm, TWO_NORMS),
    "sandwich": Residual(sandwich_norm, (*TWO_NORMS, "attention_output_layernorm", "mlp_output_layernorm")),
    "parallel_1": Residual(parallel, TWO_NORMS[:1]),
    "parallel_2": Residual(parallel_two_norms, TWO_NORMS),
}


def residual_of(config: MiniLLMConfig) -> Residual:
    """The wiring that `norm_placement`, `parallel_residual` and `num_parallel_norms` name."""
    name = f"parallel_{config.num_parallel_norms}" if config.parallel_residual else config.norm_placement
    return RESIDUALS[name]
