"""What a model costs, from its config alone: parameters, floating-point operations, memory.

Nothing is allocated: the model is built on the meta device.
"""

import copy
from typing import NamedTuple

import torch

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.modeling_minillm import MiniLLMForCausalLM

# Weight, gradient and AdamW's two moments, each in float32.
BYTES_IN_TRAINING = 16


class Cost(NamedTuple):
    """What a causal language model of a config costs.

    Attributes:
        parameters: all of them, tied ones once.
        embeddings: those of the tables that are looked up in: tokens, and learned positions.
        multiplied: those that each token is multiplied with in a forward pass: the head, tied or not, and of a mixture
            only the experts that a token goes through; no tables, norms or biases.
        attention_flops: floating-point operations of a token for each key that it looks at, all layers together.
        cache_bytes: bytes of a token in the key/value cache, in 16 bits; 0 without one.
    """

    parameters: int
    embeddings: int
    multiplied: int
    attention_flops: int
    cache_bytes: int

    def forward_flops(self, keys: float = 0) -> float:
        """Floating-point operations of a token in a forward pass, a multiplication and an addition counted as two; a
        training step takes three times as many. `keys`: how many keys a token looks at on average."""
        return 2 * self.multiplied + self.attention_flops * keys

    def training_flops(self, keys: float = 0, frozen: bool = False) -> float:
        """Floating-point operations of a token in a training step. With `frozen` weights, below an adapter, their
        gradients are not computed; the adapter's own are left out."""
        return (2 if frozen else 3) * self.forward_flops(keys)

    @property
    def training_bytes(self) -> int:
        """Bytes of weights, gradients and AdamW's moments in float32; activations come on top."""
        return BYTES_IN_TRAINING * self.parameters


def read_cost(config: MiniLLMConfig) -> Cost:
    """The cost of a causal language model of this config."""
    # All layers are alike: two models tell what one more layer adds, however many there are.
    one, two = (_read_cost(config, layers) for layers in (1, 2))
    more = config.num_hidden_layers - 1
    return Cost(*(first + more * (second - first) for first, second in zip(one, two, strict=True)))


def _read_cost(config: MiniLLMConfig, layers: int) -> Cost:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model = MiniLLMForCausalLM(config)
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings = sum(table.numel() for table in tables)
    experts = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.ndim == 3
    )
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    used = experts * config.num_experts_per_tok // config.num_local_experts if experts else 0
    # A tied head is the token table once more.
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    width = config.num_attention_heads * config.head_dim
    caches = config.attention_type != "bidirectional"
    return Cost(
        parameters=model.num_parameters(),
        embeddings=embeddings,
        multiplied=matrices + used - embeddings + head,
        # Queries times keys, and weights times values, of each layer.
        attention_flops=4 * width * config.num_hidden_layers,
        cache_bytes=4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim if caches else 0,
    )
