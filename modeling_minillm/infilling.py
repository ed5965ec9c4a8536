"""Blanks (arXiv 2103.10360): which tokens are context, where each stands on the two position axes, filling blanks, and
scoring what could fill them."""

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.position_schemes import POSITION_TABLES
from minillm.tokenization.glm_layout import (
    IGNORE_INDEX,
    GLMContext,
    GLMRow,
    GLMTokens,
    encode_spans,
    find_glm_tokens,
    lay_out_row,
    pad_rows,
    read_contexts,
)

DEFAULT_NEW_TOKENS = 64


def has_two_axes(config: MiniLLMConfig) -> bool:
    """Whether what fills a blank is counted on an axis of its own."""
    return config.position_embedding_type == "glm_2d" or config.rope_2d


class GLMInputs(NamedTuple):
    """Inputs of `forward` and `generate()`, all int64 [batch, length]; unpack them with `**inputs._asdict()`."""

    position_ids: torch.Tensor
    block_position_ids: torch.Tensor
    prefix_mask: torch.Tensor


def glm_inputs(
    input_ids: torch.Tensor,
    mask_token_ids: Sequence[int],
    sop_token_id: int,
    attention_mask: torch.Tensor | None = None,
    counting_token_ids: Sequence[int | None] = (),
) -> GLMInputs:
    """The prefix and both position axes of a context with a blank, a start token, and what fills the blank.

    The context, all before the first start token, is the bidirectional prefix. Real tokens stand where `lay_out_row`
    puts them, which padding does not change: on the first axis the context counts, and what follows stands where the
    blank is; the second axis is 0 in the context and counts 1, 2, ... from the start token on.

    Args:
        input_ids: [batch, length]; every row has a blank in its context, then a start token.
        mask_token_ids: ids that mark a blank, e.g. of `[gMASK]` and `[MASK]`. Of several in a row the one named first
            here is filled, at its first place.
        sop_token_id: id of the start token.
        attention_mask: [batch, length], 0 at padding, on the left or between a context and its start token.
        counting_token_ids: blanks after which the first axis goes on counting (`[gMASK]` in GLM-130B and in
            ChatGLM-6B's first release).

    Raises:
        ValueError: a row without start token, or without a blank before it.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    index = (torch.arange(input_ids.shape[1]) - real.long().argmax(-1, keepdim=True).cpu()).clamp(min=0)
    found = GLMInputs(index, torch.zeros_like(index), torch.zeros_like(index))
    for number, (ids, kept) in enumerate(zip(input_ids.cpu(), real.cpu(), strict=True)):
        row = _read_row(number, ids[kept].tolist(), mask_token_ids, sop_token_id, counting_token_ids)
        for name, values in found._asdict().items():
            values[number, kept] = torch.tensor(getattr(row, name))
    return GLMInputs(*(values.to(input_ids.device) for values in found))


def _read_row(
    number: int,
    ids: list[int],
    mask_token_ids: Sequence[int],
    sop_token_id: int,
    counting_token_ids: Sequence[int | None],
) -> GLMRow:
    if sop_token_id not in ids:
        raise ValueError(f"`input_ids` row {number} holds no start token (`sop_token_id={sop_token_id}`)")
    start = ids.index(sop_token_id)
    context, span = ids[:start], ids[start + 1 :]
    blank = next((context.index(token_id) for token_id in mask_token_ids if token_id in context), None)
    if blank is None:
        raise ValueError(
            f"`input_ids` row {number} has no blank (`mask_token_ids={list(mask_token_ids)}`) before its start token"
        )
    return lay_out_row(context, [(blank, span)], sop_token_id, counting_token_ids=counting_token_ids)


def continue_positions(
    position_ids: torch.Tensor,
    block_position_ids: torch.Tensor,
    total: int,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both axes [batch, prompt] of a prompt, gone on to `total` tokens: the first as its last two tokens do (standing
    still or counting), the second by counting where it has begun.

    After a lone start token the first axis counts if the token stands beyond the context: what comes before it may
    belong to another span. `attention_mask` [batch, prompt or more] tells padding, which is no context; one of another
    number of axes is not read.
    """
    more = torch.arange(1, total - position_ids.shape[1] + 1, device=position_ids.device)
    last, begun = position_ids[:, -1:], (block_position_ids[:, -1:] > 0).long()
    step = last - position_ids[:, -2:-1] == 1 if position_ids.shape[1] > 1 else torch.ones_like(begun)
    context = block_position_ids == 0
    if attention_mask is not None and attention_mask.ndim == 2:
        context = context & (attention_mask[:, : context.shape[1]] != 0)
    beyond = last > torch.where(context, position_ids, -1).amax(-1, keepdim=True)
    step = torch.where(block_position_ids[:, -1:] == 1, beyond, step).long()
    first = torch.cat((position_ids, last + more * step), dim=-1)
    return first, torch.cat((block_position_ids, block_position_ids[:, -1:] + more * begun), dim=-1)


class Filling(NamedTuple):
    """What `fill` returns: the filled texts; for each text what fills its blanks, from left to right; and the token
    ids of that, without the token that ended it."""

    texts: list[str]
    fills: list[list[str]]
    fill_ids: list[list[list[int]]]


def read_orders(order: Sequence[Any] | None, contexts: Sequence[GLMContext]) -> list[list[int]]:
    """The order in which the blanks of each text are filled: from left to right, or as `fill` is told."""
    counts = [len(context.blanks) for context in contexts]
    if order is None:
        return [list(range(count)) for count in counts]
    one_for_all = all(isinstance(index, int) for index in order)
    orders = [list(order)] * len(counts) if one_for_all else [list(own) for own in order]
    if len(orders) != len(counts):
        raise ValueError(f"`order` holds those of {len(orders)} texts; {len(counts)} texts were given")
    for number, (own, count) in enumerate(zip(orders, counts, strict=True)):
        if sorted(own) != list(range(count)):
            raise ValueError(f"`order` {own} of text {number} is no order of its {count} blanks, 0 to {count - 1}")
    return orders


def read_candidates(candidates: Sequence[Any], texts: int) -> list[list[str]]:
    """The candidates of each text: the same for all, or a list for each."""
    shared = all(isinstance(candidate, str) for candidate in candidates)
    lists = [list(candidates)] * texts if shared else [list(own) for own in candidates]
    if isinstance(candidates, str) or any(isinstance(own, str) for own in candidates) != shared:
        raise ValueError("`candidates` must be a list of strings, or such a list for each text")
    if len(lists) != texts:
        raise ValueError(f"`candidates` holds those of {len(lists)} texts; {texts} texts were given")
    if not all(lists):
        raise ValueError(f"text {[bool(own) for own in lists].index(False)} has no candidates")
    return lists


def split_at_blanks(
    tokenizer: Any, texts: Sequence[str], contexts: Sequence[GLMContext], tokens: GLMTokens
) -> list[list[str]]:
    """What stands before, between and behind the blanks of each text, exactly as it is written."""
    names = tokenizer.convert_ids_to_tokens(list(tokens.blanks))
    blank = re.compile("|".join(map(re.escape, names)))
    pieces = [blank.split(text) for text in texts]
    for text, own, context in zip(texts, pieces, contexts, strict=True):
        if len(own) != len(context.blanks) + 1:
            raise ValueError(
                f"the tokenizer reads {len(context.blanks)} blanks in {text!r:.80}, which writes {len(own) - 1}"
            )
    return pieces


def require_room(config: MiniLLMConfig, number: int, row: GLMRow, new_tokens: int = 0) -> None:
    """Refuses a text whose row, with so many more tokens, would need positions beyond a learned table."""
    more = max(0, new_tokens - 1)
    counts = row.position_ids[-1] >= sum(row.prefix_mask)
    needed = {
        "position_ids": max(*row.position_ids, row.position_ids[-1] + more * counts),
        "block_position_ids": max(*row.block_position_ids, row.block_position_ids[-1] + more),
    }
    tables, size = POSITION_TABLES.get(config.position_embedding_type, ()), vars(config)["position_table_size"]
    for name in list(needed)[: len(tables)]:
        if needed[name] >= size:
            raise ValueError(
                f"text {number} needs `{name}` up to {needed[name]}, beyond the table of learned positions "
                f"(`position_table_size={size}`): shorten it, or ask for fewer tokens"
            )


def open_row(
    context: GLMContext, done: dict[int, list[int]], blank: int, tokens: GLMTokens, counting: Sequence[int | None]
) -> GLMRow:
    """A context, the spans that are filled by the index of their blank, and the start token of the next."""
    return lay_out_row(context.input_ids, [*done.items(), (blank, [])], tokens.sop, None, counting)


def candidate_rows(
    contexts: Sequence[GLMContext],
    candidates: Sequence[Sequence[list[int]]],
    sop_token_id: int,
    end_label: int | None,
    counting: Sequence[int | None],
) -> list[tuple[int, GLMRow]]:
    """The number of its text and a row for each candidate (token ids) of each text, in their order.

    Raises:
        ValueError: a text with several blanks, or a candidate of which there is nothing to score.
    """
    rows = []
    for number, (context, own) in enumerate(zip(contexts, candidates, strict=True)):
        if len(context.blanks) > 1:
            raise ValueError(f"text {number} has {len(context.blanks)} blanks; candidates are scored in one")
        for span in own:
            if not span and end_label is None:
                raise ValueError(f"text {number} has an empty candidate, of which only the end could be scored")
            spans = [(context.blanks[0], span)]
            rows.append((number, lay_out_row(context.input_ids, spans, sop_token_id, end_label, counting)))
    return rows


