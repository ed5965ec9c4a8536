"""Feed-forward layers: `MLPS[config.mlp_type](config)`."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.normalization import identity

# Gates whose second factor is activated too, or not at all (arXiv 1612.08083, 2002.05202): (gate, up) activations.
GATES = {"gtu": (torch.sigmoid, torch.tanh), "bilinear": (identity, identity)}


def gate_functions(hidden_act: str) -> tuple[Callable, Callable]:
    """The functions on the two factors of a gated feed-forward: (gate, up)."""
    return GATES[hidden_act] if hidden_act in GATES else (ACT2FN[hidden_act], identity)


class MiniLLMMLP(nn.Module):
    """`down(act(up(x)))`, e.g. GELU of GPT-2."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(outer, inner, bias=bias)
        self.down_proj = nn.Linear(inner, outer, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class MiniLLMGLU(nn.Module):
    """`down(act(gate(x)) * up(x))`: SwiGLU, GeGLU, ReGLU, GLU, GTU, bilinear by `hidden_act` (arXiv 2002.05202)."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(outer, inner, bias=bias)
        self.up_proj = nn.Linear(outer, inner, bias=bias)
        self.down_proj = nn.Linear(inner, outer, bias=bias)
        self.act_fn, self.up_fn = gate_functions(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_fn(self.up_proj(hidden_states)))


class MiniLLMRouter(nn.Module):
    """Chooses experts. Not an `nn.Linear`, since adapters for "all linear layers" expect one tensor of those."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes tokens [tokens, hidden].

        Returns:
            Logits [tokens, experts]; the probabilities of the chosen experts, divided by their sum, and the numbers of
            those experts, both [tokens, top_k]. Probabilities are float32.
        """
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, experts = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), experts


@use_experts_implementation
class MiniLLMExperts(nn.Module):
    """Gated experts in stacked tensors, named and laid out as in transformers' Mixtral, whose grouped kernels
    (`experts_implementation`) run them; the forward below is the plain one, `"eager"`."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn, self.up_fn = gate_functions(config.hidden_act)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """What transformers' kernels call between the two projections: [tokens, 2 * inner] to [tokens, inner]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * self.up_fn(up)

    def forward(self, hidden_states: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sums what each token's experts make of it: tokens [tokens, hidden], the numbers of their experts and the
        weights of those, both [tokens, top_k]."""
        output = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            token, place = torch.where(experts == number)
            gate_up = nn.functional.linear(hidden_states[token], self.gate_up_proj[number])
            expert_output = nn.functional.linear(self._apply_gate(gate_up), self.down_proj[number])
            output.index_add_(0, token, (expert_output * weights[token, place, None]).to(output.dtype))
        return output


class MiniLLMMoE(nn.Module):
    """A mixture of experts: each token goes through the few that its router gives the largest probability (Mixtral,
    arXiv 2401.04088, section 2.1)."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.jitter_noise = config.router_jitter_noise
        self.gate = MiniLLMRouter(config)
        self.experts = MiniLLMExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and self.jitter_noise > 0:
            # A new tensor, since some wirings use the old one again.
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            hidden_states = hidden_states * noise
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.gate(tokens)
        return self.experts(tokens, experts, weights).reshape(hidden_states.shape)


MLPS = {"mlp": MiniLLMMLP, "glu": MiniLLMGLU, "moe": MiniLLMMoE}
