"""A key/value cache that grows into room it has already, so that a new token copies itself and not the whole text.

transformers' `DynamicCache` joins all keys and values with those of each new token, in every layer: n tokens cost n^2
copies. `DynamicCache` itself is kept, and with it what transformers does by its class; its layers are these.
"""

import warnings
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from minillm.tuning import tuning

CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this transformers calls the key/value cache; it was `past_key_values` before 5.24."""

NEVER = 2**62
"""A setting of `tuning.growing_elements` that leaves all caches as they are."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, given under its name or under its older one, of which a warning tells where it is the older one.

    Raises:
        ValueError: if both are given and differ.
    """
    if past_key_values is not None and CACHE_NAME != "past_key_values" and not torch.compiler.is_compiling():
        # In the words and of the kind of transformers' own, which filters of warnings know.
        message = "`past_key_values` is deprecated, as in transformers: use `cache` instead."
        warnings.warn(message, FutureWarning, stacklevel=3)
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("`cache` and `past_key_values` are two names of one thing: give one of them")
    return past_key_values if cache is None else cache


class Room:
    """Memory for more keys and values than there are yet.

    Args:
        keys, values: [batch, key/value heads, capacity, head_dim].
        filled: tokens written, by whichever layer shares this room.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int = 0) -> None:
        self.keys, self.values, self.filled = keys, values, filled

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values [batch, key/value heads, tokens, head_dim] behind those there; views of all."""
        start, count = self.filled, keys.shape[-2]
        self.filled = start + count
        # Through `data`, since a graph of gradients that holds earlier places is not touched.
        self.keys.data.narrow(-2, start, count).copy_(keys)
        self.values.data.narrow(-2, start, count).copy_(values)
        return self.written()

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys.narrow(-2, 0, self.filled), self.values.narrow(-2, 0, self.filled)


def fits(new: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether `new` is as `held`, [batch, heads, tokens, head_dim], in all but the number of tokens."""
    same_kind = new.dtype == held.dtype and new.device == held.device
    return same_kind and new.shape[:2] == held.shape[:2] and new.shape[3:] == held.shape[3:]


class GrowingLayer(DynamicLayer):
    """A layer of a `DynamicCache` with room for tokens to come.

    `keys` and `values` are what they are in transformers' layer, [batch, key/value heads, length, head_dim], but views
    of longer tensors. What others put in their place, as cropping does, is copied to new room with the next token.
    What was handed out is never written again: a new token takes a place that nobody has been shown. Who edits `keys`
    in place edits what was handed out before, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.room: Room | None = None
        self.shown: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values [batch, key/value heads, new tokens, head_dim]; returns those of all tokens."""
        held = self._held_to_grow(key_states, value_states)
        if held is None:
            self._leave_room()
            return super().update(key_states, value_states, *args, **kwargs)
        total = held[0].shape[-2] + key_states.shape[-2]
        room = self._room_for(total)
        if room is None:
            self._leave_room()
            capacity = total + max(tuning.least_room, total // 8)
            keys, values = (part.new_empty((*part.shape[:-2], capacity, part.shape[-1])) for part in held)
            room = self.room = Room(keys, values)
            room.add(*held)
        shown = room.add(key_states, value_states)
        self.keys, self.values = self.shown = shown
        return shown

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows [beams] in the place of those held, which are copied once, with the room behind them."""
        room = self._shown_room()
        if room is None:
            super().reorder_cache(beam_idx)
            return
        rows = beam_idx.to(room.keys.device)
        self.room = Room(room.keys.index_select(0, rows), room.values.index_select(0, rows), room.filled)
        self.keys, self.values = self.shown = self.room.written()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._leave_room()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._leave_room()
        super().batch_select_indices(indices)

    def offload(self) -> None:
        self._leave_room()
        super().offload()

    def reset(self) -> None:
        """Empties the layer, as transformers 5.24 does; 5.17 keeps as many zeros."""
        self._leave_room()
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def _leave_room(self) -> None:
        """Holds on to no memory but that of `keys` and `values`."""
        self.room = self.shown = None

    def _held_to_grow(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values held, if new tokens may be written beside them: not in a graph of gradients or of a
        compiler, which keep what they have seen, and not where joining them would convert or refuse them."""
        keys, values = self.keys, self.values
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or keys is None or values is None:
            return None
        if not self.is_initialized or keys.ndim != 4 or keys.numel() < tuning.growing_elements:
            return None
        return (keys, values) if fits(key_states, keys) and fits(value_states, values) else None

    def _room_for(self, total: int) -> Room | None:
        """The room, if it has a place for a total of tokens that may be written in this mode."""
        room = self._shown_room()
        if room is None or room.keys.shape[-2] < total:
            return None
        return room if torch.is_inference_mode_enabled() or not room.keys.is_inference() else None

    def _shown_room(self) -> Room | None:
        """The room, if the tokens held are those that this layer showed last, with nothing written behind them."""
        if self.room is None or self.shown is None:
            return None
        keys, values = self.shown
        is_shown = self.keys is keys and self.values is values and self.room.filled == keys.shape[-2]
        return self.room if is_shown else None


def with_room(cache: Cache | None) -> Cache | None:
    """Gives the plain layers of an empty `DynamicCache` room to grow; returns the cache, whatever it is.

    A cache that holds tokens, a subclass, and layers of other kinds, or offloaded ones, stay what they are. So does a
    cache in a graph of a compiler, which joins in any case, and any cache if `tuning.growing_elements` says never.
    """
    # First what a step of decoding meets, so that it pays next to nothing.
    if type(cache) is not DynamicCache or (cache.layers and type(cache.layers[0]) is GrowingLayer):
        return cache
    if torch.compiler.is_compiling() or cache.offloading or tuning.growing_elements >= NEVER or cache.get_seq_length():
        return cache
    # Without a config the cache makes its layers as they are needed.
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
