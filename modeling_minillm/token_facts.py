"""What is known about the tokens of a forward: padding, documents, prefixes and positions, read once from its inputs.

Shapes: B batch, Q new tokens, K keys; slots are those of `minillm.geometry`.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from minillm.checks import (
    GivenTokens,
    check_documents,
    check_has_prefix,
    check_positions,
    check_prompts,
    check_window,
    read_padding,
    require_shape,
)
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.geometry import Geometry
from minillm.position_schemes import POSITION_TABLES
from minillm.prompts import document_starts, running_max

logger = logging.get_logger(__name__)

LOWEST = torch.iinfo(torch.int64).min


class Tokens(NamedTuple):
    """The facts about tokens from which masks, biases and positions follow.

    Attributes:
        position_ids: [B or 1, Q] on the first axis.
        block_position_ids: [B or 1, Q] on the second axis, as given; None without one.
        real: boolean [B, slots], False at padding; None if every slot is real.
        documents: [B or 1, Q], non-decreasing, padding carries the document before it; None for a single document.
        restarts: boolean [B or 1, Q], where positions alone say that a document begins; None if something else says.
        blocks: [B, Q], the number of a token's bidirectional block, 0 outside; None without a prefix.
        given_positions: [B or 1, Q or slots] as given, with those of cached tokens; None if they were counted.
    """

    position_ids: torch.Tensor
    block_position_ids: torch.Tensor | None = None
    real: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    restarts: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    given_positions: torch.Tensor | None = None

    def copy(self) -> "Tokens":
        """The same in memory of its own, whatever becomes of the tensors that the caller gave."""
        return self._replace(**{name: fact.clone() for name, fact in self._asdict().items() if fact is not None})


def read_tokens(config: MiniLLMConfig, geometry: Geometry, given: GivenTokens) -> Tokens:
    """Reads and checks what the caller says of the tokens.

    Raises:
        ValueError: for an input of another shape or range (see `minillm.checks`), a prefix that is none, decreasing
            documents, or documents behind cached tokens.
    """
    tables = len(POSITION_TABLES.get(vars(config)["position_embedding_type"], ()))
    real = read_real(geometry, given.padding)
    real_new = None if real is None else geometry.at_queries(real)
    # Rows of the learned table of each axis; what stands at padding is read from it all the same.
    size = config.position_table_size if tables else None
    sizes = size, size if tables > 1 else None
    given_positions = read_positions(geometry, given.position_ids, real_new, sizes[0])
    block_position_ids = read_block_positions(geometry, given.block_position_ids, real_new, sizes[1])
    documents, restarts = read_documents(geometry, given, real_new, given_positions)
    blocks = None
    if given.prefix_mask is not None:
        check_has_prefix(config)
        blocks = read_prompts(geometry, given.prefix_mask, real_new, documents)
    if given_positions is not None:
        position_ids = given_positions[:, -geometry.query_length :]
    else:
        position_ids = count_positions(geometry, real, real_new, documents)
        if tables:
            check_positions("position_ids", position_ids, None, sizes[0])
    return Tokens(position_ids, block_position_ids, real, documents, restarts, blocks, given_positions)


def read_real(geometry: Geometry, padding: torch.Tensor | None) -> torch.Tensor | None:
    """Reads a 2D mask [B, slots], 1 at real tokens; a fixed-size cache may bring a longer one."""
    if padding is None:
        return None
    count, length = geometry.slot_count, padding.shape[-1]
    exact = geometry.knows_offset and not geometry.fixed_size
    lengths = (count,) if exact else (max(count, length),)
    require_shape("attention_mask", padding, geometry.batch, lengths, "cached and new tokens")
    if geometry.knows_offset:
        padding = padding[:, :count]
    real = read_padding(padding.to(geometry.device))
    if real is not None and geometry.window is not None:
        check_window(real)
    return real


def read_positions(
    geometry: Geometry, position_ids: torch.Tensor | None, real_new: torch.Tensor | None, table_size: int | None
) -> torch.Tensor | None:
    """Reads positions of the new tokens [B or 1, Q] or of cached and new ones [B or 1, slots]."""
    if position_ids is None:
        return None
    count = geometry.query_length
    lengths = (count, geometry.slot_count)
    if not geometry.knows_offset:
        lengths = (count, max(count, position_ids.shape[-1]))
    require_shape("position_ids", position_ids, geometry.batch, lengths, "new tokens, or cached and new tokens")
    position_ids = position_ids.to(geometry.device, torch.int64)
    check_positions("position_ids", position_ids[:, -count:], real_new, table_size)
    if real_new is not None and table_size is not None:
        new = torch.where(real_new, position_ids[:, -count:], 0)
        cached = position_ids[:, :-count].expand(new.shape[0], -1)
        position_ids = torch.cat((cached, new), dim=-1)
    return position_ids


def read_block_positions(
    geometry: Geometry, block_position_ids: torch.Tensor | None, real_new: torch.Tensor | None, table_size: int | None
) -> torch.Tensor | None:
    """Reads positions of the new tokens on the second axis, [B or 1, Q]."""
    if block_position_ids is None:
        return None
    name, lengths = "block_position_ids", (geometry.query_length,)
    require_shape(name, block_position_ids, geometry.batch, lengths, "the tokens that go in")
    block_position_ids = block_position_ids.to(geometry.device, torch.int64)
    check_positions(name, block_position_ids, real_new, table_size)
    return block_position_ids if real_new is None else torch.where(real_new, block_position_ids, 0)


def read_documents(
    geometry: Geometry, given: GivenTokens, real_new: torch.Tensor | None, positions: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Documents [B or 1, Q], as `document_ids` tell or, where nothing else speaks, restarting positions; and where
    those restart, if it is they that tell."""
    if given.document_ids is not None:
        lengths = (geometry.query_length,)
        require_shape("document_ids", given.document_ids, geometry.batch, lengths, "the tokens that go in")
        documents = given.document_ids.to(geometry.device, torch.int64)
        running = running_max(documents if real_new is None else torch.where(real_new, documents, LOWEST))
        check_documents(documents, running, real_new, geometry.query_offset)
        return running, None
    alone = given.attention_mask is None and given.block_position_ids is None
    if positions is None or not (alone and positions.shape[1] == geometry.query_length > 1 and geometry.is_fresh):
        return None, None
    return infer_documents(geometry, positions)


