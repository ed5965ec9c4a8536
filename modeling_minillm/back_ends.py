"""What each attention back end gets: the function, the mask and the bias of a forward, chosen once for all layers.

Shapes: B batch, H heads, Q new tokens, K keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from minillm.attention import eager_attention_forward
from minillm.blocked_attention import BlockedMask, autocast_dtype, blocked_attention_forward
from minillm.cache import CACHE_NAME
from minillm.capabilities import BLOCKS, check, kind_of, refusal
from minillm.checks import GivenTokens, check_own_mask, require
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.folded_alibi import FoldedBias, fold_alibi, folded_attention_forward, is_foldable
from minillm.geometry import Geometry
from minillm.masks import blocked_mask, dense_mask, flex_mask, is_plain
from minillm.position_bias import PositionBias
from minillm.position_schemes import POSITION_BIASES
from minillm.token_facts import Tokens, positions_of_keys
from minillm.tuning import tuning


class AttentionInputs(NamedTuple):
    """What every layer's attention gets.

    Attributes:
        function: an attention function of transformers' form, `(module, query, key, value, attention_mask, dropout,
            scaling, **kwargs) -> (output, probabilities)`.
        attention_mask: boolean [B or 1, 1, Q, K], additive [B or 1, 1 or H, Q, K], a BlockMask, a BlockedMask, or None
            for plain causal attention.
        position_bias: the bias where it is not in the mask: in closed form for flex attention, or folded for SDPA.
    """

    function: Callable
    attention_mask: torch.Tensor | BlockMask | BlockedMask | None = None
    position_bias: PositionBias | FoldedBias | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments of a layer. Not every back end knows of a bias, so it is there only if there is one."""
        bias = {} if self.position_bias is None else {"position_bias": self.position_bias}
        return {"attention_function": self.function, "attention_mask": self.attention_mask, **bias}


class Call(NamedTuple):
    """A forward, as a back end sees it.

    Attributes:
        inputs_embeds: [B, Q, hidden], for their dtype and device.
        heads: those of this rank under tensor parallelism, None for all.
    """

    config: MiniLLMConfig
    geometry: Geometry
    tokens: Tokens
    given: GivenTokens
    inputs_embeds: torch.Tensor
    cache: Cache | None = None
    heads: slice | None = None

    @property
    def device(self) -> str:
        return self.inputs_embeds.device.type

    @property
    def has_bias(self) -> bool:
        return vars(self.config)["position_embedding_type"] in POSITION_BIASES

    def bias(self) -> PositionBias | None:
        """The bias of this rank's heads, if the config has one."""
        if not self.has_bias:
            return None
        scheme = POSITION_BIASES[self.config.position_embedding_type]
        keys = positions_of_keys(self.geometry, self.tokens)
        bias = scheme(self.config, self.tokens.position_ids, keys, self.inputs_embeds.dtype)
        return bias if self.heads is None else bias.of_heads(self.heads)


def attention_inputs(call: Call, paged: bool = False) -> AttentionInputs:
    """Chooses what the layers get under the config's back end; `paged` says that a paged cache keeps the texts of a
    row apart.

    Raises:
        ValueError: for a back end that cannot honour the variant, or cannot read the caller's own mask.
    """
    # Read once: a name costs transformers six function calls.
    implementation = call.config._attn_implementation or "sdpa"
    check_back_end(call, implementation, paged)
    # Under either name MiniLLM decides by itself what runs in blocks, and keeps documents apart.
    name = "sdpa" if implementation == BLOCKS else implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    own = call.given.own_mask
    if own is None:
        return BACK_ENDS[kind_of(implementation)](call, function)
    # A paged cache's own mask spans keys that only the cache knows.
    return AttentionInputs(function, own) if paged else with_own_mask(call, function, own)


def check_back_end(call: Call, implementation: str, paged: bool) -> None:
    """Refuses a variant, or documents, that the chosen back end cannot honour: at once where it is known, also while
    tracing; by an assertion of the device where positions tell of documents in a traced graph."""
    config, device, inputs_embeds = call.config, call.device, call.inputs_embeds
    if device == "meta":
        return
    kind, restarts = kind_of(implementation), call.tokens.restarts
    direction = "backward" if torch.is_grad_enabled() and inputs_embeds.requires_grad else "forward"
    # Engines keep the requests in a row apart by themselves, and so does transformers' flash attention where positions
    # restart, in a single row only.
    apart = paged or kind == "engine" or (kind == "flash" and call.geometry.batch == 1)
    by_positions = restarts is not None and not apart
    is_known = call.given.document_ids is not None or (by_positions and not is_tracing(inputs_embeds))
    check(config, implementation, device, direction, ("documents",) if is_known else ())
    if restarts is not None and not apart and not is_known:
        reason = refusal(config, implementation, device, direction, ("documents",))
        if reason is not None:
            require(~restarts, f"`position_ids` restart, as in packed documents: {reason}")


def for_eager(call: Call, function: Callable) -> AttentionInputs:
    """One dense mask, with the bias in it."""
    if not call.has_bias and is_plain(call.geometry, call.tokens) and not is_causal_square(call.geometry):
        return AttentionInputs(function)
    return AttentionInputs(function, dense(call))


def for_sdpa(call: Call, function: Callable) -> AttentionInputs:
    """Nothing for plain causal attention, else what spares its kernels the most: ALiBi folded, blocks on CPU, a dense
    mask with the bias in it. A function of somebody's own under the name gets one of the first and the last."""
    geometry, is_own = call.geometry, function is sdpa_attention_forward
    if is_own and folds(call):
        folded = fold_alibi(call.config, geometry.query_length, autocast_dtype(call.inputs_embeds), geometry.device)
        folded = folded if call.heads is None else folded.of_heads(call.heads)
        return AttentionInputs(folded_attention_forward, None, folded)
    is_open = not call.has_bias and is_plain(geometry, call.tokens)
    if is_own and runs_in_blocks(call, is_open):
        # Parts may be made anew in the backward pass, when the caller has filled the buffers for the next batch.
        call = call._replace(tokens=call.tokens.copy())
        return AttentionInputs(blocked_attention_forward, blocked_mask(geometry, call.tokens, call.bias()))
    if is_open:
        return AttentionInputs(function)
    mask = dense(call)
    return AttentionInputs(masked_sdpa if is_half(mask) else function, mask)


def for_flex(call: Call, function: Callable) -> AttentionInputs:
    """A BlockMask, and the bias in closed form."""
    return AttentionInputs(function, flex_mask(call.geometry, call.tokens), call.bias())


def for_others(call: Call, function: Callable) -> AttentionInputs:
    """Plain causal (or full) attention in the form that transformers has for a back end.

    Raises:
        ValueError: for what only a mask can tell, if none is registered: transformers would leave it out.
    """
    geometry, implementation = call.geometry, call.config._attn_implementation
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        advice = (
            f"attn_implementation={implementation!r} has no mask function: register one with AttentionMaskInterface, "
            "or use 'sdpa' or 'eager'"
        )
        if geometry.fixed_size or (geometry.query_length > 1 and not geometry.is_fresh):
            raise ValueError(f"a cache of fixed size, or several tokens behind cached ones, need a mask, and {advice}")
        if call.tokens.real is not None:
            require(call.tokens.real, f"`attention_mask` has padding, and {advice}")
    create = create_causal_mask if geometry.is_causal else create_bidirectional_mask
    keywords: dict[str, Any] = {CACHE_NAME: call.cache}
    mask = create(call.config, call.inputs_embeds, call.given.padding, **keywords)
    return AttentionInputs(function, mask)


BACK_ENDS = {
    "eager": for_eager,
    "sdpa": for_sdpa,
    "flex": for_flex,
    "flash": for_others,
    "engine": for_others,
    "other": for_others,
}
"""By kind, see `minillm.capabilities.kind_of`."""


def with_own_mask(call: Call, function: Callable, mask: torch.Tensor | BlockMask) -> AttentionInputs:
    """Takes a caller's own 4D mask, boolean or additive [B or 1, 1 or H, Q, K], or flex attention's own kind of mask,
    as the whole mask."""
    geometry, implementation = call.geometry, call.config._attn_implementation
    kind, dtype = kind_of(implementation), added_dtype(call)
    heads = call.config.num_attention_heads
    check_own_mask(mask, geometry.batch, heads, geometry.query_length, geometry.key_length)
    for name, fact in (("prefix_mask", call.tokens.blocks), ("document_ids", call.tokens.documents)):
        if fact is not None:
            raise ValueError(f"`{name}` and a 4D `attention_mask` both say who sees whom: give one of them")
    if isinstance(mask, BlockMask):
        if kind != "flex":
            raise ValueError("`attention_mask` is a BlockMask, which only attn_implementation='flex_attention' reads")
        return AttentionInputs(function, mask, call.bias())
    if kind not in ("eager", "sdpa", "flex"):
        raise ValueError(
            f"`attention_mask` is 4D, which attn_implementation={implementation!r} does not read: "
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
        return AttentionInputs(function, mask.to(dtype).expand(geometry.batch, -1, -1, -1), call.bias())
    if call.heads is not None and mask.shape[1] > 1:
        mask = mask[:, call.heads]
    bias = call.bias()
    mask = mask.to(dtype) if mask.is_floating_point() else mask
    mask = mask if bias is None else combine(mask, bias.dense(), dtype)
    return AttentionInputs(masked_sdpa if kind == "sdpa" and is_half(mask) else function, mask)


def is_causal_square(geometry: Geometry) -> bool:
    """Whether several queries each see another part of the keys, even where no token is special."""
    return geometry.query_length > 1 and geometry.is_causal


def runs_in_blocks(call: Call, is_open: bool) -> bool:
    """Whether attention pays off in blocks: on CPU, over fresh keys that are not few, and in no graph. Where no mask
    is needed but the causal one (`is_open`), SDPA has its own way with many tokens, and with full attention."""
    geometry = call.geometry
    if call.device != "cpu" or not geometry.is_square or is_tracing(call.inputs_embeds):
        return False
    longest = tuning.plain_blocks_up_to if is_causal_square(geometry) else 0
    return geometry.query_length > tuning.blocks_from and (not is_open or geometry.query_length <= longest)


def folds(call: Call) -> bool:
    """Whether ALiBi becomes channels of queries and keys: where the mask is plainly causal, that is as exact as a
    table of the bias, and all keys are fresh, so that the channels never meet a cache."""
    if call.device not in tuning.folding_devices or not is_foldable(call.config):
        return False
    longest = tuning.longest_fold.get(autocast_dtype(call.inputs_embeds), 0)
    is_plain_square = 1 < call.geometry.query_length <= longest and is_plain(call.geometry, call.tokens)
    return is_plain_square and has_default_positions(call.geometry, call.tokens)


def has_default_positions(geometry: Geometry, tokens: Tokens) -> bool:
    """Whether new tokens stand at 0, 1, 2, ... of an empty cache; given positions are looked at in eager mode."""
    if tokens.given_positions is None or not geometry.is_fresh:
        return geometry.is_fresh
    return not is_tracing(tokens.position_ids) and bool((tokens.position_ids == geometry.query_slots).all())


def dense(call: Call) -> torch.Tensor:
    """Mask and bias in one tensor: boolean [B or 1, 1, Q, K], or additive [B or 1, 1 or H, Q, K] with a bias."""
    bias = call.bias()
    if bias is None:
        return dense_mask(call.geometry, call.tokens)
    # A single token that sees every key needs no more than its bias.
    sees_all = call.geometry.query_length == 1 and is_plain(call.geometry, call.tokens)
    mask = None if sees_all else dense_mask(call.geometry, call.tokens)
    return combine(mask, bias.dense(), added_dtype(call))


def added_dtype(call: Call) -> torch.dtype:
    """The dtype of what is added to scores: float32, in which a bias is exact in a model of 16 bits too; that of the
    queries where SDPA's kernels of an accelerator take no other."""
    dtype = autocast_dtype(call.inputs_embeds)
    takes_float32 = call.device == "cpu" or kind_of(call.config._attn_implementation) == "eager"
    return torch.promote_types(dtype, torch.float32) if takes_float32 else dtype


def combine(mask: torch.Tensor | None, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One additive mask of mask and bias in `dtype`."""
    bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return mask.to(dtype) + bias


def is_half(mask: torch.Tensor) -> bool:
    """Whether a mask is additive in 16 bits."""
    return mask.is_floating_point() and mask.dtype.itemsize == 2


def masked_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA under an additive mask of 16 bits, in the dtype of the queries, which its kernels ask for: norms kept in
    float32 make wider queries than the embeddings were."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask.to(query.dtype), **kwargs)
