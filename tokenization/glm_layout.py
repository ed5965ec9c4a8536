"""GLM's inputs from texts: contexts with blanks, the spans that fill them, and where each token stands on both axes.

In the paper's words (arXiv 2103.10360, section 2.1) the context with its blanks is Part A and the spans are Part B,
each span behind a start token. Tokenizer and model share this file: plain lists of integers, one layout for training,
generation and scoring. It imports the standard library and transformers only, since it travels with a checkpoint.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import BatchEncoding

IGNORE_INDEX = -100
BLANK_NAMES = ("mask_token_id", "gmask_token_id", "smask_token_id")


class GLMTokens(NamedTuple):
    """Ids of GLM's tokens: of the blanks, of `[gMASK]` among them, of a span's start and end, and of padding."""

    blanks: tuple[int, ...]
    gmask: int | None
    sop: int
    eop: int | None
    pad: int


class GLMContext(NamedTuple):
    """Token ids of a text, and the indices of its blanks from left to right."""

    input_ids: list[int]
    blanks: list[int]


class GLMRow(NamedTuple):
    """A context and its spans: lists of one length, but for `labels`, which has an entry more.

    A span's end token is no input but a label, in the slot after the span's last token: position t - 1 predicts
    `labels[t]`.
    """

    input_ids: list[int]
    position_ids: list[int]
    block_position_ids: list[int]
    prefix_mask: list[int]
    labels: list[int]


def find_glm_tokens(tokenizer: Any, config: Any = None) -> GLMTokens:
    """The ids that the tokenizer names, and beyond those the ones that the config of a model names.

    A tokenizer without `eop_token` ends spans as it ends texts (ChatGLM-6B).

    Raises:
        ValueError: neither names a blank, or the start token.
    """

    def named(name: str) -> int | None:
        found = getattr(tokenizer, name, None)
        found = getattr(config, name, None) if found is None else found
        return found[0] if isinstance(found, list) else found

    blanks = tuple(token_id for token_id in map(named, BLANK_NAMES) if token_id is not None)
    sop = named("sop_token_id")
    if not blanks or sop is None:
        what = "`sop_token_id`" if blanks else "a blank (`mask_token_id`, ...)"
        raise ValueError(f"neither the tokenizer nor the config names {what}: set it on one of them")
    eop = next((found for found in map(named, ("eop_token_id", "eos_token_id")) if found is not None), None)
    pad = next((found for found in (named("pad_token_id"), eop) if found is not None), 0)
    return GLMTokens(blanks, named("gmask_token_id"), sop, eop, pad)


def read_contexts(tokenizer: Any, texts: str | Sequence[str], tokens: GLMTokens) -> list[GLMContext]:
    """Encodes texts, each of which has a blank.

    Raises:
        ValueError: no text, or one without a blank.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("no text was given")
    contexts = []
    for number, ids in enumerate(tokenizer(texts)["input_ids"]):
        blanks = [index for index, token_id in enumerate(ids) if token_id in tokens.blanks]
        if not blanks:
            names = ", ".join(tokenizer.convert_ids_to_tokens(list(tokens.blanks)))
            raise ValueError(f"text {number} holds no blank ({names}): {texts[number]!r:.80}")
        contexts.append(GLMContext(ids, blanks))
    return contexts


