"""What is known about the tokens of a forward: padding, documents, prefixes, positions, and which key is which.

Shapes: B batch, Q new tokens, K keys. A *slot* is a place in the sequence of cached and new tokens, padding included;
new tokens fill the slots from `query_offset` on, and key j of attention stands in slot `key_offset + j`.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from minillm.checks import check_positions, check_prompts, check_window, read_padding, require, require_shape
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.positions import POSITION_TABLES

logger = logging.get_logger(__name__)

LONGEST_INDEX = torch.iinfo(torch.int32).max
LOWEST = torch.iinfo(torch.int64).min
SHORT = 128
"""Up to this length a mask on CPU is one block."""


def effective_window(config: MiniLLMConfig) -> int | None:
    """The sliding window, or None if it reaches beyond the longest index."""
    window = vars(config)["sliding_window"]
    return None if window is None or window > LONGEST_INDEX else window


class Layout:
    """The facts about tokens and slots from which mask, positions and bias follow.

    Attributes:
        real: boolean [B, slots], False at padding; None if every slot is real.
        documents: [B or 1, Q], non-decreasing, padding carries the document before it; None for a single document.
        restarts: boolean [B or 1, Q], where positions alone say that a document begins; None if something else says.
        blocks: [B, Q], the number of a token's bidirectional block, 0 outside; None without a prefix.
        position_ids: [B or 1, Q] on the first axis.
    """

    def __init__(self, config: MiniLLMConfig, inputs_embeds: torch.Tensor, cache: Cache | None) -> None:
        self.config = config
        self.batch, self.query_length = inputs_embeds.shape[:2]
        self.device = inputs_embeds.device
        self.window = effective_window(config)
        # Fields are not read by name from the config itself: that takes transformers three function calls for each.
        self.tables = POSITION_TABLES.get(vars(config)["position_embedding_type"], ())
        self.fixed_size = getattr(cache, "is_compileable", False)
        self.query_offset: int | torch.Tensor = 0
        self.key_length, self.key_offset = self.query_length, 0
        if cache is not None:
            self.key_length, self.key_offset = cache.get_mask_sizes(self.query_length, 0)
            self.query_offset = cache.get_query_offset(0)
        if isinstance(self.query_offset, torch.Tensor):
            self.query_offset = self.query_offset.to(self.device)
        self.is_fresh = isinstance(self.query_offset, int) and self.query_offset == 0
        self.real: torch.Tensor | None = None
        self.documents: torch.Tensor | None = None
        self.restarts: torch.Tensor | None = None
        self.blocks: torch.Tensor | None = None
        self.given_positions: torch.Tensor | None = None
        self.block_position_ids: torch.Tensor | None = None

    @property
    def query_slots(self) -> torch.Tensor:
        return torch.arange(self.query_length, device=self.device) + self.query_offset

    @property
    def key_slots(self) -> torch.Tensor:
        return torch.arange(self.key_length, device=self.device) + self.key_offset

    @property
    def slot_count(self) -> int:
        """Slots that a per-slot input covers when its length is known in Python, else the tokens that go in."""
        return self.query_length + (self.query_offset if isinstance(self.query_offset, int) else 0)

    def set_padding(self, attention_mask: torch.Tensor) -> None:
        """Reads a 2D mask [B, cached + new], 1 at real tokens; a fixed-size cache may bring a longer one."""
        count, length = self.slot_count, attention_mask.shape[-1]
        exact = isinstance(self.query_offset, int) and not self.fixed_size
        lengths = (count,) if exact else (max(count, length),)
        require_shape("attention_mask", attention_mask, self.batch, lengths, "cached and new tokens")
        if isinstance(self.query_offset, int):
            attention_mask = attention_mask[:, :count]
        self.real = read_padding(attention_mask.to(self.device))
        if self.real is not None and self.window is not None:
            check_window(self.real)

    def at_queries(self, per_slot: torch.Tensor) -> torch.Tensor:
        """The columns of the new tokens."""
        if isinstance(self.query_offset, int):
            return per_slot[:, self.query_offset : self.query_offset + self.query_length]
        return per_slot.index_select(1, self.query_slots)

    def at_keys(self, per_slot: torch.Tensor) -> torch.Tensor:
        """The columns of the keys; slots beyond the given ones (unwritten places of a fixed-size cache) are 0."""
        per_slot = F.pad(per_slot, (0, max(0, self.key_length + self.key_offset - per_slot.shape[1])))
        return per_slot[:, self.key_offset : self.key_offset + self.key_length]

    def new_at_keys(self, per_token: torch.Tensor) -> torch.Tensor:
        """Spreads values of the new tokens [B, Q] over the keys [B, K]; cached and unwritten keys get 0."""
        if self.key_length == self.query_length and self.is_fresh:
            return per_token
        index = self.key_slots - self.query_offset
        inside = (index >= 0) & (index < self.query_length)
        return per_token.index_select(1, index.clamp(0, self.query_length - 1)) * inside

    def real_new(self) -> torch.Tensor | None:
        return None if self.real is None else self.at_queries(self.real)

    def set_documents(self, document_ids: torch.Tensor) -> None:
        require_shape("document_ids", document_ids, self.batch, (self.query_length,), "the tokens that go in")
        if isinstance(self.query_offset, int) and self.query_offset > 0:
            raise ValueError(
                f"`document_ids` were given with a cache that holds {self.query_offset} tokens: documents are packed "
                "in one forward; continue each document from a cache of its own"
            )
        if isinstance(self.query_offset, torch.Tensor):
            require(self.query_offset == 0, "`document_ids` were given with a cache that already holds tokens")
        documents = document_ids.to(self.device, torch.int64)
        real = self.real_new()
        if real is None:
            running = documents.cummax(-1).values
            require(documents == running, "`document_ids` decrease inside a row; they must be non-decreasing")
        else:
            running = torch.where(real, documents, LOWEST).cummax(-1).values
            require(
                (documents == running) | ~real,
                "`document_ids` decrease over the real tokens of a row; they must be non-decreasing",
            )
        self.documents = running

    def set_positions(self, position_ids: torch.Tensor) -> None:
        """Takes positions of the new tokens [B or 1, Q] or of cached and new ones [B or 1, cached + new]."""
        lengths = (self.query_length, self.slot_count)
        if isinstance(self.query_offset, torch.Tensor):
            lengths = (self.query_length, max(self.query_length, position_ids.shape[-1]))
        require_shape("position_ids", position_ids, self.batch, lengths, "new tokens, or cached and new tokens")
        position_ids = position_ids.to(self.device, torch.int64)
        real = self.real_new()
        check_positions("position_ids", position_ids[:, -self.query_length :], real, self.table_size(0))
        if real is not None and self.tables:
            # What stands at padding is read from the table all the same.
            new = torch.where(real, position_ids[:, -self.query_length :], 0)
            cached = position_ids[:, : -self.query_length].expand(new.shape[0], -1)
            position_ids = torch.cat((cached, new), dim=-1)
        self.given_positions = position_ids

    def set_block_positions(self, block_position_ids: torch.Tensor) -> None:
        """Takes positions of the new tokens on the second axis, [B or 1, Q]."""
        lengths = (self.query_length,)
        require_shape("block_position_ids", block_position_ids, self.batch, lengths, "the tokens that go in")
        block_position_ids, real = block_position_ids.to(self.device, torch.int64), self.real_new()
        check_positions("block_position_ids", block_position_ids, real, self.table_size(1))
        self.block_position_ids = block_position_ids if real is None else torch.where(real, block_position_ids, 0)

    def table_size(self, axis: int) -> int | None:
        """Rows of the learned table of a position axis; None without one."""
        return self.config.position_table_size if axis < len(self.tables) else None

    def may_be_packed(self, attention_mask: torch.Tensor | None, block_position_ids: torch.Tensor | None) -> bool:
        """Whether restarting positions would say, and nothing else says, that a row holds several documents."""
        given = self.given_positions
        alone = attention_mask is None and block_position_ids is None and self.is_fresh
        return alone and given is not None and given.shape[1] == self.query_length > 1

    def infer_documents(self) -> None:
        """A document begins wherever `position_ids` restart at 0. The values are looked at in eager mode; a traced
        graph builds the documents whether or not there is more than one."""
        starts = (self.given_positions == 0) & (torch.arange(self.query_length, device=self.device) > 0)
        if not is_tracing(starts):
            if not bool(starts.any()):
                return
            if bool((starts[:, 1:] & starts[:, :-1]).any()):
                logger.warning_once(
                    "`position_ids` hold a run of zeros, read as packed documents of one token each, since neither "
                    "`document_ids` nor an `attention_mask` came along. If the zeros stand at padding, pass the "
                    "`attention_mask`; if documents are meant, pass `document_ids`."
                )
        self.restarts, self.documents = starts, starts.long().cumsum(-1)

    def set_prefix(self, prefix_mask: torch.Tensor) -> None:
        """Reads a prefix mask [B, Q]: k on the k-th prompt of a document, 0 outside."""
        require_shape("prefix_mask", prefix_mask, self.batch, (self.query_length,), "the tokens that go in")
        blocks, real = prefix_mask.to(self.device, torch.int64).expand(self.batch, -1), self.real_new()
        check_prompts(blocks, real, self.documents)
        self.blocks = blocks if real is None else blocks * real

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions of the new tokens: as given, else the number of real tokens before each in its document."""
        if self.given_positions is not None:
            return self.given_positions[:, -self.query_length :]
        if self.documents is None:
            if self.real is None:
                return self.query_slots[None]
            return self.at_queries(self._counted())
        real = self.real_new()
        real = torch.ones_like(self.documents) if real is None else real.long()
        count = real.cumsum(-1) - real
        documents = self.documents.expand(count.shape[0], -1)
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        return (count - torch.where(starts, count, 0).cummax(-1).values).clamp(min=0)

    def _counted(self) -> torch.Tensor:
        return (self.real.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def key_positions(self) -> torch.Tensor:
        """Positions of the keys: cached ones come with `position_ids` or are counted."""
        given = self.given_positions
        if given is not None and given.shape[1] > self.query_length:
            return self.at_keys(given)
        if self.key_length == self.query_length and self.is_fresh:
            return self.position_ids
        counted = self.key_slots[None] if self.real is None else self.at_keys(self._counted())
        if isinstance(self.query_offset, int) and self.key_offset + self.key_length == self.slot_count:
            # In a cache that grows the new tokens are the last keys; this is cheaper in each step of decoding.
            cached, new = counted[:, : -self.query_length], self.position_ids
            rows = max(cached.shape[0], new.shape[0])
            return torch.cat((cached.expand(rows, -1), new.expand(rows, -1)), dim=-1)
        new = self.new_at_keys(self.position_ids)
        return torch.where(self.key_slots >= self.query_offset, new, counted)

    def document_lengths(self) -> torch.Tensor:
        """The largest position of each token's document in its row, cached keys included, plus one: [B or 1, Q], or
        [B or 1, 1] for a single document."""
        if self.documents is None:
            # Unwritten places of a fixed-size cache lie behind the new tokens.
            seen = (self.key_slots < self.query_offset + self.query_length)[None]
            seen = seen if self.real is None else seen & self.at_keys(self.real)
            return torch.where(seen, self.key_positions, 0).amax(-1, keepdim=True) + 1
        real = self.real_new()
        positions = self.position_ids if real is None else torch.where(real, self.position_ids, 0)
        # Documents numbered from 0: [B, Q]
        number = F.pad(self.documents.diff(dim=-1) != 0, (1, 0)).long().cumsum(-1)
        positions, number = torch.broadcast_tensors(positions, number)
        largest = torch.zeros_like(positions).scatter_reduce(1, number, positions, "amax")
        return largest.gather(1, number) + 1

    def mask_mod(self) -> tuple[Callable, int]:
        """The mask as a predicate over (batch, head, query, key) indices, and the number of batch rows that differ.

        (causal and window, or in the same block), in the same document, at a real key. A token always sees itself, so
        that no row of a padding token is empty.
        """
        config, window = self.config, self.window
        query_offset, key_offset = self.query_offset, self.key_offset
        bidirectional = config.attention_type == "bidirectional"
        facts = {
            "documents": None if self.documents is None else (self.documents, self.new_at_keys(self.documents)),
            "blocks": None if self.blocks is None else (self.blocks, self.new_at_keys(self.blocks)),
            "real": None if self.real is None else (self.at_keys(self.real),),
        }
        # Not by `max`, which a graph of a batch of any size cannot hold.
        rows = self.batch if any(fact[0].shape[0] != 1 for fact in facts.values() if fact is not None) else 1
        facts = {
            name: fact and tuple(part.expand(rows, -1).contiguous() for part in fact) for name, fact in facts.items()
        }

        def visible(batch, head, query, key):
            distance = (query + query_offset) - (key + key_offset)
            allowed = (distance == distance) if bidirectional else distance >= 0
            if window is not None:
                allowed = allowed & (distance < window)
                if bidirectional:
                    allowed = allowed & (distance > -window)
            row = batch if rows > 1 else 0
            if facts["blocks"] is not None:
                of_query, of_key = facts["blocks"]
                allowed = allowed | ((of_query[row, query] > 0) & (of_query[row, query] == of_key[row, key]))
            if facts["documents"] is not None:
                of_query, of_key = facts["documents"]
                allowed = allowed & (of_query[row, query] == of_key[row, key])
            if facts["real"] is not None:
                allowed = (allowed & facts["real"][0][row, key]) | (distance == 0)
            return allowed

        return visible, rows

    def is_long_square(self) -> bool:
        """Whether attention pays off in blocks: on CPU, over fresh keys that are not few, and in no graph."""
        square = self.is_fresh and self.key_length == self.query_length > SHORT
        return square and self.device.type == "cpu" and not is_tracing(self.position_ids)

    def has_default_positions(self) -> bool:
        """Whether new tokens stand at 0, 1, 2, ... of an empty cache; given positions are looked at in eager mode."""
        if self.given_positions is None or not self.is_fresh:
            return self.is_fresh
        return not is_tracing(self.given_positions) and bool((self.position_ids == self.query_slots).all())

    def is_plain(self) -> bool:
        """Whether the mask is all of a causal (or full) square, or a last row that sees every key."""
        if any(fact is not None for fact in (self.real, self.documents, self.blocks)):
            return False
        if self.window is not None and self.key_length > self.window:
            return False
        if self.query_length == 1:
            return not self.fixed_size and self.key_length == self.query_offset - self.key_offset + 1
        return self.is_fresh


def lay_out(
    config: MiniLLMConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    prefix_mask: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    block_position_ids: torch.Tensor | None,
) -> Layout:
    """Reads and checks the per-token inputs of a forward (all [B, Q]; see `MiniLLMModel.forward`)."""
    layout = Layout(config, inputs_embeds, cache)
    if attention_mask is not None and len(attention_mask.shape) == 2:
        layout.set_padding(attention_mask)
    if position_ids is not None:
        layout.set_positions(position_ids)
    if block_position_ids is not None:
        layout.set_block_positions(block_position_ids)
    if document_ids is not None:
        layout.set_documents(document_ids)
    elif layout.may_be_packed(attention_mask, block_position_ids):
        layout.infer_documents()
    if prefix_mask is not None:
        if config.attention_type != "prefix":
            raise ValueError(
                f"`prefix_mask` was given, but `attention_type={config.attention_type!r}`: "
                "only a model with `attention_type='prefix'` has a bidirectional prefix"
            )
        layout.set_prefix(prefix_mask)
    if position_ids is None and layout.tables:
        check_positions("position_ids", layout.position_ids, None, layout.table_size(0))
    return layout
