"""Every input of a forward: its dtype, its shape and the range of its values, checked here for all variants alike.

Shapes: B batch, H heads, Q new tokens, K keys. Shapes and dtypes are checked always, compiled or not. Values are
looked at on CPU; on CUDA, and in a graph that is being traced, the device asserts them, so that nobody waits for them.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils.import_utils import is_tracing

from minillm.capabilities import check, kind_of
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.prompts import document_starts, last_before, previous, running_max

ASSERTING_DEVICES = ("cpu", "cuda")
# They repeat `position_ids` or the cache's own length, or concern only the loss.
UNREAD_TENSORS = frozenset(
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx cache_position "
    "num_items_in_batch shift_labels".split()
)
FEW = 64
PER_TOKEN = ("position_ids", "prefix_mask", "document_ids", "block_position_ids")


class GivenTokens(NamedTuple):
    """What the caller says of the tokens; see `MiniLLMModel.forward`."""

    attention_mask: torch.Tensor | BlockMask | None = None
    position_ids: torch.Tensor | None = None
    prefix_mask: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    block_position_ids: torch.Tensor | None = None

    @property
    def padding(self) -> torch.Tensor | None:
        """The mask, where it is one of padding [B, slots]."""
        mask = self.attention_mask
        return None if mask is None or isinstance(mask, BlockMask) or len(mask.shape) != 2 else mask

    @property
    def own_mask(self) -> torch.Tensor | BlockMask | None:
        """The mask, where it says by itself who sees whom."""
        return None if self.padding is not None else self.attention_mask


def is_transformed() -> bool:
    """Whether a transform of functions, such as `torch.func.vmap`, is at work, in which no value may be looked at."""
    return torch._C._are_functorch_transforms_active()


def require(ok: torch.Tensor, message: str) -> None:
    """Raises ValueError(message) unless `ok` holds everywhere: at once on CPU; by an assertion of the device, a
    RuntimeError, on CUDA and in a traced graph; not at all within transforms of functions."""
    if is_tracing(ok) or ok.device.type == "cuda":
        if ok.device.type in ASSERTING_DEVICES and not is_transformed():
            torch._assert_async(ok.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif ok.device.type == "cpu" and not is_transformed() and not bool(ok.all()):
        raise ValueError(message)


def extremes(tensor: torch.Tensor) -> tuple[float, float] | None:
    """The least and the largest value where they may be looked at, which costs a step of decoding less than comparing
    each; None elsewhere."""
    if tensor.device.type != "cpu" or is_tracing(tensor) or is_transformed():
        return None
    if tensor.numel() <= FEW and not tensor.is_floating_point():
        # A step of decoding has few, of which Python is told at once.
        values = tensor.flatten().tolist()
        return min(values), max(values)
    least, largest = tensor.aminmax()
    return least.item(), largest.item()


def require_tensor(name: str, value: Any) -> torch.Tensor:
    """Returns `value`, or raises ValueError."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is a {type(value).__name__}; expected a tensor")
    return value


def require_integers(name: str, tensor: torch.Tensor, allow_bool: bool = False) -> None:
    """Raises ValueError unless `tensor` is one of integers, or of booleans where those mean something."""
    require_tensor(name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not allow_bool):
        expected = "bool or an integer type" if allow_bool else "an integer type"
        raise ValueError(f"`{name}` has dtype {tensor.dtype}; expected {expected}")


def is_one_of(size: int, sizes: tuple[int, ...]) -> bool:
    """`size in sizes`, which Dynamo (torch 2.13) answers by identity for a symbol and a number."""
    return any(size == each for each in sizes)


