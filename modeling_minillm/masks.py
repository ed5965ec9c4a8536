"""Who may look at whom: masks and biases in the form that each back end takes, made once per forward in this file from
the facts of `minillm.layout`.

Shapes: B batch, H heads, Q new tokens, K keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask, create_causal_mask
from transformers.utils.import_utils import is_tracing

from minillm.blocked_attention import Block, BlockedMask, Scores, autocast_dtype
from minillm.cache import CACHE_NAME
from minillm.capabilities import check, kind_of, refusal
from minillm.checks import check_own_mask, require
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.layout import Layout, lay_out
from minillm.positions import (
    LONGEST_FOLD,
    POSITION_BIASES,
    FoldedBias,
    PositionBias,
    fold_alibi,
    follows_length,
    is_foldable,
)

LONGEST_PLAIN = 1024
"""Beyond this length SDPA's own way with plain causal attention is faster on CPU than blocks."""
FOLDING_DEVICES = ("cuda",)
"""Where SDPA has kernels for 16 bits that a mask would keep from running; on CPU blocks serve."""


Mask = torch.Tensor | BlockMask | BlockedMask | None
"""Boolean [B or 1, 1, Q, K], additive [B or 1, 1 or H, Q, K], a BlockMask, a BlockedMask, or None for plain causal."""

Bias = PositionBias | FoldedBias | None
"""The bias where it is not in the mask: in closed form for flex, or folded for SDPA."""


class AttentionInputs(NamedTuple):
    """What is known once per forward: positions on both axes [B or 1, Q], the length of each token's document
    [B or 1, Q or 1] for RoPE that follows it, and the mask and bias that every layer's attention gets."""

    position_ids: torch.Tensor
    block_position_ids: torch.Tensor | None
    lengths: torch.Tensor | None
    attention_mask: Mask
    position_bias: Bias


def dense_mask(layout: Layout) -> torch.Tensor:
    """The mask as a boolean tensor [B or 1, 1, Q, K]."""
    return evaluate(layout, *layout.mask_mod(), Block(slice(0, layout.query_length), slice(0, layout.key_length)))


def evaluate(layout: Layout, visible: Callable, rows: int, block: Block) -> torch.Tensor:
    """A mask's predicate over part of its queries and keys, as a boolean tensor [rows, 1, queries, keys]."""
    # In 32 bits, which take a CPU a sixth of the time of 64 to subtract.
    batch, query, key = (
        torch.arange(part.start, part.stop, device=layout.device, dtype=torch.int32)
        for part in (slice(0, rows), *block)
    )
    mask = visible(batch[:, None, None, None], None, query[None, None, :, None], key[None, None, None, :])
    return mask.expand(rows, 1, -1, -1)


def blocked_mask(layout: Layout, bias: PositionBias | None) -> BlockedMask:
    """The mask, with the bias if there is one, for SDPA on CPU."""
    visible, rows = layout.mask_mod()
    # Half of the least number, to which a bias can be added.
    hidden = torch.tensor(torch.finfo(torch.float32).min / 2, dtype=torch.float32)

    def table(block: Block) -> torch.Tensor:
        mask = torch.where(evaluate(layout, visible, rows, block), 0.0, hidden)
        return mask if bias is None else mask + bias.of_block(*block).dense()

    def without_table(block: Block) -> Scores | None:
        if bias is None:
            return Scores()
        parts = bias.of_block(*block).separate()
        return None if parts is None else Scores(*parts)

    return BlockedMask(layout.query_length, lambda block: evaluate(layout, visible, rows, block), table, without_table)


def block_mask(layout: Layout) -> BlockMask:
    """The mask for flex attention."""
    visible, rows = layout.mask_mod()
    return create_block_mask(
        visible,
        B=rows if rows > 1 else None,
        H=None,
        Q_LEN=layout.query_length,
        KV_LEN=layout.key_length,
        device=layout.device,
        _compile=layout.device.type == "cuda",
    )


