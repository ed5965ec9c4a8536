"""Who may look at whom: the rule, and the forms of a mask that back ends take.

Shapes: B batch, H heads, Q new tokens, K keys.
"""

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.utils.import_utils import is_tracing

from minillm.blocked_attention import Block, BlockedMask
from minillm.geometry import Geometry
from minillm.position_bias import PositionBias
from minillm.token_facts import Tokens

INDEX_DTYPE = torch.int32
"""Of 32 bits, which take a CPU a sixth of the time of 64 to subtract."""


def visibility(geometry: Geometry, tokens: Tokens) -> tuple[Callable, int]:
    """The mask as a predicate over (batch, head, query, key) indices, and the number of batch rows that differ.

    (causal and window, or in the same block), in the same document, at a real key. A token always sees itself, so that
    no row of a padding token is empty.
    """
    query_offset, key_offset = geometry.query_offset, geometry.key_offset
    is_causal, window = geometry.is_causal, geometry.window
    facts = [tokens.documents, tokens.blocks, tokens.real]
    # Not by `max`, which a graph of a batch of any size cannot hold.
    rows = geometry.batch if any(fact is not None and fact.shape[0] != 1 for fact in facts) else 1
    # Each a name of its own, a tensor [rows, Q or K] or None: flex attention compiles the predicate, and torch looks
    # for what it captured there, in whatever predicate comes next.
    documents, blocks, real_keys = (None if fact is None else fact.expand(rows, -1).contiguous() for fact in facts)
    document_keys = None if documents is None else geometry.new_at_keys(documents).contiguous()
    block_keys = None if blocks is None else geometry.new_at_keys(blocks).contiguous()
    real_keys = None if real_keys is None else geometry.at_keys(real_keys).contiguous()

    def visible(
        batch: torch.Tensor, head: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        distance = (query + query_offset) - (key + key_offset)
        allowed = distance >= 0 if is_causal else distance == distance
        if window is not None:
            allowed = allowed & (distance.abs() < window)
        row = batch if rows > 1 else 0
        if blocks is not None and block_keys is not None:
            allowed = allowed | ((blocks[row, query] > 0) & (blocks[row, query] == block_keys[row, key]))
        if documents is not None and document_keys is not None:
            allowed = allowed & (documents[row, query] == document_keys[row, key])
        if real_keys is not None:
            allowed = (allowed & real_keys[row, key]) | (distance == 0)
        return allowed

    return visible, rows


def is_plain(geometry: Geometry, tokens: Tokens) -> bool:
    """Whether the mask is all of a causal (or full) square, or a last row that sees every key."""
    return tokens.real is None and hides_padding_alone(geometry, tokens)


def hides_padding_alone(geometry: Geometry, tokens: Tokens) -> bool:
    """Whether that is so but for keys that are padding."""
    if tokens.documents is not None or tokens.blocks is not None:
        return False
    # Exported for any length, the mask of a window is always there.
    if geometry.window is not None and (torch.compiler.is_exporting() or geometry.key_length > geometry.window):
        return False
    if geometry.query_length == 1:
        is_last = geometry.key_length == geometry.query_offset - geometry.key_offset + 1
        return not geometry.fixed_size and is_last
    return geometry.is_fresh


def dense_mask(geometry: Geometry, tokens: Tokens) -> torch.Tensor:
    """The mask as a boolean tensor [B or 1, 1, Q, K]."""
    if tokens.real is not None and geometry.query_length == 1 and hides_padding_alone(geometry, tokens):
        # The rule below for the last slot, at a tenth of its price, which each step of decoding would pay.
        last = geometry.at_keys(tokens.real).clone()
        last[:, -1] = True
        return last[:, None, None, :]
    visible, rows = visibility(geometry, tokens)
    # ONNX indexes in 64 bits only.
    dtype = torch.int64 if is_tracing(tokens.position_ids) else INDEX_DTYPE
    query, key = (
        torch.arange(length, device=geometry.device, dtype=dtype)
        for length in (geometry.query_length, geometry.key_length)
    )
    return evaluate(visible, rows, query, key)


def mask_of_block(visible: Callable, rows: int, block: Block) -> torch.Tensor:
    """Part of a mask as a boolean tensor [rows, 1, queries, keys], on CPU."""
    return evaluate(visible, rows, *(torch.arange(part.start, part.stop, dtype=INDEX_DTYPE) for part in block))


def evaluate(visible: Callable, rows: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask's predicate at indices of queries and of keys, as a boolean tensor [rows, 1, queries, keys]."""
    batch = torch.arange(rows, device=query.device, dtype=query.dtype)
    mask = visible(batch[:, None, None, None], None, query[None, None, :, None], key[None, None, None, :])
    return mask.expand(rows, 1, -1, -1)


def blocked_mask(geometry: Geometry, tokens: Tokens, bias: PositionBias | None) -> BlockedMask:
    """The mask, with the bias if there is one, for SDPA on CPU."""
    visible, rows = visibility(geometry, tokens)
    return BlockedMask(geometry.batch, geometry.query_length, lambda block: mask_of_block(visible, rows, block), bias)


def flex_mask(geometry: Geometry, tokens: Tokens) -> BlockMask:
    """The mask for flex attention."""
    visible, rows = visibility(geometry, tokens)
    return create_block_mask(
        visible,
        B=rows if rows > 1 else None,
        H=None,
        Q_LEN=geometry.query_length,
        KV_LEN=geometry.key_length,
        device=geometry.device,
        _compile=geometry.device.type == "cuda",
    )