class MiniLLMInfillingMixin(PreTrainedModel, GenerationMixin):
    """Filling the blanks of texts, and scoring what could fill them, with a model of `attention_type="prefix"`."""

    config: MiniLLMConfig

    def fill(
        self,
        texts: str | Sequence[str],
        tokenizer: Any,
        order: Sequence[Any] | None = None,
        gmask_counts: bool | None = None,
        **options: Any,
    ) -> Filling:
        """Fills the blanks (`[MASK]`, `[sMASK]`, `[gMASK]`) of texts.

        One blank of every text after the other is filled, in a batch of the texts that still have one: the model sees
        the whole text with its blanks, in both directions, and what it has filled in before, and `generate()` writes
        from a start token until a token that ends the span or a text, or to `max_new_tokens`. To byte-level BPE and
        its like the space before a word is part of the word: write `"the[MASK] of"` for a fill such as `" end"`.

        Args:
            texts: a text or several, each with one or more blanks.
            tokenizer: names the tokens; those that it lacks are the config's.
            order: numbers of the blanks in the order in which to fill them, `[1, 0]` for all texts or one list for
                each; left out: from left to right.
            gmask_counts: whether the first axis counts on after `[gMASK]`, as the model was trained; left out: in
                models with one axis (GLM-130B), as `generate()` does it by itself.
            options: for `generate()`: `max_new_tokens` (for each blank; 64 if nothing says otherwise), `do_sample`,
                `num_beams`, `generation_config`, `cache_implementation`, ...

        Returns:
            A `Filling` with `texts`, `fills` and `fill_ids`.

        Raises:
            ValueError: the model has no prefix; a text has no blank; a token is named nowhere; `order` is none; a text
                is too long for learned positions; more than one sequence was asked for.
        """
        tokens = self._glm_tokens("fill", tokenizer)
        texts = [texts] if isinstance(texts, str) else list(texts)
        contexts = read_contexts(tokenizer, texts, tokens)
        pieces = split_at_blanks(tokenizer, texts, contexts, tokens)
        orders = read_orders(order, contexts)
        options, stops, new_tokens = self._fill_options(tokens, tokenizer, options)
        counting = self._counting(tokens, gmask_counts)
        done: list[dict[int, list[int]]] = [{} for _ in contexts]
        for number, context in enumerate(contexts):
            for blank in context.blanks:
                require_room(self.config, number, open_row(context, {}, blank, tokens, counting), new_tokens)
        for turn in range(max(map(len, orders))):
            active = [number for number, own in enumerate(orders) if turn < len(own)]
            blanks = [contexts[number].blanks[orders[number][turn]] for number in active]
            rows = [
                open_row(contexts[number], done[number], blank, tokens, counting)
                for number, blank in zip(active, blanks, strict=True)
            ]
            answers = self._generate_spans(rows, tokens, stops, options)
            for number, blank, answer in zip(active, blanks, answers, strict=True):
                done[number][blank] = answer
        fill_ids = [[own[blank] for blank in context.blanks] for context, own in zip(contexts, done, strict=True)]
        fills = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in own] for own in fill_ids]
        filled = [
            "".join(piece + fill for piece, fill in zip(around, [*own, ""], strict=True))
            for around, own in zip(pieces, fills, strict=True)
        ]
        return Filling(filled, fills, fill_ids)

    @torch.no_grad()
    def score_fills(
        self,
        texts: str | Sequence[str],
        candidates: Sequence[str] | Sequence[Sequence[str]],
        tokenizer: Any,
        normalize: bool = False,
        include_end: bool = True,
        batch_size: int | None = None,
        gmask_counts: bool | None = None,
    ) -> torch.Tensor:
        """Log likelihoods of what could fill the one blank of each text: a classifier, where candidates are the words
        of classes (verbalizers: PET, arXiv 2001.07676; GLM, arXiv 2103.10360, section 2.2).

        Args:
            texts: a text or several, each with one blank.
            candidates: strings for all texts, or a list of strings for each.
            tokenizer: names the tokens; those that it lacks are the config's.
            normalize: divide by the number of tokens scored.
            include_end: score the token that ends the span too, so that a candidate is the whole fill.
            batch_size: texts times candidates in one forward; None: all of them.
            gmask_counts: as for `fill`.

        Returns:
            Sums of log probabilities, float32 [texts, candidates]; minus infinity where a text has fewer candidates
            than another.

        Raises:
            ValueError: the model has no prefix; a text has no blank or several; there is nothing to score; a token is
                named nowhere; a text is too long for learned positions.
        """
        tokens = self._glm_tokens("score_fills", tokenizer)
        if include_end and tokens.eop is None:
            raise ValueError("`include_end=True`, but neither tokenizer nor config names a token that ends a span")
        contexts = read_contexts(tokenizer, texts, tokens)
        lists = read_candidates(candidates, len(contexts))
        end, counting = tokens.eop if include_end else None, self._counting(tokens, gmask_counts)
        spans = [encode_spans(tokenizer, own) for own in lists]
        rows = candidate_rows(contexts, spans, tokens.sop, end, counting)
        for number, row in rows:
            require_room(self.config, number, row)
        step = len(rows) if batch_size is None else batch_size
        batches = [[row for _, row in rows[at : at + step]] for at in range(0, len(rows), step)]
        parts = [self._score_rows(batch, tokens.pad, normalize) for batch in batches]
        table = torch.full((len(lists), max(map(len, lists))), -torch.inf, device=self.device)
        present = torch.tensor([[index < len(own) for index in range(table.shape[1])] for own in lists])
        table[present.to(self.device)] = torch.cat(parts)
        return table

    def _glm_tokens(self, what: str, tokenizer: Any) -> GLMTokens:
        if self.config.attention_type != "prefix":
            raise ValueError(
                f"{what}() with `attention_type={self.config.attention_type!r}`: only a model with "
                "`attention_type='prefix'` sees what stands behind a blank"
            )
        return find_glm_tokens(tokenizer, self.config)

    def _counting(self, tokens: GLMTokens, gmask_counts: bool | None) -> tuple[int | None, ...]:
        """The blanks after which the first axis counts on. With one axis the text after [gMASK] simply goes on
        (GLM-130B); with two it has the second to itself."""
        counts = not has_two_axes(self.config) if gmask_counts is None else gmask_counts
        return (tokens.gmask,) if counts else ()

    def _fill_options(
        self, tokens: GLMTokens, tokenizer: Any, options: dict[str, Any]
    ) -> tuple[dict[str, Any], set[int], int]:
        """The options for `generate()`, the ids that end a span, and the most tokens in one."""
        options = dict(options)
        given = options.get("generation_config")
        configs = [config for config in (given, self.generation_config) if config is not None]

        def chosen(name: str) -> Any:
            values = [options.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in values if value is not None), None)

        if chosen("num_return_sequences") not in (None, 1):
            raise ValueError("`num_return_sequences` above 1: each text is filled once; give a text several times")
        if options.get("max_length") is not None:
            raise ValueError("`max_length` counts the text too; give `max_new_tokens`, which holds for each blank")
        ends = chosen("eos_token_id")
        stops = {tokens.eop, getattr(tokenizer, "eos_token_id", None), *(ends if isinstance(ends, list) else [ends])}
        stops -= {None}
        new_tokens = chosen("max_new_tokens") or DEFAULT_NEW_TOKENS
        settings = {"max_new_tokens": new_tokens, "eos_token_id": sorted(stops) or None, "pad_token_id": tokens.pad}
        if given is None:
            return options | settings, stops, new_tokens
        # generate() wants either a config or single settings.
        options["generation_config"] = copy.deepcopy(given)
        options["generation_config"].update(**settings)
        return {name: value for name, value in options.items() if name not in settings}, stops, new_tokens

    def _generate_spans(
        self, rows: Sequence[GLMRow], tokens: GLMTokens, stops: set[int], options: dict[str, Any]
    ) -> list[list[int]]:
        """What `generate()` adds to each row, up to the first token that ends it."""
        inputs = self._tensors(pad_rows(rows, tokens.pad, left=True, labels=False))
        # Typed for transformers' own models only.
        output = self.generate(**inputs, **options)  # pyright: ignore[reportAttributeAccessIssue]
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
        ends = [next((at for at, token in enumerate(answer) if token in stops), None) for answer in answers]
        return [answer[:end] for answer, end in zip(answers, ends, strict=True)]

    def _score_rows(self, rows: Sequence[GLMRow], pad_token_id: int, normalize: bool) -> torch.Tensor:
        """Log likelihoods [rows] of the rows' labels."""
        inputs = self._tensors(pad_rows(rows, pad_token_id, left=True, labels=True))
        # With padding on the left, the labels of every row stand in its last slots.
        kept = 1 + max(len(row.input_ids) - sum(row.prefix_mask) for row in rows)
        labels = inputs.pop("labels")[:, 1 - kept :]
        logits = self(**inputs, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
        scored = labels != IGNORE_INDEX
        found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        total = torch.where(scored, found, 0.0).sum(-1)
        return total / scored.sum(-1) if normalize else total

    def _tensors(self, batch: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(rows, device=self.device) for name, rows in batch.items()}
