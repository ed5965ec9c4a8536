"""What a model thinks of continuations, and what it writes itself: the same for causal, prefix and GLM models."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from minillm.evaluation.encoding import encode, encode_pairs
from minillm.evaluation.likelihood import (
    Progress,
    find_blanks,
    model_length,
    pair_row,
    reads_prefixes,
    require_language_model,
    require_vocabulary,
    score_rows,
)
from minillm.tokenization.glm_layout import encode_spans
from minillm.training.put_back import evaluating

# Items that an error names.
NAMED = 10


class Continuation(NamedTuple):
    """A text after a prompt; `number` is that of the item it belongs to."""

    prompt: str
    text: str
    number: int


class ContinuationScore(NamedTuple):
    """The log likelihood of a continuation in nats, and the tokens that it is summed over."""

    log_likelihood: float
    num_tokens: int


class Reader:
    """A model with its tokenizer, and how it reads a prompt: before a continuation, as a prefix, or around a blank.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's.
        glm: prompts end in a blank, and what is scored or written fills it (`score_fills`, `fill`).
        max_length: tokens that the model takes; None: as its config says.
        batch_size: sequences in one forward.
        progress: called with what is done, how much of it and how much there is.

    Raises:
        ValueError: a bidirectional model, `glm` with a model or tokenizer without blanks, or numbers below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        glm: bool = False,
        max_length: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> None:
        require_language_model(model)
        self.blank = None
        if glm:
            self.blank = tokenizer.convert_ids_to_tokens([find_blanks(model, tokenizer).blanks[0]])[0]
        # GLM's methods are those of a MiniLLM alone.
        self.model: Any = model
        self.tokenizer = tokenizer
        self.max_length = model_length(model, tokenizer) if max_length is None else max_length
        self.batch_size, self.progress = batch_size, progress
        if self.max_length < 1 or batch_size < 1:
            raise ValueError(
                f"`max_length` is {self.max_length} and `batch_size` {batch_size}; both must be at least 1"
            )

    def with_blank(self, prompt: str) -> str:
        """A prompt with a blank behind it."""
        gap = " " if prompt and not prompt[-1].isspace() else ""
        return f"{prompt}{gap}{self.blank}"

    def encode(self, continuations: Sequence[Continuation]) -> list[tuple[list[int], list[int]]]:
        """Token ids of prompts and continuations.

        Raises:
            ValueError: a continuation without tokens of its own, or one that does not fit into the model with its
                prompt: nothing is cut off; the message names the items.
        """
        if not continuations:
            return []
        prompts, texts = [each.prompt for each in continuations], [each.text for each in continuations]
        if self.blank is None:
            pairs = encode_pairs(self.tokenizer, prompts, texts)
            # The last token is predicted only.
            lengths = [len(context) + len(ids) - 1 for context, ids in pairs]
        else:
            contexts = self.tokenizer([self.with_blank(prompt) for prompt in prompts])["input_ids"]
            spans = encode_spans(self.tokenizer, [text.strip() for text in texts])
            pairs = list(zip(contexts, spans, strict=True))
            lengths = [len(context) + 1 + len(ids) for context, ids in pairs]
        for each, (_, ids) in zip(continuations, pairs, strict=True):
            if not ids:
                raise ValueError(f"item {each.number}: {each.text!r:.40} has no token of its own behind its prompt")
        self.require_room([each.number for each in continuations], lengths)
        rows = [pair_row(context, ids) for context, ids in pairs]
        require_vocabulary(self.model, rows, lambda row: f"item {continuations[row].number}")
        return pairs

    def encode_prompts(self, prompts: Sequence[str], numbers: Sequence[int], new_tokens: int) -> list[list[int]]:
        """Token ids of prompts to be continued. ValueError, which names the items, if one leaves too little room."""
        if self.blank is None:
            encoded = encode(self.tokenizer, prompts)
        else:
            encoded = self.tokenizer([self.with_blank(prompt) for prompt in prompts])["input_ids"]
        self.require_room(numbers, [len(ids) + new_tokens for ids in encoded])
        return encoded

    def require_room(self, numbers: Sequence[int], lengths: Sequence[int]) -> None:
        long = sorted({number for number, length in zip(numbers, lengths, strict=True) if length > self.max_length})
        if long:
            more = f" and {len(long) - NAMED} more" if len(long) > NAMED else ""
            raise ValueError(
                f"prompt and answer are longer than the model's {self.max_length} tokens (up to {max(lengths)}): "
                f"items {', '.join(map(str, long[:NAMED]))}{more}; nothing is cut off: shorten them, show fewer shots "
                "or raise the length (max_length)"
            )

    def score(self, continuations: Sequence[Continuation], what: str) -> list[ContinuationScore]:
        """The log likelihood of each continuation after its prompt; one that is there twice is scored once.

        Of a model with prefixes the prompt is the prefix. With `glm` the token that ends a fill is scored too.
        """
        unique = list(dict.fromkeys((each.prompt, each.text) for each in continuations))
        owners = {(each.prompt, each.text): each.number for each in reversed(continuations)}
        asked = [Continuation(prompt, text, owners[prompt, text]) for prompt, text in unique]
        scores = (self.score_after if self.blank is None else self.score_fills)(asked, what)
        found = dict(zip(unique, scores, strict=True))
        return [found[each.prompt, each.text] for each in continuations]

    def score_after(self, asked: Sequence[Continuation], what: str) -> list[ContinuationScore]:
        prefix = reads_prefixes(self.model)
        rows = [pair_row(context, ids, len(context) * prefix) for context, ids in self.encode(asked)]
        scores = score_rows(
            self.model, rows, self.batch_size, self.progress, what, lambda row: f"item {asked[row].number}"
        )
        return [ContinuationScore(score.log_likelihood, score.num_tokens) for score in scores]

    def score_fills(self, asked: Sequence[Continuation], what: str) -> list[ContinuationScore]:
        sizes = [len(ids) + 1 for _, ids in self.encode(asked)]
        scores: list[float] = []
        with evaluating(self.model):
            for start in range(0, len(asked), self.batch_size):
                part = asked[start : start + self.batch_size]
                texts, fills = [self.with_blank(each.prompt) for each in part], [[each.text.strip()] for each in part]
                found = self.model.score_fills(texts, fills, self.tokenizer, include_end=True)[:, 0].tolist()
                for each, score in zip(part, found, strict=True):
                    if not math.isfinite(score):
                        raise ValueError(f"the model's loss is {-score} in item {each.number}")
                scores += found
                self.tell(what, len(scores), len(asked))
        return [ContinuationScore(score, size) for score, size in zip(scores, sizes, strict=True)]

    def write(self, prompts: Sequence[str], numbers: Sequence[int], new_tokens: int, what: str) -> list[str]:
        """What the model writes greedily behind each prompt, up to the end of a line, a token that ends a text, or so
        many tokens."""
        encoded = self.encode_prompts(prompts, numbers, new_tokens)
        order = sorted(range(len(prompts)), key=lambda number: -len(encoded[number]))
        texts: dict[int, str] = {}
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
                if self.blank is None:
                    written = self.continue_texts([encoded[number] for number in chosen], options)
                else:
                    blanks = [self.with_blank(prompts[number]) for number in chosen]
                    written = [fills[0] for fills in self.model.fill(blanks, self.tokenizer, **options).fills]
                texts.update(zip(chosen, (text.split("\n", 1)[0] for text in written), strict=True))
                self.tell(what, len(texts), len(order))
        return [texts[number] for number in range(len(prompts))]

    def continue_texts(self, rows: Sequence[list[int]], options: dict[str, Any]) -> list[str]:
        longest = max(map(len, rows))
        names = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in names if token is not None)
        device = self.model.device
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        stop = StoppingCriteriaList([LineEnd(lambda new: self.decode(new[:, longest:]))])
        found = self.model.generate(
            input_ids=ids, attention_mask=mask, pad_token_id=pad, stopping_criteria=stop, **options
        )
        return self.decode(found[:, longest:])

    def decode(self, ids: torch.Tensor) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def tell(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


class LineEnd(StoppingCriteria):
    """A row is done once what was added to it holds the end of a line."""

    def __init__(self, decode: Callable[[torch.Tensor], list[str]]) -> None:
        self.decode = decode

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        done: Any = torch.tensor(["\n" in text for text in self.decode(input_ids)], device=input_ids.device)
        return done
