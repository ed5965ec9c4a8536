"""Attention on CPU by blocks of queries, each of which meets only the keys that one of its rows sees.

SDPA's CPU kernel skips what lies beyond the diagonal for plain causal attention alone: given a mask or a bias it works
through all of the square. Cut into blocks, every variant does the work that its mask asks for.

The keys of a block are cut in turn: most are visible to all of its queries and need no mask, so that a table of
queries x keys is made only for the rest, near the diagonal. What the parts give is joined by their log-sum-exp, as
flash attention joins its tiles (arXiv 2205.14135, section 3.1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minillm.position_bias import PositionBias
from minillm.tuning import tuning

SHORTEST_BLOCK = 16
"""Queries: a call of the kernel for fewer costs as much as meeting keys in vain."""
HIDDEN = torch.finfo(torch.float32).min / 2
"""Half of the least number, to which a bias can be added."""


class Block(NamedTuple):
    queries: slice
    keys: slice


class Scores(NamedTuple):
    """What is added to the scores of a block: `mask`, broadcastable to [B, H, queries, keys], or None; and `shift`,
    [B or 1, H, queries or 1, 1], or None, which is the same for all keys of a query and only moves its log-sum-exp."""

    mask: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class Part:
    """A block, whether it does without a table, and what is added to its scores, if that is kept."""

    def __init__(self, block: Block, is_open: bool) -> None:
        self.block, self.is_open = block, is_open
        self.kept: Scores | None = None


def block_size(length: int) -> int:
    """Queries in a block: few enough to leave out most of what is hidden, enough to keep the kernel busy."""
    return min(256, max(128, length // 8))


class BlockedMask:
    """A square mask, in blocks of queries whose keys are cut into parts.

    To a model of transformers it is a mask like others, [B, 1, length, length]: what else is done with it than to hand
    it to attention is done with the dense mask, which is made at that moment.

    Args:
        batch: number of rows of the tokens.
        length: number of queries and of keys.
        visible: boolean mask [B or 1, 1, queries, keys] of a block.
        bias: what is added to the scores, if anything.

    Attributes:
        blocks: the parts of each block.
        is_checked: whether it was held against the positions that came with it.
    """

    ndim = 4
    is_checked = False

    def __init__(
        self, batch: int, length: int, visible: Callable[[Block], torch.Tensor], bias: PositionBias | None = None
    ) -> None:
        self.shape = torch.Size((batch, 1, length, length))
        self.visible, self.bias = visible, bias
        self.blocks: list[list[Part]] = []
        room = tuning.kept_elements
        for start in range(0, length, block_size(length)):
            queries = slice(start, min(length, start + block_size(length)))
            # As numbers: `amax` and `amin` take a tenth of the time of `any` and `all`.
            seen = visible(Block(queries, slice(0, length)))[:, 0].view(torch.uint8)
            by_some, by_all = seen.amax(0), seen.amin(0)  # [queries, keys]: seen in some row, in every row
            for own in _between_documents(by_some, start):
                queries = slice(start + own.start, start + own.stop)
                by_one = by_some[own].amax(0).nonzero()
                # Queries of which none sees a key meet each other's, and all of these alike.
                keys = slice(int(by_one[0]), int(by_one[-1]) + 1) if len(by_one) else queries
                self.blocks.append(self._cut(Block(queries, keys), _runs(by_all[own].amin(0).bool())))
        for part in (part for parts in self.blocks for part in parts):
            if room > 0:
                scores = self.scores(part)
                room -= sum(tensor.numel() for tensor in scores if tensor is not None)
                part.kept = scores if room >= 0 else None

    def dense(self) -> torch.Tensor:
        """The mask in one tensor: boolean [B, 1, length, length], or additive [B, H, length, length] with a bias."""
        everything = Block(slice(0, self.shape[2]), slice(0, self.shape[3]))
        mask = self.visible(everything) if self.bias is None else self.table(everything)
        return mask.expand(self.shape[0], -1, -1, -1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]

    def __invert__(self) -> torch.Tensor:
        return ~self.dense()

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*_densified(args), **_densified(kwargs or {}))

    def table(self, block: Block) -> torch.Tensor:
        """The mask of a block with the bias in it, to add to the scores, [B or 1, 1 or H, queries, keys]."""
        mask = torch.where(self.visible(block), 0.0, HIDDEN)
        return mask if self.bias is None else mask + self.bias.of_block(*block).dense()

    def without_table(self, block: Block) -> Scores | None:
        """The bias of a block whose keys are all visible, where it takes no table."""
        if self.bias is None:
            return Scores()
        parts = self.bias.of_block(*block).separate()
        return None if parts is None else Scores(*parts)

    def scores(self, part: Part) -> Scores:
        if part.kept is not None:
            return part.kept
        scores = self.without_table(part.block) if part.is_open else None
        return Scores(self.table(part.block)) if scores is None else scores

    def _cut(self, block: Block, runs: list[slice]) -> list[Part]:
        """Cuts a block between the `runs` of keys that all of its queries see and the others."""
        if runs == [block.keys] and self.without_table(block) is not None:
            return [Part(block, True)]
        parts, end = [], block.keys.start
        for keys in (piece for run in runs for piece in self._pieces(block.queries, run)):
            if keys.start > end:
                parts.append(Part(Block(block.queries, slice(end, keys.start)), False))
            parts.append(Part(Block(block.queries, keys), True))
            end = keys.stop
        if end < block.keys.stop:
            parts.append(Part(Block(block.queries, slice(end, block.keys.stop)), False))
        return parts

    def _pieces(self, queries: slice, run: slice) -> list[slice]:
        """The run itself, or what is left of it on either side of the diagonal, where that is long and the bias takes
        no table."""
        before = slice(run.start, min(run.stop, queries.start))
        after = slice(max(run.start, queries.stop), run.stop)
        for pieces in ([run], [before, after]):
            pieces = [
                keys
                for keys in pieces
                if _length(keys) >= tuning.open_block_keys and self.without_table(Block(queries, keys)) is not None
            ]
            if pieces:
                return pieces
        return []


def _densified(value: Any) -> Any:
    if isinstance(value, BlockedMask):
        return value.dense()
    if isinstance(value, dict):
        return {name: _densified(each) for name, each in value.items()}
    return type(value)(map(_densified, value)) if type(value) in (tuple, list) else value


def _length(part: slice) -> int:
    return part.stop - part.start


def _between_documents(seen: torch.Tensor, start: int) -> list[slice]:
    """Cuts queries at those that see no key before themselves, as the first of a document does, so that these need not
    meet what the queries before them see; neither side of a cut is short.

    Args:
        seen: [queries, keys], not 0 where a key is seen; the first query stands in slot `start`.
    """
    count = seen.shape[0]
    firsts = (seen.tril(start - 1).amax(-1) == 0).nonzero().flatten().tolist()
    cuts = [0]
    for at in firsts:
        if at - cuts[-1] >= SHORTEST_BLOCK and count - at >= SHORTEST_BLOCK:
            cuts.append(at)
    return [slice(*ends) for ends in zip(cuts, [*cuts[1:], count], strict=True)]


def _runs(flags: torch.Tensor) -> list[slice]:
    """Where boolean flags [length] are true, as slices."""
    edges = F.pad(flags, (1, 1)).diff().nonzero().flatten().tolist()
    return [slice(*ends) for ends in zip(edges[::2], edges[1::2], strict=True)]


class FlashInParts(torch.autograd.Function):
    """Attention under a blocked mask by the kernel that SDPA has for CPU, whose backward pass needs the output and the
    log-sum-exp of a whole row of scores, but works on any part of its keys: so no part is computed twice, and masks
    that are not kept are made anew. Gradients of keys and values grow in place, in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: BlockedMask,
        fit: Callable[[Scores], Scores],
        scaling: float | None,
    ) -> torch.Tensor:
        outputs, sums = [], []
        for parts in mask.blocks:
            output: Any = None
            total: Any = None
            for part in parts:
                (queries, keys), added = part.block, fit(mask.scores(part))
                own, own_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    _at(query, queries), _at(key, keys), _at(value, keys), attn_mask=added.mask, scale=scaling
                )
                own_sum = own_sum if added.shift is None else own_sum + added.shift.squeeze(-1)
                if output is None:
                    output, total = own, own_sum
                else:
                    share = torch.sigmoid(own_sum - total)[..., None]
                    output = torch.lerp(output.to(share.dtype), own.to(share.dtype), share)
                    total = torch.logaddexp(total, own_sum)
            outputs.append(output.to(query.dtype).transpose(1, 2))
            sums.append(total)
        # The kernel's output lies in memory as batch, length, heads.
        output = torch.cat(outputs, dim=1)
        ctx.save_for_backward(query, key, value, output, torch.cat(sums, dim=2))
        ctx.mask, ctx.fit, ctx.scaling = mask, fit, scaling
        return output

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: torch's is typed for any number
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        given = (ctx.mask, ctx.fit, ctx.scaling)
        of_inputs = FlashInPartsBackward.apply(gradient, *ctx.saved_tensors, *given)
        wanted = (own if needed else None for own, needed in zip(of_inputs, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None


class FlashInPartsBackward(torch.autograd.Function):
    """The backward pass of `FlashInParts`, a function by itself so that a second derivative meets an error instead of
    missing a term."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        total: torch.Tensor,
        mask: BlockedMask,
        fit: Callable[[Scores], Scores],
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output, gradient = output.transpose(1, 2), gradient.transpose(1, 2)
        of_query, of_key, of_value = (torch.zeros_like(states, dtype=total.dtype) for states in (query, key, value))
        for part in (part for parts in mask.blocks for part in parts):
            (queries, keys), added = part.block, fit(mask.scores(part))
            row_sum = _at(total, queries)
            own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _at(gradient, queries),
                _at(query, queries),
                _at(key, keys),
                _at(value, keys),
                _at(output, queries),
                row_sum if added.shift is None else row_sum - added.shift.squeeze(-1),
                0.0,
                False,
                attn_mask=added.mask,
                scale=scaling,
            )
            for whole, place, piece in zip((of_query, of_key, of_value), (queries, keys, keys), own, strict=True):
                _at(whole, place).add_(piece)
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise RuntimeError(
            "attention in blocks has no second derivative: use attn_implementation='eager', or run it within "
            "`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`"
        )


def autocast_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype in which attention meets its inputs: autocast's, or their own."""
    device, dtype = states.device.type, states.dtype
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else dtype


def _at(states: torch.Tensor, place: slice) -> torch.Tensor:
    return states.narrow(2, place.start, _length(place))


@torch.compiler.disable(
    reason="a layer compiled by itself with fullgraph=True cannot run attention in blocks: compile the whole model, "
    "leave out fullgraph=True, or turn blocks off by `minillm.tuning.tuning.blocks_from = 2**62`"
)
def blocked_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockedMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention under a mask in blocks. An attention function of transformers' form.

    Args:
        query: [B, H, length, head_dim]; `key` and `value`: [B, key/value heads, length, head_dim].

    Returns:
        The output [B, length, H, head_dim], and None.

    Raises:
        ValueError: if the mask is of another length or number of rows.
    """
    shape = attention_mask.shape
    if not query.shape[2] == key.shape[2] == shape[2] or query.shape[0] != shape[0]:
        raise ValueError(
            f"`attention_mask` has shape {list(shape)}, queries have {list(query.shape)}, keys {list(key.shape)}"
        )
    # What autocast does for SDPA, which is not asked below.
    query, key, value = (states.to(autocast_dtype(states)) for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))

    def fit(scores: Scores) -> Scores:
        # The kernel adds float32 to scores of any dtype but float64, and a bias needs its digits.
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return Scores(*(part if part is None else part.to(query.device, dtype) for part in scores))

    if dropout == 0 and _has_flash(query, value):
        # The kernel reads the channels of a head one after another, whatever their stride says.
        query, key, value = (
            states if states.stride(-1) == 1 else states.contiguous() for states in (query, key, value)
        )
        return FlashInParts.apply(query, key, value, attention_mask, fit, scaling), None
    return _composed(query, key, value, attention_mask, fit, dropout, scaling), None


def _has_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel is there and SDPA would be free to take it; it knows one width of heads. Transforms of
    functions and compilers look into SDPA, and with other back ends chosen by `torch.nn.attention.sdpa_kernel` it can
    be differentiated twice."""
    is_eager = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    is_cpu, is_even = query.device.type == "cpu", query.shape[-1] == value.shape[-1]
    return is_eager and is_cpu and is_even and torch.backends.cuda.flash_sdp_enabled()


def _composed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockedMask,
    fit: Callable[[Scores], Scores],
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """The same by SDPA, block by block, each with its mask in one piece; computed anew in the backward pass if what
    SDPA keeps of all blocks would take the square of the length."""

    def attend(parts: list[Part], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        queries, keys = parts[0].block.queries, slice(parts[0].block.keys.start, parts[-1].block.keys.stop)
        return F.scaled_dot_product_attention(
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            attn_mask=_in_one_piece([(part.block, fit(mask.scores(part))) for part in parts], query),
            dropout_p=dropout,
            scale=scaling,
        )

    pairs = sum(_length(part.block.queries) * _length(part.block.keys) for parts in mask.blocks for part in parts)
    if torch.is_grad_enabled() and query.shape[0] * query.shape[1] * pairs > tuning.kept_elements:
        outputs = [checkpoint(attend, parts, query, key, value, use_reentrant=False) for parts in mask.blocks]
    else:
        outputs = [attend(parts, query, key, value) for parts in mask.blocks]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _in_one_piece(parts: list[tuple[Block, Scores]], query: torch.Tensor) -> torch.Tensor:
    """The mask of neighbouring parts in the dtype of the query, [B or 1, 1 or H, queries, keys]."""
    pieces = []
    for block, scores in parts:
        terms = [term for term in scores if term is not None] or [query.new_zeros(1, 1, 1, 1)]
        pieces.append(sum(terms[1:], terms[0]).expand(-1, -1, _length(block.queries), _length(block.keys)))
    if len(pieces) == 1:
        return pieces[0].to(query.dtype)
    leading = torch.broadcast_shapes(*(piece.shape[:2] for piece in pieces))
    return torch.cat([piece.expand(*leading, -1, -1) for piece in pieces], dim=-1).to(query.dtype)
