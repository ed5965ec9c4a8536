"""Feed-forward layers: `MLPS[config.mlp_type](config)`."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from minillm.configuration.configuration_minillm import MiniLLMConfig

# Gates whose second factor is activated too, or not at all (arXiv 1612.08083, 2002.05202): (gate, up) activations.
GATES = {"gtu": (torch.sigmoid, torch.tanh), "bilinear": (nn.Identity(), nn.Identity())}


class MiniLLMMLP(nn.Module):
    """`down(act(up(x)))`, e.g. GELU of GPT-2."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class MiniLLMGLU(nn.Module):
    """`down(act(gate(x)) * up(x))`: SwiGLU, GeGLU, ReGLU, GLU, GTU, bilinear by `hidden_act` (arXiv 2002.05202)."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        gated = config.hidden_act in GATES
        self.act_fn, self.up_fn = GATES[config.hidden_act] if gated else (ACT2FN[config.hidden_act], nn.Identity())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_fn(self.up_proj(hidden_states)))


MLPS = {"mlp": MiniLLMMLP, "glu": MiniLLMGLU}