def require_shape(name: str, tensor: torch.Tensor, batch: int, lengths: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless `tensor` is [batch or 1, one of the lengths]."""
    if tensor.ndim != 2 or not (is_one_of(tensor.shape[0], (1, batch)) and is_one_of(tensor.shape[1], lengths)):
        allowed = " or ".join(f"[{batch}, {length}]" for length in dict.fromkeys(lengths))
        raise ValueError(f"`{name}` has shape {list(tensor.shape)}; expected {allowed} ({meaning})")


def check_tokens(
    config: MiniLLMConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    given: GivenTokens | None = None,
) -> torch.Tensor:
    """Checks `input_ids` [B, Q] or `inputs_embeds` [B, Q, hidden], and the kind of what else was `given` about each
    token; returns the one of both that there is."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
    if input_ids is not None:
        name, expected = "input_ids", "[batch, tokens]"
        tokens = require_tensor(name, input_ids)
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`{name}` has dtype {tokens.dtype}; expected int64 or int32")
        right = tokens.ndim == 2
    else:
        name, expected = "inputs_embeds", f"[batch, tokens, {config.hidden_size}]"
        tokens = require_tensor(name, inputs_embeds)
        if not tokens.is_floating_point():
            raise ValueError(f"`{name}` has dtype {tokens.dtype}; expected a floating-point type")
        right = tokens.ndim == 3 and tokens.shape[-1] == config.hidden_size
    if not right or 0 in tokens.shape:
        raise ValueError(f"`{name}` has shape {list(tokens.shape)}; expected {expected}, none of them 0")
    for name in PER_TOKEN if given is not None else ():
        tensor = getattr(given, name)
        if tensor is not None:
            require_integers(name, tensor, allow_bool=name == "prefix_mask")
    return tokens


def check_attention_mask(mask: torch.Tensor | BlockMask | None) -> None:
    """The kind of an `attention_mask`: 2D, one's own 4D mask, or a BlockMask."""
    if mask is None or isinstance(mask, BlockMask):
        return
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`attention_mask` is a {type(mask).__name__}; expected a tensor or a BlockMask")
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"`attention_mask` has shape {list(mask.shape)}; expected 2D [batch, cached and new tokens] or 4D "
            "[batch, 1 or heads, new tokens, keys]"
        )
    if mask.is_complex():
        raise ValueError(
            f"`attention_mask` has dtype {mask.dtype}; expected bool, an integer or a floating-point type"
        )
    if mask.ndim == 4 and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"`attention_mask` is 4D and has dtype {mask.dtype}; expected bool (True: visible) or a floating-point "
            "type (added to the scores)"
        )


def read_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """A 2D `attention_mask`, 1 at real tokens and 0 at padding, as booleans; None where all tokens are known to be
    real."""
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        # torch compares few unsigned types.
        mask = mask.long()
    ends = extremes(mask)
    if ends == (1, 1):
        return None
    known = ends is not None and not mask.is_floating_point() and ends[0] >= 0 and ends[1] <= 1
    if mask.dtype != torch.bool and not known:
        require(
            (mask == 0) | (mask == 1),
            "`attention_mask` holds other values than 0 (padding) and 1 (a real token); numbers of packed documents "
            "go into `document_ids`",
        )
    real = mask.to(torch.bool)
    unknown = ends is None and not (is_tracing(mask) or is_transformed())
    if unknown and mask.device.type != "meta" and bool(real.all()):
        # An accelerator is asked: without a mask it runs kernels that are worth it.
        return None
    return real


def check_own_mask(mask: torch.Tensor | BlockMask, batch: int, heads: int, queries: int, keys: int) -> None:
    """The shape of a caller's own mask, [B or 1, 1 or H, Q, K]."""
    shape = tuple(mask.shape)
    right = len(shape) == 4 and is_one_of(shape[0], (1, batch)) and is_one_of(shape[1], (1, heads))
    if not (right and shape[2] == queries and shape[3] == keys):
        raise ValueError(
            f"`attention_mask` has shape {list(shape)}; expected 2D [batch, cached and new tokens] or 4D "
            f"[1 or {batch}, 1 or {heads}, {queries}, {keys}] (batch, heads, new tokens, keys)"
        )


def check_window(real: torch.Tensor) -> None:
    """Refuses padding between real tokens [B, slots]: a window counts slots, in which such padding would count too."""
    starts = real.long() * (1 - previous(real.long(), 0))
    require(
        starts.sum(-1) <= 1,
        "`attention_mask` has padding between real tokens, which a `sliding_window` would count: pad on one side "
        "only, run each row by itself, or use a model with `sliding_window=None`",
    )


def check_documents(
    documents: torch.Tensor, running: torch.Tensor, real: torch.Tensor | None, cached: int | torch.Tensor
) -> None:
    """Documents [B or 1, Q] must not decrease over real tokens (all of them if `real` is None), so that they equal
    their `running` maximum there; and none may follow upon `cached` tokens."""
    if isinstance(cached, torch.Tensor):
        require(cached == 0, "`document_ids` were given with a cache that already holds tokens")
    elif cached > 0:
        raise ValueError(
            f"`document_ids` were given with a cache that holds {cached} tokens: documents are packed in one forward; "
            "continue each document from a cache of its own"
        )
    ok, where = (documents == running), "inside a row"
    if real is not None:
        ok, where = ok | ~real, "over the real tokens of a row"
    require(ok, f"`document_ids` decrease {where}; they must be non-decreasing")


