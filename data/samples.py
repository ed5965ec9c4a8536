"""From examples to samples: token ids, and what of them is to be learned."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from minillm.data.chat_templates import CHAT_TEMPLATES, chat_template
from minillm.data.containers import CorpusError
from minillm.data.conversations import ChatEncoder, ConversationError
from minillm.data.records import Conversation, Example, PromptWithCompletion, Text, TokenIds

BATCH_TEXTS = 256
BATCH_CHARACTERS = 2**22
ANSWER_FIELDS = ("labels", "assistant_masks", "completion_mask", "prompt_length")


class Samples(Sequence):
    """Samples that take few bytes for a token until they are asked for, which is as mappings of lists of ints."""

    def __init__(self, samples: Iterable[Mapping[str, Any]] = ()) -> None:
        self._stored: list[dict[str, np.ndarray]] = []
        for sample in samples:
            self.append(sample)

    def append(self, sample: Mapping[str, Any]) -> None:
        """Adds a sample: names, and lists, arrays or tensors of integers."""
        self._stored.append({name: smallest(values) for name, values in sample.items()})

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, key: slice | Sequence[int]) -> "Samples": ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            key = range(*key.indices(len(self)))
        if np.ndim(key):
            chosen = Samples()
            chosen._stored = [self._stored[index] for index in key]
            return chosen
        return {name: values.tolist() for name, values in self._stored[key].items()}


def smallest(values: Any) -> np.ndarray:
    """Integers in the narrowest type of numpy that holds them."""
    array = np.asarray(values)
    if array.dtype.kind not in "iub" or not array.size:
        return array
    least, most = int(array.min()), int(array.max())
    # A type with a sign holds one more below zero than above.
    return array.astype(np.min_scalar_type(most if least >= 0 else min(least, -most - 1)))


class ExampleEncoder:
    """Makes samples for the collators of what records mean.

    | content | answers only | all of it |
    |---|---|---|
    | text | refused | `input_ids`: begin token, text, end token |
    | prompt with completion | `prompt_ids`, and `completion_ids` with the end token | as the text of both |
    | conversation | `input_ids` and `assistant_masks`, by `ChatEncoder` | `input_ids` |
    | token ids | as they are; the answer must be told | as they are |

    Args:
        tokenizer: any tokenizer; conversations need a fast one.
        answers_only: score answers alone.
        template: a chat template, by the name of a family or the path of a file; None takes the tokenizer's, and
            Alpaca's for its records if the tokenizer has none.
        add_end: put an end token behind a text.
        end_token_ids: as in `ChatEncoder`.
        special_tokens_in_text: read the strings of special tokens as these tokens; otherwise they are text.

    Attributes:
        chat: the encoder of conversations; None as long as there was none.
        begin_late: conversations whose first answers, which nothing asks for, were left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        answers_only: bool,
        *,
        template: str | Path | None = None,
        add_end: bool = True,
        end_token_ids: Sequence[int] | None = None,
        special_tokens_in_text: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.answers_only = answers_only
        self.template = None if template is None else chat_template(template)
        self.template_name = None if template is None else str(template)
        self.end_token_ids = end_token_ids
        self.special_tokens_in_text = special_tokens_in_text
        self.chat: ChatEncoder | None = None
        self.begin_late = 0
        begin: Any = tokenizer.bos_token_id
        ends: Any = tokenizer.eos_token_id if add_end else None
        self.begin: list[int] = [] if begin is None else [begin]
        self.end: list[int] = [] if ends is None else [ends]
        self.prompt_begin = begin_ids(tokenizer)

    def report(self) -> list[str]:
        """What is to be said of the conversations encoded so far, in sentences."""
        lines = [] if self.chat is None else self.chat.report()
        if lines and (missing := self._missing_tokens()):
            lines.append(
                f"the tokenizer spells {', '.join(missing)} of the template {self.template_name} in several tokens: "
                "add them as special tokens, or choose another template"
            )
        if self.begin_late:
            lines.append(f"{self.begin_late:,} of them began with an answer, which is left out: nothing asks for it")
        return lines

    def _missing_tokens(self) -> list[str]:
        known = CHAT_TEMPLATES.get(self.template_name or "")
        vocabulary = self.tokenizer.get_vocab() if known else {}
        return [token for token in known.tokens if token not in vocabulary] if known else []

    def encode(self, examples: Iterable[Example]) -> Iterator[tuple[Example, list[dict[str, Any]]]]:
        """Each example with its samples, in order; texts are tokenized many at a time.

        Raises:
            CorpusError: an example that cannot be encoded; the message names its place.
        """
        batch: list[Example] = []
        characters = 0
        for example in examples:
            batch.append(example)
            characters += len(example.content.text) if isinstance(example.content, Text) else 0
            if len(batch) == BATCH_TEXTS or characters >= BATCH_CHARACTERS:
                yield from self._batch(batch)
                batch, characters = [], 0
        yield from self._batch(batch)

    def _batch(self, batch: list[Example]) -> Iterator[tuple[Example, list[dict[str, Any]]]]:
        texts = [] if self.answers_only else [one.content.text for one in batch if isinstance(one.content, Text)]
        encoded = iter(self.texts(texts))
        for example in batch:
            is_text = isinstance(example.content, Text) and not self.answers_only
            yield example, [{"input_ids": next(encoded)}] if is_text else self(example)

    def __call__(self, example: Example) -> list[dict[str, Any]]:
        """The samples of one example.

        Raises:
            CorpusError: it cannot be encoded; the message names its place.
        """
        content = example.content
        if isinstance(content, Conversation):
            return self._conversation(content, example.place)
        if isinstance(content, TokenIds):
            return [self._ids(content, example.place)]
        if isinstance(content, PromptWithCompletion):
            if not self.answers_only:
                return [{"input_ids": self.texts([content.prompt + content.completion])[0]}]
            prompt, completion = self._plain([content.prompt, content.completion])
            return [{"prompt_ids": self.prompt_begin + prompt, "completion_ids": completion + self.end}]
        if self.answers_only:
            raise CorpusError(f"{example.place} holds a text, no part of which is told to be an answer")
        return [{"input_ids": self.texts([content.text])[0]}]

    def texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts, between begin and end token."""
        return [self.begin + ids + self.end for ids in self._plain(texts)]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # `verbose=False`: documents longer than the model are cut by the collators.
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded: Any = self.tokenizer(texts, split_special_tokens=not self.special_tokens_in_text, **options)
        return encoded["input_ids"]

    def _conversation(self, content: Conversation, place: str) -> list[dict[str, Any]]:
        try:
            if self.chat is None:
                self.chat = self._chat_encoder(content.format)
            self.begin_late += content.begins_late
            if self.answers_only:
                return self.chat(content.messages, content.tools)
            return [self.chat.as_text(content.messages, content.tools)]
        except ConversationError as error:
            raise ConversationError(f"{place}: {error}") from error
        except (ValueError, TypeError) as error:
            raise CorpusError(f"{place}: {error}") from error

    def _chat_encoder(self, format: str) -> ChatEncoder:
        if self.template is None and format == "alpaca" and not self.tokenizer.chat_template:
            self.template, self.template_name = chat_template("alpaca"), "alpaca"
        family = CHAT_TEMPLATES.get(self.template_name) if self.template_name else None
        return ChatEncoder(
            self.tokenizer,
            self.template,
            end_token_ids=self.end_token_ids,
            special_tokens_in_text=self.special_tokens_in_text,
            apart=family is not None and family.apart,
            name=f"the chat template {self.template_name}" if self.template_name else None,
        )

    def _ids(self, content: TokenIds, place: str) -> dict[str, Any]:
        sample = content.sample
        largest = max(sample["input_ids"], default=-1)
        if largest >= len(self.tokenizer):
            raise CorpusError(f"{place}: input_ids hold {largest}; the tokenizer has {len(self.tokenizer)} tokens")
        told = [name for name in ANSWER_FIELDS if name in sample]
        if self.answers_only and not told:
            raise CorpusError(
                f"{place} holds input_ids, no part of which is told to be an answer: give one of "
                f"{', '.join(ANSWER_FIELDS)}"
            )
        return sample


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer puts before any text, as `generate()` gets them: often a begin token, or none."""
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []
