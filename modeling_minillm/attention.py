"""Attention: projections, rotary positions, cache and the call of the chosen back end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minillm.cache import CACHE_NAME
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.geometry import effective_window
from minillm.normalization import NORMS, identity
from minillm.rotary import apply_rotary, pairs_of


def eager_attention_forward(
    module: "MiniLLMAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention that also returns its probabilities.

    Args:
        query: [batch, heads, Q, head_dim]; `key` and `value`: [batch, key/value heads, K, head_dim].
        attention_mask: boolean or additive, broadcastable to [batch, heads, Q, K]; None if all keys are visible.

    Returns:
        The output [batch, Q, heads, head_dim] and the probabilities [batch, heads, Q, K] (softmax in float32).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class MiniLLMAttention(nn.Module):
    """Multi-head attention with shared key/value heads (MHA, GQA, MQA).

    Args:
        config: the model's configuration.
        layer_idx: index of the block, which is also its index in the cache.
    """

    def __init__(self, config: MiniLLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # Each field is read once: reading one of a config costs, and a model has many layers.
        hidden_size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_qkv_bias
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim
        self.num_key_value_groups = heads // key_heads
        self.scaling = head_dim**-0.5
        self.is_causal = config.attention_type != "bidirectional"
        self.sliding_window = effective_window(config.sliding_window)
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, key_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, key_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=config.attention_out_bias)
        norm = NORMS[config.norm_type] if config.qk_norm else None
        self.q_norm = norm(config, head_dim) if norm else identity
        self.k_norm = norm(config, head_dim) if norm else identity
        self.pairs = pairs_of(config)
        self.dropout = config.attention_dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_function: Callable | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends over cached and new tokens.

        Args:
            hidden_states: [batch, Q, hidden].
            attention_mask, attention_function: as `minillm.back_ends.attention_inputs` chooses them; without a
                function, that of the back end which the config names.
            position_embeddings: cosines and sines [batch or 1, Q, rotary channels], or None without RoPE.
            kwargs: the cache, which takes this layer's keys and values, under `CACHE_NAME`; the rest, such as
                `position_bias`, is for the attention function.

        Returns:
            The output [batch, Q, hidden], and the probabilities [batch, heads, Q, K] where the back end has them.
        """
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            query, key = apply_rotary(query, key, *position_embeddings, self.pairs)
        cache: Cache | None = kwargs.pop(CACHE_NAME, None)
        if cache is not None:
            # A paged cache reads its indices from the keyword arguments, and adds what its kernel needs.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if attention_function is None:
            attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation or "eager", eager_attention_forward
            )
        output, probabilities = attention_function(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), probabilities