def check_has_prefix(config: MiniLLMConfig) -> None:
    """Refuses a `prefix_mask` where the config has no prefix."""
    if config.attention_type != "prefix":
        raise ValueError(
            f"`prefix_mask` was given, but `attention_type={config.attention_type!r}`: only a model with "
            "`attention_type='prefix'` has a bidirectional prefix"
        )


def check_prompts(blocks: torch.Tensor, real: torch.Tensor | None, documents: torch.Tensor | None) -> None:
    """The numbers of a `prefix_mask` [B, Q]: over the real tokens of each document (numbers [B or 1, Q], None for a
    single one) they rise from prompt to prompt, and none comes back."""
    require(blocks >= 0, "`prefix_mask` holds a negative value; it is k on the k-th prompt and 0 outside")
    real = torch.ones_like(blocks, dtype=torch.bool) if real is None else real
    before, is_first = last_before(real)
    number = torch.zeros_like(blocks)
    if documents is not None:
        documents = documents.expand_as(blocks)
        is_first = is_first | (documents.gather(1, before) != documents)
        number = document_starts(documents).long().cumsum(-1)
    # One key that rises over the documents of a row, and over the prompts of each.
    key = torch.where(real, number * (blocks.max() + 1) + blocks, -1)
    seen = previous(running_max(key), -1)
    goes_on = ~is_first & (blocks.gather(1, before) == blocks)
    require(
        (blocks == 0) | ~real | goes_on | (key > seen),
        "`prefix_mask` comes back to a prompt that had ended: over the real tokens of a document it is 1 on the first "
        "prompt, 2 on the second, and so on, and 0 outside; `minillm.number_prompts` numbers them so",
    )


def check_positions(
    name: str, positions: torch.Tensor, real: torch.Tensor | None, table_size: int | None = None
) -> None:
    """Positions [B or 1, Q] of real tokens (all of them if `real` is None): from 0 on, and within a learned table."""
    ends = extremes(positions)
    if ends and ends[0] >= 0 and (table_size is None or ends[1] < table_size):
        return
    padding = False if real is None else ~real
    if table_size is None:
        require((positions >= 0) | padding, f"`{name}` hold a negative position; they count from 0")
        return
    require(
        ((positions >= 0) & (positions < table_size)) | padding,
        f"`{name}` reach beyond the table of learned positions (`position_table_size={table_size}`): "
        "shorten the input or use a position scheme without a table",
    )


def read_labels(
    name: str, labels: torch.Tensor, shape: torch.Size, classes: int, ignore_index: int = -100
) -> torch.Tensor:
    """Labels of the given shape, `ignore_index` or from 0 on and below `classes`, as int64."""
    require_integers(name, labels)
    if labels.shape != shape:
        raise ValueError(f"`{name}` has shape {list(labels.shape)}; expected {list(shape)}")
    labels = labels.long()
    require(
        ((labels >= 0) & (labels < classes)) | (labels == ignore_index),
        f"`{name}` hold values other than {ignore_index} (not scored) and 0 to {classes - 1}",
    )
    return labels


def read_text_labels(labels: torch.Tensor, batch: int, classes: int, problem_type: str | None) -> torch.Tensor:
    """Labels of sequence classification: a class [B], values [B] or [B, classes] for regression, or 0 and 1 in a
    floating-point type [B, classes] for several labels a text; without a `problem_type`, as transformers tells it."""
    require_tensor("labels", labels)
    if problem_type is None:
        is_class = classes > 1 and not labels.is_floating_point()
        kinds = "regression", "single_label_classification", "multi_label_classification"
        problem_type = kinds[0] if classes == 1 else kinds[1] if is_class else kinds[2]
    if problem_type == "single_label_classification":
        return read_labels("labels", labels.flatten(), torch.Size([batch]), classes)
    shapes = [(batch, classes), *([(batch,)] if classes == 1 else [])]
    if not any(labels.shape == torch.Size(shape) for shape in shapes):
        expected = " or ".join(str(list(shape)) for shape in reversed(shapes))
        raise ValueError(f"`labels` has shape {list(labels.shape)}; expected {expected} for {problem_type}")
    return labels if labels.is_floating_point() else labels.float()