def added_dtype(layout: Layout, kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is added to scores: float32, in which a bias is exact in a model of 16 bits too; that of the
    queries where SDPA's kernels of an accelerator take no other.

    Args:
        kind: the back end's, see `minillm.capabilities.kind_of`.
        dtype: of the queries, see `autocast_dtype`.
    """
    takes_float32 = kind == "eager" or layout.device.type == "cpu"
    return torch.promote_types(dtype, torch.float32) if takes_float32 else dtype


def combine(mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """One additive mask of mask and bias in `dtype`; the mask alone where there is no bias."""
    if bias is None:
        return mask
    bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return mask.to(dtype) + bias


def folds(layout: Layout, kind: str, device: str, dtype: torch.dtype) -> bool:
    """Whether ALiBi becomes channels of queries and keys, so that attention is plainly causal: where that is as exact
    as a table of the bias, and all keys are fresh, so that the channels never meet a cache.

    Args:
        kind: the back end's, see `minillm.capabilities.kind_of`.
        device: type of the device.
        dtype: see `autocast_dtype`.
    """
    serves = kind == "sdpa" and device in FOLDING_DEVICES and is_foldable(layout.config)
    is_square = 1 < layout.query_length <= LONGEST_FOLD.get(dtype, 0) and layout.is_plain()
    return serves and is_square and layout.has_default_positions()


def build_attention_inputs(
    config: MiniLLMConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    prefix_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    block_position_ids: torch.Tensor | None = None,
    paged: bool = False,
) -> AttentionInputs:
    """Turns the per-token inputs of a forward into what the layers need under the chosen back end; `paged` says that
    a paged cache keeps the texts of a row apart.

    Raises:
        ValueError: for an input of another dtype, shape or range (see `minillm.checks`), a prefix that is none,
            decreasing documents, or a back end that cannot honour the variant.
    """
    layout = lay_out(
        config,
        inputs_embeds,
        attention_mask,
        position_ids,
        cache,
        prefix_mask,
        document_ids,
        block_position_ids,
    )
    check_back_end(layout, inputs_embeds, document_ids is not None, paged)
    # A paged cache's own mask spans keys that only the cache knows.
    own = paged and attention_mask is not None and len(attention_mask.shape) == 4
    mask, bias = (attention_mask, None) if own else mask_and_bias(layout, inputs_embeds, attention_mask, cache)
    lengths = layout.document_lengths() if follows_length(config) else None
    return AttentionInputs(layout.position_ids, layout.block_position_ids, lengths, mask, bias)


def check_back_end(layout: Layout, inputs_embeds: torch.Tensor, has_document_ids: bool, paged: bool) -> None:
    """Refuses a variant, or documents, that the chosen back end cannot honour: at once where it is known, also while
    tracing; by an assertion of the device where positions tell of documents in a traced graph."""
    config, device = layout.config, inputs_embeds.device.type
    if device == "meta":
        return
    implementation = config._attn_implementation
    kind = kind_of(implementation)
    direction = "backward" if torch.is_grad_enabled() and inputs_embeds.requires_grad else "forward"
    # Engines keep the requests in a row apart by themselves, and so does transformers' flash attention where positions
    # restart, in a single row only.
    apart = paged or kind == "engine" or (kind == "flash" and layout.batch == 1)
    by_positions = layout.restarts is not None and not apart
    is_known = has_document_ids or (by_positions and not is_tracing(inputs_embeds))
    check(config, implementation, device, direction, ("documents",) if is_known else ())
    if by_positions and not is_known:
        reason = refusal(config, implementation, device, direction, ("documents",))
        if reason is not None:
            require(~layout.restarts, f"`position_ids` restart, as in packed documents: {reason}")


def mask_and_bias(
    layout: Layout, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | BlockMask | None, cache: Cache | None
) -> tuple[Mask, Bias]:
    """Mask and bias in the form that the chosen back end takes."""
    config, kind, fields = layout.config, kind_of(layout.config._attn_implementation), vars(layout.config)
    custom = attention_mask if attention_mask is not None and len(attention_mask.shape) != 2 else None
    dtype = autocast_dtype(inputs_embeds)
    if custom is None and folds(layout, kind, inputs_embeds.device.type, dtype):
        return None, fold_alibi(config, layout.query_length, dtype, inputs_embeds.device)
    bias = None
    if fields["position_embedding_type"] in POSITION_BIASES:
        scheme = POSITION_BIASES[fields["position_embedding_type"]]
        bias = scheme(config, layout.position_ids, layout.key_positions, inputs_embeds.dtype)
    added = added_dtype(layout, kind, dtype)
    if custom is not None:
        return own_mask(layout, custom, bias, kind, added)
    if kind in ("flash", "engine", "other"):
        check_needs_no_mask(layout)
        create = create_bidirectional_mask if config.attention_type == "bidirectional" else create_causal_mask
        return create(config, inputs_embeds, attention_mask, **{CACHE_NAME: cache}), None
    if kind == "flex":
        return block_mask(layout), bias
    causal_square = layout.query_length > 1 and fields["attention_type"] != "bidirectional"
    plain = bias is None and layout.is_plain()
    in_blocks = not plain or (causal_square and layout.query_length <= LONGEST_PLAIN)
    if kind == "sdpa" and layout.is_long_square() and in_blocks:
        return blocked_mask(layout, bias), None
    if plain and not (kind == "eager" and causal_square):
        return None, None
    bias = None if bias is None else bias.dense()
    # A single token that sees every key needs no more than its bias.
    mask = None if layout.query_length == 1 and layout.is_plain() else dense_mask(layout)
    return combine(mask, bias, added), None


def check_needs_no_mask(layout: Layout) -> None:
    """Refuses what only a mask can tell to a back end that has none registered: transformers would leave it out."""
    implementation = layout.config._attn_implementation
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        return
    advice = (
        f"attn_implementation={implementation!r} has no mask function: register one with AttentionMaskInterface, or "
        "use 'sdpa' or 'eager'"
    )
    if layout.fixed_size or (layout.query_length > 1 and not layout.is_fresh):
        raise ValueError(f"a cache of fixed size, or several tokens behind cached ones, need a mask, and {advice}")
    if layout.real is not None:
        require(layout.real, f"`attention_mask` has padding, and {advice}")


def own_mask(
    layout: Layout, mask: torch.Tensor | BlockMask, bias: PositionBias | None, kind: str, dtype: torch.dtype
) -> tuple[Mask, Bias]:
    """Takes a caller's own 4D mask, boolean or additive [B or 1, 1 or H, Q, K], or flex attention's own kind of mask,
    as the whole mask."""
    config = layout.config
    check_own_mask(mask, layout.batch, config.num_attention_heads, layout.query_length, layout.key_length)
    for name, fact in (("prefix_mask", layout.blocks), ("document_ids", layout.documents)):
        if fact is not None:
            raise ValueError(f"`{name}` and a 4D `attention_mask` both say who sees whom: give one of them")
    if isinstance(mask, BlockMask):
        if kind != "flex":
            raise ValueError("`attention_mask` is a BlockMask, which only attn_implementation='flex_attention' reads")
        return mask, bias
    if kind not in ("eager", "sdpa", "flex"):
        raise ValueError(
            f"`attention_mask` is 4D, which attn_implementation={config._attn_implementation!r} does not read: "
            "use 'sdpa' or 'eager'"
        )
    if kind == "flex":
        if mask.shape[1] != 1:
            raise ValueError(
                f"`attention_mask` has shape {list(mask.shape)}: flex attention takes one mask for all heads; "
                "use 'sdpa' or 'eager'"
            )
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(dtype).min)
        return mask.to(dtype).expand(layout.batch, -1, -1, -1), bias
    mask = mask.to(dtype) if mask.is_floating_point() else mask
    return combine(mask, None if bias is None else bias.dense(), dtype), None
