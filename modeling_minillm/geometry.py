"""Which slots the queries and keys of attention stand in, and how far a query looks: one geometry for each kind of
layer, whose caches may keep other keys.

Shapes: B batch, Q new tokens, K keys. A *slot* is a place in the sequence of cached and new tokens, padding included;
new tokens fill the slots from `query_offset` on, and key j of attention stands in slot `key_offset + j`.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

from minillm.configuration.configuration_minillm import MiniLLMConfig

LONGEST_INDEX = torch.iinfo(torch.int32).max


def effective_window(window: int | None) -> int | None:
    """A config's `sliding_window`, or None if it reaches beyond the longest index."""
    return None if window is None or window > LONGEST_INDEX else window


class Geometry(NamedTuple):
    """Queries and keys of one kind of layer.

    Attributes:
        batch, query_length: rows, and new tokens in each.
        query_offset: slot of the first new token; a tensor [] where a cache of fixed size counts on the device.
        key_length, key_offset: how many keys there are, and the slot of the first.
        fixed_size: whether the cache has all its places from the start, written or not.
        device: of the tokens.
        is_causal: whether a query sees no key behind its own slot.
        window: how many keys a query sees, its own included; None for all.
    """

    batch: int
    query_length: int
    query_offset: int | torch.Tensor
    key_length: int
    key_offset: int
    fixed_size: bool
    device: torch.device
    is_causal: bool
    window: int | None

    @property
    def knows_offset(self) -> bool:
        """Whether the number of cached tokens is known in Python."""
        return not isinstance(self.query_offset, torch.Tensor)

    @property
    def is_fresh(self) -> bool:
        """Whether no token is known to have come before the new ones."""
        return not isinstance(self.query_offset, torch.Tensor) and self.query_offset == 0

    @property
    def is_square(self) -> bool:
        """Whether the keys are the new tokens."""
        return self.is_fresh and self.key_length == self.query_length

    @property
    def slot_count(self) -> int:
        """Slots of cached and new tokens, where the number of cached ones is known; else of the new ones."""
        return self.query_length + (0 if isinstance(self.query_offset, torch.Tensor) else self.query_offset)

    @property
    def query_slots(self) -> torch.Tensor:
        return torch.arange(self.query_length, device=self.device) + self.query_offset

    @property
    def key_slots(self) -> torch.Tensor:
        return torch.arange(self.key_length, device=self.device) + self.key_offset

    def at_queries(self, per_slot: torch.Tensor) -> torch.Tensor:
        """The columns of the new tokens, of a tensor [B or 1, slots]."""
        if self.knows_offset:
            return per_slot[:, self.query_offset : self.query_offset + self.query_length]
        return per_slot.index_select(1, self.query_slots)

    def at_keys(self, per_slot: torch.Tensor) -> torch.Tensor:
        """The columns of the keys; slots beyond the given ones (unwritten places of a fixed-size cache) are 0."""
        if self.fixed_size:
            per_slot = F.pad(per_slot, (0, max(0, self.key_length + self.key_offset - per_slot.shape[1])))
            return per_slot[:, self.key_offset : self.key_offset + self.key_length]
        # The last slot is that of the last key.
        return per_slot[:, self.key_offset :]

    def new_at_keys(self, per_token: torch.Tensor) -> torch.Tensor:
        """Spreads values of the new tokens [B or 1, Q] over the keys [B or 1, K]; cached and unwritten keys get 0."""
        if self.is_square:
            return per_token
        index = self.key_slots - self.query_offset
        inside = (index >= 0) & (index < self.query_length)
        return per_token.index_select(1, index.clamp(0, self.query_length - 1)) * inside


def read_geometry(config: MiniLLMConfig, tokens: torch.Tensor, cache: Cache | None) -> Geometry:
    """The geometry of all layers, which are of one kind.

    Args:
        tokens: ids [B, Q] or embeddings [B, Q, hidden].
        cache: what the new tokens follow upon, if anything.
    """
    batch, length = tokens.shape[:2]
    fields = vars(config)
    query_offset, key_length, key_offset = 0, length, 0
    if cache is not None:
        key_length, key_offset = cache.get_mask_sizes(length, 0)
        query_offset = cache.get_query_offset(0)
    if isinstance(query_offset, torch.Tensor):
        query_offset = query_offset.to(tokens.device)
    return Geometry(
        batch,
        length,
        query_offset,
        key_length,
        key_offset,
        getattr(cache, "is_compileable", False),
        tokens.device,
        fields["attention_type"] != "bidirectional",
        effective_window(fields["sliding_window"]),
    )