def read_answer_spans(
    start_positions: torch.Tensor | None, end_positions: torch.Tensor | None, batch: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Token indices [B] or [B, 1] of where answers start and end, as int64 [B]; one beyond the text says that there is
    none."""
    if (start_positions is None) != (end_positions is None):
        raise ValueError("give both of `start_positions` and `end_positions`, or neither")
    if start_positions is None or end_positions is None:
        return None, None
    spans = []
    for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
        require_integers(name, positions)
        if positions.shape != (batch,) and positions.shape != (batch, 1):
            raise ValueError(f"`{name}` has shape {list(positions.shape)}; expected [{batch}]")
        require(positions.long() >= 0, f"`{name}` hold a negative index; no answer is one beyond the last token")
        spans.append(positions.long().flatten())
    return spans[0], spans[1]


def check_logits_to_keep(wanted: int | torch.Tensor, batch: int, tokens: int) -> None:
    """How many of the last positions to keep, which of them [n] or [B, n], or a boolean mask [B, Q] or [Q]."""
    if not isinstance(wanted, torch.Tensor):
        if isinstance(wanted, bool) or not isinstance(wanted, int):
            raise ValueError(f"`logits_to_keep` is a {type(wanted).__name__}; expected an int or a tensor")
        if wanted < 0:
            raise ValueError(f"`logits_to_keep={wanted}` is negative; it counts the last positions, 0 for all")
        return
    require_integers("logits_to_keep", wanted, allow_bool=True)
    shape = tuple(wanted.shape)
    if wanted.dtype == torch.bool and shape != (batch, tokens) and shape != (tokens,):
        raise ValueError(
            f"`logits_to_keep` is a mask of shape {list(shape)}; expected {[batch, tokens]} or {[tokens]}"
        )
    if wanted.dtype != torch.bool:
        if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == batch)):
            raise ValueError(f"`logits_to_keep` has shape {list(shape)}; expected [n] or [{batch}, n] positions")
        lowest = -tokens if len(shape) == 1 else 0
        inside = (wanted.long() >= lowest) & (wanted.long() < tokens)
        require(inside, f"`logits_to_keep` holds positions outside of {lowest} to {tokens - 1}")


def check_cache(cache: Cache | None) -> None:
    """A decoder's own key/value cache."""
    if cache is not None and (not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache)):
        raise ValueError(
            f"the key/value cache is a {type(cache).__name__}; expected a `Cache` of a decoder, such as DynamicCache "
            "or StaticCache"
        )


def check_call(config: MiniLLMConfig, kwargs: dict[str, Any], cache: Cache | None, paged: bool) -> None:
    """Refuses what this variant, or the chosen back end, would silently ignore."""
    if paged:
        check(config, "paged")
    else:
        for key, value in kwargs.items():
            if isinstance(value, torch.Tensor) and key not in UNREAD_TENSORS:
                raise ValueError(
                    f"`{key}` is a tensor that this model does not read; leave it out (it reads attention_mask, "
                    "position_ids, prefix_mask, document_ids and block_position_ids)"
                )
    fields = vars(config)
    is_causal = fields["attention_type"] != "bidirectional"
    # A paged cache brings a mask, and tells SDPA to make no causal one.
    if not paged and kwargs.get("is_causal", is_causal) != is_causal:
        raise ValueError(
            f"`is_causal={kwargs['is_causal']}` with `attention_type={config.attention_type!r}`: who sees "
            "whom is a matter of the config; set `attention_type`"
        )
    softcap = kwargs.get("softcap")
    if softcap is not None and kind_of(config._attn_implementation) in ("eager", "sdpa"):
        raise ValueError(
            f"`softcap={softcap}` with attn_implementation={config._attn_implementation!r}, which does not read it: "
            "leave it out or use 'flex_attention'"
        )
    wants_attentions = kwargs.get("output_attentions", config.output_attentions)
    if wants_attentions and config._attn_implementation != "eager":
        raise ValueError(
            f"`output_attentions=True` with attn_implementation={config._attn_implementation!r}, which returns no "
            "probabilities: load the model with attn_implementation='eager'"
        )
    if kwargs.get("output_router_logits", fields["output_router_logits"]) and fields["mlp_type"] != "moe":
        raise ValueError(
            f"`output_router_logits=True` with `mlp_type={config.mlp_type!r}`, which has no router: "
            "leave it out or set `mlp_type='moe'`"
        )
    if cache is not None and fields["attention_type"] == "bidirectional":
        raise ValueError(
            "`cache` with `attention_type='bidirectional'`: cached tokens would have to see later ones; "
            "call the model without a cache"
        )
