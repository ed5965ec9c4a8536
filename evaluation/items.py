"""Questions with options or accepted answers, and the prompts that they become."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minillm.tokenization.literal_text import LiteralReading, read_literally

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BETWEEN_SHOTS = "\n\n"
BARE_QUESTION = "Answer:"

# Scripts that are written without blanks between words: radicals, kana and ideographs, full-width forms, rarer
# ideographs. Korean has blanks.
WITHOUT_BLANKS = ((0x2E80, 0x9FFF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x20000, 0x3FFFF))


class Item(NamedTuple):
    """A question.

    Attributes:
        number: its line in the file, from 1 on, or its place in a list.
        question: the text.
        options: what it may be answered with; without any it is answered by generation only.
        answer: index of the right option; None without options.
        answers: texts that count as right in generation, the right option among them.
        group: what its accuracy is reported under, beside the whole.
    """

    number: int
    question: str
    options: tuple[str, ...]
    answer: int | None
    answers: tuple[str, ...]
    group: str | None = None

    @property
    def answer_text(self) -> str:
        """What stands behind the question where it is shown with its answer."""
        return self.answers[0] if self.answer is None else self.options[self.answer]


@dataclass(frozen=True)
class ItemSettings:
    """How items are asked.

    Attributes:
        ways: of "likelihood" (of the options), "letters" (the likelihood of their letters) and "generation".
        shots: solved items before each.
        shot_items: where these come from; None: the items themselves, never the one that is asked.
        rotate: ask by letters in all cyclic orders of the options.
        chat_template: put question and answers into the turns of the tokenizer's chat template.
        glm: `{prompt} [MASK]`, and the answer fills the blank; None: for models with a second axis of positions.
        max_new_tokens: most tokens of a generated answer.
        seed: of the choice of shots, and of the bootstrap.
    """

    ways: tuple[str, ...] = ("likelihood", "letters", "generation")
    shots: int = 0
    shot_items: Sequence[Item] | None = None
    rotate: bool = False
    chat_template: bool = False
    glm: bool | None = None
    max_new_tokens: int = 32
    seed: int = 0


def read_items(path: str | Path) -> list[Item]:
    """The items of a file with a JSON object on each line.

    `{"question": str, "options": [str, ...], "answer": index of the right one, "answers": [accepted], "group": str}`;
    without options `answers` is needed, and with them `answer`. Other keys are not read.

    Raises:
        ValueError: no such file, no items, or a line that is none; the message names the line and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; items are read from lines of JSON")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    items = []
    # Not `splitlines`: JSON allows U+2028 and its like inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is no JSON: {error}") from error
        items.append(parse_item(record, number, f"{path} line {number}"))
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def parse_item(record: Any, number: int, place: str) -> Item:
    """An item from a mapping. ValueError, beginning with `place`, if it is none."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} holds {record!r:.40}; an item is an object with question, options and answer")
    question, options, answer = (record.get(name) for name in ("question", "options", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: `question` must be a text, not {question!r:.40} (keys: {', '.join(record)})")
    accepted = read_texts(place, "answers", record.get("answers"))
    group = record.get("group")
    if group is not None and not isinstance(group, str):
        raise ValueError(f"{place}: `group` must be a text, not {group!r:.40}")
    if options is None:
        if answer is not None:
            raise ValueError(f"{place}: `answer` is the index of an option, but there are no `options`")
        if not accepted:
            raise ValueError(f"{place} has neither `options` with `answer` nor `answers` (keys: {', '.join(record)})")
        return Item(number, question, (), None, accepted, group)
    options = read_texts(place, "options", options)
    if len(options) < 2:
        raise ValueError(f"{place}: `options` holds {len(options)}; at least 2 are needed")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise ValueError(
            f"{place}: `answer` is {answer!r:.40}; it must be the index of an option, 0 to {len(options) - 1}"
        )
    return Item(number, question, options, answer, tuple(dict.fromkeys([options[answer], *accepted])), group)


def read_texts(place: str, name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list | tuple):
        raise ValueError(f"{place}: `{name}` must be a list of texts, not {values!r:.40}")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: `{name}` holds {value!r:.40}; each must be a text that is not empty")
    return tuple(values)


class Prompter:
    """Makes the prompts of items, with what is spelled like a special token in them as text.

    Args:
        tokenizer: the model's; its `tokenizer` attribute encodes the prompts.
        items: what is asked.
        settings: shots and template.

    Raises:
        ValueError: fewer items to show than `shots`, or no chat template where one is asked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], settings: ItemSettings) -> None:
        if settings.chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: evaluate without it, or give the tokenizer one")
        if settings.shots < 0:
            raise ValueError(f"`shots` is {settings.shots}; it must be at least 0")
        self.items, self.settings = items, settings
        pool = items if settings.shot_items is None else settings.shot_items
        texts = [text for item in [*items, *pool] for text in (item.question, *item.options, *item.answers)]
        # Where nothing is hidden any tokenizer will do.
        plain: Any = tokenizer
        self.reading = LiteralReading(plain, (), {})
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self.reading = read_literally(tokenizer, "\n".join(texts))
        elif special := [token for token in tokenizer.all_special_tokens if any(token in text for text in texts)]:
            raise ValueError(
                f"an item holds {special[0]!r}, which {type(tokenizer).__name__}, no fast tokenizer, would read as a "
                "special token: take it out, or use a tokenizer with a tokenizer.json"
            )
        self.tokenizer = self.reading.tokenizer
        self.shots = [self.draw_shots(index, pool) for index in range(len(items))] if settings.shots else None

    def draw_shots(self, index: int, pool: Sequence[Item]) -> list[Item]:
        """The solved items before one: it is never among them, nor is one that asks the same."""
        item, count = self.items[index], self.settings.shots
        # Letters are shown with options.
        fitting = [other for other in pool if other.options or not item.options]
        others = [other for other in fitting if other[1:3] != item[1:3]]
        if len(others) < count:
            raise ValueError(f"item {item.number}: {count} shots are asked for, but {len(others)} others are there")
        return random.Random(f"{self.settings.seed}:{index}").sample(others, count)

    def cloze(self, index: int) -> str:
        """The prompt that options, or a generated answer, go on from."""
        shots = self.shots[index] if self.shots else []
        return self.write(
            [(cloze_question(shot), shot.answer_text) for shot in shots], cloze_question(self.items[index])
        )

    def letters(self, index: int, order: Sequence[int]) -> str:
        """The prompt that a letter goes on from; `order`: the option behind each letter."""
        shots = self.shots[index] if self.shots else []
        # All of them have an answer: an item with options is shown others with options.
        solved = [
            (letter_question(shot, range(len(shot.options))), LETTERS[shot.answer])
            for shot in shots
            if shot.answer is not None
        ]
        return self.write(solved, letter_question(self.items[index], order))

    def bare(self) -> str:
        """The prompt without a question, for what an option is likely to be in any case."""
        return self.write([], BARE_QUESTION)

    def write(self, solved: Sequence[tuple[str, str]], question: str) -> str:
        hide = self.reading.hide
        if not self.settings.chat_template:
            shown = [f"{before}{gap(answer)}{answer}{BETWEEN_SHOTS}" for before, answer in solved]
            return hide("".join(shown) + question)
        turns = [turn for before, answer in solved for turn in (("user", before), ("assistant", answer))]
        messages = [{"role": role, "content": hide(text)} for role, text in [*turns, ("user", question)]]
        try:
            prompt: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template cannot be applied: {error}") from error
        return prompt

    def answer(self, text: str) -> str:
        """An option or a letter as it stands behind its prompt."""
        # A template ends where an answer begins.
        return self.reading.hide(text if self.settings.chat_template else gap(text) + text)


def gap(text: str) -> str:
    """The blank before an answer, which scripts without blanks do not have."""
    return "" if any(low <= ord(text[0]) <= high for low, high in WITHOUT_BLANKS) else " "


def cloze_question(item: Item) -> str:
    return f"Question: {item.question}\n{BARE_QUESTION}"


def letter_question(item: Item, order: Sequence[int]) -> str:
    lines = "".join(f" {LETTERS[place]}. {item.options[option]}\n" for place, option in enumerate(order))
    return f"Question: {item.question}\n{lines}{BARE_QUESTION}"


def cyclic_orders(count: int, rotate: bool) -> Iterator[list[int]]:
    """The orders in which options stand behind their letters: as given, and with `rotate` each option first."""
    for first in range(count if rotate else 1):
        yield [(place + first) % count for place in range(count)]
