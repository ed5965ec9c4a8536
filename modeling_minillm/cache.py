"""A key/value cache that grows into room it has already, so that a new token copies itself and not the whole text.

transformers' `DynamicCache` joins all keys and values with those of each new token, in every layer: n tokens cost n^2
copies. `DynamicCache` itself is kept, and with it what transformers does by its class; its layers are these.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this transformers calls the key/value cache; it was `past_key_values` before 5.24."""

LEAST_GROWING = 2**16
"""Elements of a layer's keys from which on it makes room; fewer are joined anew in the time that room takes."""

LEAST_ROOM = 64
"""Tokens that a layer makes room for at once, or one in eight of those it holds where that is more."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, given under its name or under its older one.

    Raises:
        ValueError: if both are given and differ.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("`cache` and `past_key_values` are two names of one thing: give one of them")
    return past_key_values if cache is None else cache


class Room:
    """Memory for more keys and values than there are yet.

    Args:
        keys, values: [batch, key/value heads, capacity, head_dim].
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self.filled = 0

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values [batch, key/value heads, tokens, head_dim] behind those there; views of all."""
        start, count = self.filled, keys.shape[-2]
        self.filled = total = start + count
        self.keys.narrow(-2, start, count).copy_(keys)
        self.values.narrow(-2, start, count).copy_(values)
        return self.keys.narrow(-2, 0, total), self.values.narrow(-2, 0, total)


def fits(new: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether `new` is as `held`, [batch, heads, tokens, head_dim], in all but the number of tokens."""
    same_kind = new.dtype == held.dtype and new.device == held.device
    return same_kind and new.shape[:2] == held.shape[:2] and new.shape[3:] == held.shape[3:]


class GrowingLayer(DynamicLayer):
    """A layer of a `DynamicCache` with room for tokens to come.

    `keys` and `values` are what they are in transformers' layer, [batch, key/value heads, length, head_dim], but views
    of longer tensors. What others put in their place, as reordering and cropping do, is copied to new room with the
    next token. What was handed out is never written again: a new token takes a place that nobody has been shown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.room: Room | None = None
        self.shown: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values [batch, key/value heads, new tokens, head_dim]; returns those of all tokens."""
        if not self._can_grow(key_states, value_states):
            self.room = self.shown = None
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.keys.shape[-2]
        total = length + key_states.shape[-2]
        if not self._has_room(length, total):
            held = self.keys, self.values
            capacity = total + max(LEAST_ROOM, total // 8)
            self.room = Room(*(part.new_empty((*part.shape[:-2], capacity, part.shape[-1])) for part in held))
            self.room.add(*held)
        self.keys, self.values = self.shown = self.room.add(key_states, value_states)
        return self.shown

    def reset(self) -> None:
        self.room = self.shown = None
        if self.is_initialized:
            # transformers 5.17 writes zeros over them.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        super().reset()

    def _can_grow(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether new tokens may be written beside those held: not in a graph of gradients or of a compiler, which
        keep what they have seen, and not where joining them would convert or refuse them."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.is_initialized:
            return False
        if self.keys.ndim != 4 or self.keys.numel() < LEAST_GROWING:
            return False
        return fits(key_states, self.keys) and fits(value_states, self.values)

    def _has_room(self, length: int, total: int) -> bool:
        """Whether the tokens held are those that this layer showed last, with free places behind them."""
        if self.room is None or self.keys is not self.shown[0] or self.values is not self.shown[1]:
            return False
        if self.room.filled != length or self.room.keys.shape[-2] < total:
            return False
        return torch.is_inference_mode_enabled() or not self.room.keys.is_inference()


def with_room(cache: Cache | None) -> Cache | None:
    """Gives the plain layers of a new cache room to grow; those of other kinds, or offloaded ones, stay."""
    if cache is not None and not cache.offloading:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
