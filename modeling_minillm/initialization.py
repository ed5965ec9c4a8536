"""Fresh weights beyond transformers' own: DeepNorm's gains, GPT-2's residual scaling, experts and rotary buffers.

Where a layer is built, `mark_gains` leaves plain numbers on its projections; `initialize` reads them when the weights
are made, which may be much later and after a stay on the meta device.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.feed_forward import MiniLLMExperts, MiniLLMRouter
from minillm.head import NormHead
from minillm.rotary import MiniLLMRotaryEmbedding


def mark_gains(layer: Any, config: MiniLLMConfig) -> None:
    """Leaves `init_gain`, a gain of Xavier's normal initialisation (DeepNet, arXiv 2203.00555, section 3.2), or
    `init_scale`, a factor on `initializer_range`, on the projections of a block."""
    is_deepnorm, is_scaled = config.norm_placement == "deepnorm", config.scale_residual_init
    if not (is_deepnorm or is_scaled):
        return
    attention = layer.self_attn
    feed_forward: list[Any] = [
        module for module in layer.mlp.modules() if isinstance(module, nn.Linear | MiniLLMExperts)
    ]
    if is_deepnorm:
        for module in (attention.q_proj, attention.k_proj):
            module.init_gain = 1.0
        for module in (attention.v_proj, attention.o_proj, *feed_forward):
            module.init_gain = config.deepnorm_beta
    if is_scaled:
        # The last one of the feed-forward writes into the residual stream.
        for module in (attention.o_proj, feed_forward[-1]):
            module.init_scale = (2 * config.num_hidden_layers) ** -0.5


@torch.no_grad()
def initialize(module: Any, std: float) -> None:
    """Fills what transformers leaves, or fills otherwise, in one module (not in its children).

    Args:
        module: any module of the model, after transformers has initialised it.
        std: `initializer_range`.
    """
    if isinstance(module, MiniLLMRotaryEmbedding):
        tables, module.attention_scaling = module.compute_tables()
        for name, table in tables.items():
            init.copy_(getattr(module, name), table)
    elif isinstance(module, MiniLLMRouter):
        init.normal_(module.weight, std=std)
    elif isinstance(module, NormHead):
        init.normal_(module.raw_weight, std=std)
    elif isinstance(module, MiniLLMExperts):
        initialize_experts(module, std)
    elif hasattr(module, "init_gain"):
        init.xavier_normal_(module.weight, gain=module.init_gain)
    elif hasattr(module, "init_scale"):
        init.normal_(module.weight, std=std * module.init_scale)


def initialize_experts(experts: Any, std: float) -> None:
    if hasattr(experts, "init_gain"):
        # Xavier's deviation of one projection of one expert, of which these tensors hold many.
        std = experts.init_gain * (2 / (experts.hidden_dim + experts.intermediate_dim)) ** 0.5
    init.normal_(experts.gate_up_proj, std=std)
    init.normal_(experts.down_proj, std=std * getattr(experts, "init_scale", 1.0))
