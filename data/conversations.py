"""Conversations as samples in which the answers alone are scored, by any chat template.

Where answers begin and end is told in the first of these ways that holds:

1. `generation`: the template marks them with `{% generation %}`.
2. `whole`: the conversation is rendered once; what is rendered before each answer, and up to its end, begins it.
3. `rows`: a row for each answer, rendered up to its end; what is rendered before the answer begins it.

A rendering is tokenized once, and cut where its characters say; a token that stands across a border is an error.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minillm.data.containers import CorpusError
from minillm.data.sentence_ends import special_ids
from minillm.tokenization.literal_text import LiteralReading, hide_in, require_literal

MARKS_ANSWERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SHOWN = 24
NEXT_TURN = {"role": "user", "content": "?"}
CALLED = {"role": "tool", "content": "?"}
ANSWER = {"role": "assistant", "content": "!"}
# A template may fail on what it has no place for in any of these ways.
REFUSALS = (TemplateError, TypeError, AttributeError, KeyError, ValueError, IndexError)

Sample = dict[str, list[int]]


class ConversationError(CorpusError):
    """A conversation that a chat template cannot turn into samples."""


class Drawn(NamedTuple):
    """A rendering with the answers in it.

    Attributes:
        text: the rendering.
        spans: the characters of each answer, from the first to the one after the last.
        answers: the number of the message that each of them is; None if the template marks several parts of some.
    """

    text: str
    spans: list[tuple[int, int]]
    answers: list[int] | None


class Rendering:
    """The renderings of a conversation, of all its messages or the first ones, with special tokens in them hidden."""

    def __init__(self, encoder: "ChatEncoder", messages: Sequence[dict[str, Any]], tools: Any) -> None:
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.plain = (list(messages), tools)
        self.reading = LiteralReading(self.tokenizer, (), {})
        self.messages, self.tools = self.plain
        if not encoder.special_tokens_in_text:
            self.reading, (self.messages, self.tools) = hide_in(self.tokenizer, self.plain)
        self.template = self.tokenizer.get_chat_template(encoder.template, tools)
        self._texts: dict[int, str] = {}

    def text(self, count: int | None = None) -> str:
        """The first `count` messages; None: all."""
        count = len(self.messages) if count is None else count
        if count not in self._texts:
            self._texts[count] = self._render(self.messages[:count], self.tools)
        return self._texts[count]

    def opened(self, count: int) -> str:
        """The first messages, and what makes the model answer."""
        if not count:
            raise ConversationError("the conversation begins with an answer, which nothing asks for")
        return self._render(self.messages[:count], self.tools, add_generation_prompt=True)

    def continued(self, count: int) -> str:
        """What the turn after the first messages begins with, or would begin with; empty if that cannot be told."""
        *before, answer = self.messages[:count]
        following = self.messages[count] if count < len(self.messages) else None
        following = following or (CALLED if answer.get("tool_calls") else NEXT_TURN)
        # The answer as it is may be written otherwise once it is not the last, with its thoughts taken out.
        for one in (answer, ANSWER):
            try:
                text, longer = (self._render([*before, one, *more], self.tools) for more in ([], [following]))
            except ConversationError:
                continue
            if longer.startswith(text):
                return longer.removeprefix(text)
        return ""

    def without_tools(self) -> str:
        return self._render(self.messages, None)

    def marked(self) -> tuple[str, list[tuple[int, int]]]:
        """All messages, and the characters that the template marks as answers."""
        given = {"tools": self.tools, "chat_template": self.template, **self.tokenizer.special_tokens_map}
        try:
            texts, spans = render_jinja_template([self.messages], return_assistant_tokens_mask=True, **given)
        except REFUSALS as error:
            raise self._refused(error) from error
        joined: list[tuple[int, int]] = []
        found: Any = spans[0]
        for start, stop in found:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            elif start < stop:
                joined.append((start, stop))
        return texts[0], joined

    def require_literal(self) -> None:
        """ValueError if the template looks for special tokens that stand in a message."""
        if self.reading.hidden:
            require_literal(self.reading, self._render(*self.plain), self.text())

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, **options: Any) -> str:
        try:
            rendered = PreTrainedTokenizerFast.apply_chat_template(
                self.tokenizer, list(messages), tools, chat_template=self.template, tokenize=False, **options
            )
            return str(rendered)
        except REFUSALS as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> ConversationError:
        return ConversationError(f"{self.encoder.name} refuses the messages: {error or type(error).__name__}")


class ChatEncoder:
    """Makes samples of conversations by a chat template, in which the answers of the assistant are scored.

    The token that ends a turn is scored too: the last of the answer, or the one behind it (GLM-4 and ChatGLM3 stop at
    the token of the next role). Where the template writes none, each answer gets a row of its own, and a token that
    ends a turn is put behind it. What other roles say, tools included, is never scored.

    Strings of special tokens in messages and tools are text unless asked otherwise.

    Attributes:
        ways: how many conversations were read in each way, "generation", "whole" and "rows".
        other_ends: special tokens that end answers, but are not among `end_token_ids`, and how often.
        without_tools: conversations whose tools the template has no place for.

    Args:
        tokenizer: any fast tokenizer.
        template: a chat template; None takes the tokenizer's.
        end_token_ids: the tokens at which `generate()` stops, as the generation config names them; None takes the
            tokenizer's end token.
        special_tokens_in_text: read the strings of special tokens in messages as these tokens.
        apart: tokenize prompts and answers apart, as `generate()` does, in place of at once. Where a prompt ends with
            a colon, tokenizers join it with a quotation mark that the answer begins with.
        name: what errors call the template.

    Raises:
        ConversationError: the tokenizer has no chat template and none is given, or no token that ends a turn.
        TypeError: no fast tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        *,
        end_token_ids: Sequence[int] | None = None,
        special_tokens_in_text: bool = False,
        apart: bool = False,
        name: str | None = None,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TypeError(
                f"{type(tokenizer).__name__} is no fast tokenizer (one with a tokenizer.json), which alone tells "
                "where in a text its tokens stand"
            )
        if template is None and not tokenizer.chat_template:
            raise ConversationError(
                "the tokenizer has no chat template, so conversations need one by name (`template`, "
                "--training-template): a Jinja file, or that of a family such as chatml or llama-2"
            )
        eos: Any = tokenizer.eos_token_id
        own: list[int] = [] if eos is None else [eos]
        ends = own if end_token_ids is None else list(end_token_ids)
        if not ends:
            raise ConversationError(
                "neither the tokenizer (eos_token) nor the generation config (eos_token_id) names a token that ends a "
                "turn, so a model would not learn to stop: set one"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.special_tokens_in_text = special_tokens_in_text
        self.apart = apart
        self.name = name or ("the given chat template" if template else "the chat template of the tokenizer")
        self.ends = frozenset(ends)
        self.usual_end = own[0] if set(own) & self.ends else ends[0]
        self.special = special_ids(tokenizer)
        self.backend = without_post_processor(tokenizer)
        self.ways: Counter[str] = Counter()
        self.other_ends: Counter[str] = Counter()
        self.without_tools = 0

    def __call__(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> list[Sample]:
        """Samples with `input_ids` and `assistant_masks`, 1 on what is scored: one, or one for each answer.

        Args:
            messages: mappings with `role` and `content`, as chat templates take them.
            tools: JSON schemas of tools; a template without a place for them is counted in `without_tools`.

        Raises:
            ConversationError: no answer, messages that the template refuses, or answers whose start cannot be told,
                or stands inside a token.
            ValueError: the template looks for special tokens that stand in a message.
        """
        drawn = self._rendering(messages, tools)
        # A template's own words are better than those below.
        drawn.text()
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ConversationError("no message of the assistant to learn")
        if MARKS_ANSWERS.search(drawn.template):
            way, parts = "generation", [self._marked(drawn, answers)]
        else:
            whole = self._whole(drawn, answers)
            way, parts = ("rows", self._rows(drawn, answers)) if whole is None else ("whole", [whole])
        for part in parts:
            self._require_content(drawn.messages, part)
        samples = [sample for part in parts for sample in self._samples(drawn, part, keep=way == "generation")]
        self.ways["rows" if len(samples) > len(parts) else way] += 1
        return samples

    def as_text(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> Sample:
        """`input_ids` of the whole conversation, with a token that ends a turn behind it; all of it is scored.

        Raises:
            ConversationError, ValueError: as when called.
        """
        drawn = self._rendering(messages, tools)
        ids = self._backend(drawn).encode(drawn.text(), add_special_tokens=False).ids
        while ids and not str(self.tokenizer.decode(ids[-1:])).strip() and ids[-1] not in self.ends | self.special:
            ids.pop()
        if not ids:
            raise ConversationError(f"{self.name} writes nothing of this conversation")
        if messages[-1]["role"] == "assistant" and ids[-1] not in self.ends | self.special:
            ids.append(self._stop(drawn, len(messages)))
        return {"input_ids": ids}

    def report(self) -> list[str]:
        """What is to be said of the conversations read so far, in sentences."""
        told = {
            "generation": f"{self.name} marks answers itself (generation)",
            "whole": f"one rendering by {self.name}, in which starts and ends of answers are verified (whole)",
            "rows": f"a row for each answer, the start of which is verified, by {self.name} (rows)",
        }
        lines = [f"{_counted(self.ways[way])}: {text}" for way, text in told.items() if self.ways[way]]
        for token, count in self.other_ends.items():
            lines.append(
                f"{count:,} answers end with {token}, at which generate() does not stop: add its id, "
                f"{self.tokenizer.convert_tokens_to_ids(token)}, to eos_token_id in generation_config.json"
            )
        if self.without_tools:
            lines.append(f"{_counted(self.without_tools)} without tools: {self.name} has no place for them")
        return lines

    def _rendering(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> Rendering:
        drawn = Rendering(self, messages, tools)
        drawn.require_literal()
        if tools and drawn.text() == drawn.without_tools():
            self.without_tools += 1
        return drawn

    def _marked(self, drawn: Rendering, answers: list[int]) -> Drawn:
        text, spans = drawn.marked()
        if not spans:
            raise ConversationError(f"{self.name} marks no answer in this conversation")
        return Drawn(text, spans, answers if len(spans) == len(answers) else None)

    def _whole(self, drawn: Rendering, answers: list[int]) -> Drawn | None:
        """The rendering of all; None if what is rendered before an answer, or up to its end, does not begin it."""
        text, spans, done = drawn.text(), [], 0
        for number in answers:
            start, stop = drawn.opened(number), drawn.text(number + 1)
            if not (text.startswith(start) and text.startswith(stop) and done <= len(start) <= len(stop)):
                return None
            spans.append((len(start), len(stop)))
            done = len(stop)
        return Drawn(text, spans, answers)

    def _rows(self, drawn: Rendering, answers: list[int]) -> list[Drawn]:
        rows = []
        for order, number in enumerate(answers, 1):
            start, text = drawn.opened(number), drawn.text(number + 1)
            if not text.startswith(start):
                at = next(place for place in range(len(start)) if start[place] != text[place : place + 1])
                before, after = (drawn.reading.reveal(one[at : at + SHOWN]) for one in (start, text))
                raise ConversationError(
                    f"{self.name} writes the start of answer {order} in two ways: from character {at} on {before!r} "
                    f"before the answer is there, {after!r} with it. Name a template that does not, or one that marks "
                    "answers with {% generation %} (`template`, --training-template)"
                )
            rows.append(Drawn(text, [(len(start), len(text))], [number]))
        return rows

    def _require_content(self, messages: Sequence[dict[str, Any]], part: Drawn) -> None:
        """ConversationError if a template passes over what a message says, as those that want lists of parts do."""
        for (start, stop), number in zip(part.spans, part.answers or [], strict=part.answers is not None):
            content = messages[number].get("content")
            words = content.split() if isinstance(content, str) else []
            if words and words[-1] not in part.text[start:stop]:
                raise ConversationError(f"{self.name} leaves out the content of message {number + 1}")
            for call in messages[number].get("tool_calls") or []:
                name = str(call.get("function", call).get("name"))
                if name not in part.text[start:stop]:
                    raise ConversationError(
                        f"{self.name} has no place for the call of {name!r} in message {number + 1}"
                    )

    def _samples(self, drawn: Rendering, part: Drawn, keep: bool) -> list[Sample]:
        ids, offsets = self._encode(drawn, part)
        starts = [start for start, _ in offsets]
        spans = []
        for start, stop in part.spans:
            first, last = (self._token_at(drawn, part.text, offsets, starts, place) for place in (start, stop))
            spans.append((first, *self._end(part.text, ids, offsets, first, last, keep)))
            if spans[-1][1] <= first:
                raise ConversationError(f"{self.name} writes nothing of an answer")
        *earlier, (first, last, ended) = spans
        if all(ended for _, _, ended in earlier) or part.answers is None:
            if not ended and not part.text[part.spans[-1][1] :].strip():
                count = part.answers[-1] + 1 if part.answers else len(drawn.messages)
                ids, last, ended = [*ids[:last], self._stop(drawn, count)], last + 1, True
            if ended or part.answers is None:
                return [scored(ids, [*(span[:2] for span in earlier), (first, last)])]
        samples = []
        for (first, last, ended), number in zip(spans, part.answers, strict=True):
            added = [] if ended else [self._stop(drawn, number + 1)]
            samples.append(scored([*ids[:last], *added], [(first, last + len(added))]))
        return samples

    def _encode(self, drawn: Rendering, part: Drawn) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters of each."""
        backend = self._backend(drawn)
        places = sorted({0, len(part.text), *chain.from_iterable(part.spans)}) if self.apart else [0, len(part.text)]
        ids, offsets = [], []
        for begin, end in pairwise(places):
            encoding = backend.encode(part.text[begin:end], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(begin + start, begin + stop) for start, stop in encoding.offsets]
        return ids, offsets

    def _token_at(
        self, drawn: Rendering, text: str, offsets: list[tuple[int, int]], starts: list[int], place: int
    ) -> int:
        """The number of the token that begins at a character, or after it. ConversationError if one stands across."""
        index = bisect_left(starts, place)
        if index and offsets[index - 1][1] > place:
            start, stop = offsets[index - 1]
            piece, after = (
                drawn.reading.reveal(text[one:other]) for one, other in ((start, stop), (place, place + SHOWN))
            )
            raise ConversationError(
                f"the token {piece!r} stands across the border of an answer, before {after!r}: take blanks away "
                "there, or name a template that puts the border elsewhere (`template`, --training-template)"
            )
        return index

    def _end(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], first: int, last: int, keep: bool
    ) -> tuple[int, bool]:
        """The token after an answer, that which ends the turn included, and whether there is one.

        With `keep` nothing is taken away from the answer; else what follows the end token is no part of it.
        """
        # Special tokens and blanks at the end of the answer.
        tail = last
        while tail > first and (ids[tail - 1] in self.special or not text[slice(*offsets[tail - 1])].strip()):
            tail -= 1
        for known in (self.ends, self.special):
            place = next((place for place in range(tail, last) if ids[place] in known), None)
            if place is not None:
                if known is self.special:
                    self.other_ends[str(self.tokenizer.convert_ids_to_tokens(ids[place]))] += 1
                return (last if keep else place + 1), True
            if last < len(ids) and ids[last] in self.ends:
                return last + 1, True
        return last, False

    def _stop(self, drawn: Rendering, count: int) -> int:
        """The token that ends the turn of the last of the first messages where the template writes none."""
        following = self.backend.encode(drawn.continued(count), add_special_tokens=False).ids
        return following[0] if following and following[0] in self.ends else self.usual_end

    def _backend(self, drawn: Rendering) -> Tokenizer:
        reading = drawn.reading
        return self.backend if reading.tokenizer is self.tokenizer else without_post_processor(reading.tokenizer)


def _counted(number: int) -> str:
    return f"{number:,} conversation{'s' * (number != 1)}"


def scored(ids: list[int], spans: list[tuple[int, int]]) -> Sample:
    """A sample whose `assistant_masks` are 1 on some spans of its tokens."""
    mask = [0] * len(ids)
    for start, stop in spans:
        mask[start:stop] = [1] * (stop - start)
    return {"input_ids": list(ids), "assistant_masks": mask}


def without_post_processor(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A back end that encodes alike, and says where tokens stand with their blanks.

    That of a byte-level BPE takes blanks out of the places. Both share the model.
    """
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if (part := getattr(backend, name)) is not None:
            setattr(bare, name, part)
    bare.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return bare