def encode_spans(tokenizer: Any, spans: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts of spans, without the tokens that open or close a whole text."""
    return tokenizer(list(spans), add_special_tokens=False)["input_ids"] if spans else []


def pair_spans(
    tokenizer: Any, contexts: Sequence[GLMContext], fills: Sequence[str | Sequence[str]]
) -> list[list[tuple[int, list[int]]]]:
    """For each text the index of each blank with the token ids of what fills it.

    Raises:
        ValueError: there are not as many fills as blanks.
    """
    fills = [[fill] if isinstance(fill, str) else list(fill) for fill in fills]
    if len(fills) != len(contexts):
        raise ValueError(f"`fills` holds those of {len(fills)} texts; {len(contexts)} texts were given")
    for number, (context, own) in enumerate(zip(contexts, fills, strict=True)):
        if len(own) != len(context.blanks):
            raise ValueError(f"text {number} has {len(context.blanks)} blanks, but {len(own)} fills")
    encoded = iter(encode_spans(tokenizer, [fill for own in fills for fill in own]))
    return [[(blank, next(encoded)) for blank in context.blanks] for context in contexts]


def lay_out_row(
    context: Sequence[int],
    spans: Sequence[tuple[int, Sequence[int]]],
    sop_token_id: int,
    end_label: int | None = None,
    counting_token_ids: Sequence[int | None] = (),
) -> GLMRow:
    """One row: the context, then each span behind a start token.

    On the first axis the context counts, and a span stands where its blank is. The second axis is 0 in the context and
    1, 2, ... from each start token on. The context is the bidirectional prefix.

    Args:
        context: token ids.
        spans: (index of the blank in the context, token ids of what fills it), in the order of Part B. One without
            tokens, the last, is a span that is still to be generated.
        sop_token_id: id of the start token.
        end_label: the label that ends each span; None leaves it out of the loss.
        counting_token_ids: blanks whose spans count on from the end of the context on the first axis (`[gMASK]` of
            models that have one axis only, as in GLM-130B).
    """
    length, end = len(context), IGNORE_INDEX if end_label is None else end_label
    input_ids, first, second, labels = list(context), list(range(length)), [0] * length, [IGNORE_INDEX] * length
    before = IGNORE_INDEX
    for blank, span in spans:
        count = len(span) + 1
        counts = context[blank] in counting_token_ids
        input_ids += [sop_token_id, *span]
        first += range(length, length + count) if counts else [blank] * count
        second += range(1, count + 1)
        labels += [before, *span]
        before = end
    labels.append(before)
    return GLMRow(input_ids, first, second, [1] * length + [0] * (len(input_ids) - length), labels)


def pad_rows(
    rows: Sequence[GLMRow], pad_token_id: int, left: bool, labels: bool, length: int | None = None
) -> dict[str, list[list[int]]]:
    """Rows of one length as the inputs of a model.

    Args:
        rows: what to pad.
        pad_token_id: id at padding.
        left: pad on the left rather than on the right.
        labels: return labels; each row then ends in at least one slot of padding, for its last label.
        length: of the padded rows; None takes the shortest that fits all.
    """
    needed = max(len(row.input_ids) for row in rows) + labels
    length = needed if length is None else length
    batch: dict[str, list[list[int]]] = {}
    fillings = {"input_ids": pad_token_id, "position_ids": 0, "block_position_ids": 0, "prefix_mask": 0}
    sizes = [len(row.input_ids) for row in rows]
    before = [length - labels - size if left else 0 for size in sizes]
    after = [length - size - start for size, start in zip(sizes, before, strict=True)]
    pads = list(zip(rows, before, after, strict=True))
    for name, value in fillings.items():
        batch[name] = [[value] * start + getattr(row, name) + [value] * stop for row, start, stop in pads]
    batch["attention_mask"] = [[0] * start + [1] * len(row.input_ids) + [0] * stop for row, start, stop in pads]
    if labels:
        ignored = [IGNORE_INDEX]
        batch["labels"] = [ignored * start + row.labels + ignored * (stop - 1) for row, start, stop in pads]
    return batch


def require_length(rows: Sequence[GLMRow], labels: bool, padding: bool | str, max_length: int | None) -> None:
    """Refuses rows longer than `max_length`, or padding to a length that is not given."""
    if padding == "max_length" and max_length is None:
        raise ValueError("`padding='max_length'` needs `max_length`")
    lengths = [len(row.input_ids) + labels for row in rows]
    if max_length is not None and max(lengths) > max_length:
        raise ValueError(
            f"text {lengths.index(max(lengths))} takes {max(lengths)} tokens; `max_length` is {max_length}, and "
            "nothing is cut off: shorten it"
        )


class GLMInputsMixin:
    """Gives a tokenizer `build_glm_inputs`."""

    def build_glm_inputs(
        self,
        texts: str | Sequence[str],
        fills: Sequence[str | Sequence[str]] | None = None,
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        gmask_counts: bool = False,
    ) -> BatchEncoding:
        """GLM's inputs of texts with blanks (`[MASK]`, `[sMASK]`, `[gMASK]`), for `forward` and `generate()`.

        Args:
            texts: a text or several, each with at least one blank.
            fills: what fills the blanks, to train on: for each text a string for its one blank, or a list of strings,
                one for each of its blanks from left to right, which is also the order of Part B. Left out, a row ends
                in the start token of the first blank, ready for `generate()`.
            padding: True: to the longest row; "max_length": to `max_length`; False: none.
            max_length: most tokens in a row. Nothing is cut off: a longer row raises.
            padding_side: "left" or "right"; left out: left without `fills`, as generation wants it, else right.
            return_tensors: "pt" for torch tensors, "np" for arrays; left out: lists.
            gmask_counts: the first axis counts on after `[gMASK]`, as in models with one position axis (GLM-130B).

        Returns:
            `input_ids`, `position_ids`, `block_position_ids`, `prefix_mask` and `attention_mask`, integers
            [texts, length]; with `fills` also `labels`: -100 in the context and at the first start token, then the
            tokens of each span and the token that ends it, in the slot after its last one. A row has one such slot
            beyond its tokens, which is padding.

        Raises:
            ValueError: a text without a blank, fills that do not match the blanks, a row longer than `max_length`, or
                a token that this tokenizer does not have.
        """
        tokens = find_glm_tokens(self)
        contexts = read_contexts(self, texts, tokens)
        with_labels = fills is not None
        if with_labels and tokens.eop is None:
            raise ValueError("the tokenizer has neither `eop_token` nor `eos_token` to end a span with: set one")
        if fills is not None:
            every: Sequence[Any] = [fills] if isinstance(texts, str) else fills
            spans = pair_spans(self, contexts, every)
        else:
            spans = [[(context.blanks[0], [])] for context in contexts]
        counting = (tokens.gmask,) if gmask_counts else ()
        rows = [
            lay_out_row(context.input_ids, pairs, tokens.sop, tokens.eop, counting)
            for context, pairs in zip(contexts, spans, strict=True)
        ]
        require_length(rows, with_labels, padding, max_length)
        left = (padding_side or ("right" if with_labels else "left")) == "left"
        length = max_length if padding == "max_length" else None
        groups = [rows] if padding else [[row] for row in rows]
        padded = [pad_rows(group, tokens.pad, left, with_labels, length) for group in groups]
        batch = {name: [row for part in padded for row in part[name]] for name in padded[0]}
        return BatchEncoding(batch, tensor_type=return_tensors)