def infer_documents(geometry: Geometry, positions: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A document begins wherever `positions` [B or 1, Q] restart at 0. The values are looked at in eager mode; a
    traced graph builds the documents whether or not there is more than one."""
    starts = (positions == 0) & (torch.arange(geometry.query_length, device=geometry.device) > 0)
    if not is_tracing(starts):
        if not bool(starts.any()):
            return None, None
        if bool((starts[:, 1:] & starts[:, :-1]).any()):
            logger.warning_once(
                "`position_ids` hold a run of zeros, read as packed documents of one token each, since neither "
                "`document_ids` nor an `attention_mask` came along. If the zeros stand at padding, pass the "
                "`attention_mask`; if documents are meant, pass `document_ids`."
            )
    return starts.long().cumsum(-1), starts


def read_prompts(
    geometry: Geometry, prefix_mask: torch.Tensor, real_new: torch.Tensor | None, documents: torch.Tensor | None
) -> torch.Tensor:
    """Reads a prefix mask [B or 1, Q]: k on the k-th prompt of a document, 0 outside."""
    lengths = (geometry.query_length,)
    require_shape("prefix_mask", prefix_mask, geometry.batch, lengths, "the tokens that go in")
    blocks = prefix_mask.to(geometry.device, torch.int64).expand(geometry.batch, -1)
    check_prompts(blocks, real_new, documents)
    return blocks if real_new is None else blocks * real_new


def count_slots(real: torch.Tensor) -> torch.Tensor:
    """The number of real tokens before each slot, for a boolean mask [B, slots]."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)


def count_positions(
    geometry: Geometry, real: torch.Tensor | None, real_new: torch.Tensor | None, documents: torch.Tensor | None
) -> torch.Tensor:
    """Positions of the new tokens [B or 1, Q]: the number of real tokens before each in its document."""
    if documents is None:
        return geometry.query_slots[None] if real is None else geometry.at_queries(count_slots(real))
    counted = torch.ones_like(documents) if real_new is None else real_new.long()
    count = counted.cumsum(-1) - counted
    starts = document_starts(documents).expand_as(count)
    return (count - running_max(torch.where(starts, count, 0))).clamp(min=0)


def positions_of_keys(geometry: Geometry, tokens: Tokens) -> torch.Tensor:
    """Positions of the keys [B or 1, K]: cached ones come with `position_ids` or are counted."""
    given, count = tokens.given_positions, geometry.query_length
    if given is not None and given.shape[1] > count:
        return geometry.at_keys(given)
    if geometry.is_square:
        return tokens.position_ids
    counted = geometry.key_slots[None] if tokens.real is None else geometry.at_keys(count_slots(tokens.real))
    if geometry.knows_offset and geometry.key_offset + geometry.key_length == geometry.slot_count:
        # In a cache that grows the new tokens are the last keys; this is cheaper in each step of decoding.
        cached, new = counted[:, :-count], tokens.position_ids
        rows = max(cached.shape[0], new.shape[0])
        return torch.cat((cached.expand(rows, -1), new.expand(rows, -1)), dim=-1)
    new = geometry.new_at_keys(tokens.position_ids)
    return torch.where(geometry.key_slots >= geometry.query_offset, new, counted)


def document_lengths(geometry: Geometry, tokens: Tokens) -> torch.Tensor:
    """The largest position of each token's document in its row, cached keys included, plus one: [B or 1, Q], or
    [B or 1, 1] for a single document."""
    if tokens.documents is None:
        # Unwritten places of a fixed-size cache lie behind the new tokens.
        seen = (geometry.key_slots < geometry.query_offset + geometry.query_length)[None]
        seen = seen if tokens.real is None else seen & geometry.at_keys(tokens.real)
        return torch.where(seen, positions_of_keys(geometry, tokens), 0).amax(-1, keepdim=True) + 1
    positions = tokens.position_ids
    if tokens.real is not None:
        positions = torch.where(geometry.at_queries(tokens.real), positions, 0)
    # Documents numbered from 1: [B, Q]
    number = document_starts(tokens.documents).long().cumsum(-1)
    positions, number = torch.broadcast_tensors(positions, number)
    largest = F.pad(torch.zeros_like(positions), (0, 1)).scatter_reduce(1, number, positions, "amax")
    return largest.gather(1, number) + 1
