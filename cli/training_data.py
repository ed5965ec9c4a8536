"""What `minillm train` trains on: samples from files of any kind, and what is said of how they were read."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import GenerationConfig

from minillm.cli.console import say
from minillm.data import (
    Conversation,
    CorpusError,
    Example,
    ExampleEncoder,
    PromptWithCompletion,
    Samples,
    Text,
    parse_columns,
    read_examples,
)
from minillm.data.corpus import cut_lone_file, held_out_numbers, without_empty

KINDS = {Text: "texts", PromptWithCompletion: "prompts with completions", Conversation: "conversations"}
HELD_OUT = 20
"""Of so many samples with answers the last is held out."""


class DataOptions(NamedTuple):
    """The options of `minillm train` that say what data mean.

    Attributes:
        data: a file, a folder or the name of a data set.
        columns: `FIELD=COLUMN,FIELD=COLUMN`.
        format: the format of records whose keys fit several.
        encoding: of text, JSON and CSV.
        training_template: a chat template, a file or the name of a family.
        special_tokens: read the strings of special tokens in data as these tokens.
        model: the model to go on from, whose generation config names the tokens that end a turn.
    """

    data: str | Path
    columns: str | None = None
    format: str | None = None
    encoding: str = "utf-8"
    training_template: str | None = None
    special_tokens: bool = False
    model: str | None = None

    @classmethod
    def of(cls, options: Any) -> "DataOptions":
        """Those among all options."""
        given = {name: getattr(options, name, None) for name in cls._fields}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def examples(self) -> Iterator[Example]:
        """What the data mean, as they are read."""
        columns = parse_columns(self.columns)
        found = read_examples(self.data, columns=columns, format=self.format, encoding=self.encoding)
        return without_empty(cut_lone_file(found, self.data))


def infer_objective(options: Any) -> str | None:
    """ "sft" where the data hold answers and no format was asked for, by the first record; else None.

    Raises:
        ValueError, OSError: the data cannot be read.
    """
    data = DataOptions.of(options)
    first = next(data.examples(), None)
    return None if data.format is not None or first is None or not holds_answer(first) else "sft"


def holds_answer(example: Example) -> bool:
    return isinstance(example.content, PromptWithCompletion | Conversation)


def read_samples(options: Any, objective: str, tokenizer: Any) -> tuple[Samples, Samples]:
    """Samples to train on and held-out ones; says what was inferred.

    Of a corpus a twentieth is held out by the names of files and lines, of answers the last twentieth.

    Args:
        options: has the attributes of `DataOptions`, or some of them.
        objective: "sft" learns answers alone.
        tokenizer: gets the chat template that conversations were rendered by, if it has none.

    Raises:
        ValueError, OSError: data that cannot be read or do not suit the objective; the message names file and line.
        ImportError: a library is missing that the data need.
    """
    data = DataOptions.of(options)
    encoder = ExampleEncoder(
        tokenizer,
        answers_only=objective == "sft",
        template=data.training_template,
        add_end=objective != "glm",
        end_token_ids=None if data.model is None else generation_ends(data.model),
        special_tokens_in_text=data.special_tokens,
    )
    samples, names, counts, kinds = Samples(), [], [], Counter()
    for example, made in encoder.encode(fitting(data.examples(), objective, data)):
        for sample in made:
            samples.append(sample)
        names.append(example.name)
        counts.append(len(made))
        kinds[KINDS.get(type(example.content), "lists of token ids")] += 1
    say_of_data(kinds, objective, encoder)
    if not names:
        raise CorpusError(f"{data.data} holds no text but empty ones")
    held_out = last_numbers(data.data, len(names)) if objective == "sft" else held_out_numbers(names)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    parts = ([number for number in range(len(names)) if (number in held_out) == held] for held in (False, True))
    chosen = (chain.from_iterable(range(starts[number], starts[number + 1]) for number in part) for part in parts)
    train, held = (samples[list(numbers)] for numbers in chosen)
    return train, held


def last_numbers(source: str | Path, number: int) -> set[int]:
    if number < 2:
        raise CorpusError(f"{source} holds {number} samples; at least 2 are needed, one to hold out")
    return set(range(number - max(1, number // HELD_OUT), number))


def fitting(examples: Iterable[Example], objective: str, data: DataOptions) -> Iterator[Example]:
    """The examples. CorpusError for the first that does not suit the objective."""
    for example in examples:
        if objective == "sft" and isinstance(example.content, Text):
            raise CorpusError(
                f"{example.place} holds a text; --objective sft learns answers: give prompt and completion, messages, "
                "or another --objective"
            )
        if objective != "sft" and holds_answer(example) and data.format is None:
            what = KINDS[type(example.content)]
            form = example.content.format if isinstance(example.content, Conversation) else "prompt"
            raise CorpusError(
                f"{example.place}: the data are {what}; learn the answers with --objective sft, or all of them as "
                f"text with --format {form}"
            )
        yield example


def generation_ends(model: str) -> list[int] | None:
    """The tokens at which `generate()` stops, by the generation config of a model; None if it names none."""
    with contextlib.suppress(OSError, ValueError):
        ends = GenerationConfig.from_pretrained(model).eos_token_id
        return ends if isinstance(ends, list) or ends is None else [ends]
    return None


def say_of_data(kinds: Counter, objective: str, encoder: ExampleEncoder) -> None:
    """Says as what the records were read, and by which template."""
    learned = "the answers alone are learned" if objective == "sft" else "all of it is learned"
    found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    if set(kinds) != {"texts"}:
        say(f"data: {found}; {learned}")
    for line in encoder.report():
        say(line)
    if encoder.chat is not None and encoder.tokenizer.chat_template is None:
        encoder.tokenizer.chat_template = encoder.template
        say(f"the tokenizer had no chat template; it gets {encoder.template_name}, by which the model is to be asked")
    elif encoder.chat is not None and encoder.template is not None and not asks_alike(encoder):
        say(
            f"the tokenizer keeps its chat template, which writes prompts otherwise than {encoder.template_name}, by "
            "which the model learned: put that into the chat_template.jinja of the model to ask it so"
        )


def asks_alike(encoder: ExampleEncoder) -> bool:
    """Whether the tokenizer's chat template writes a prompt as the one that was given for training does."""
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    asked = [{"role": "user", "content": "?"}]
    try:
        prompts = [
            encoder.tokenizer.apply_chat_template(asked, chat_template=template, **options)
            for template in (encoder.template, None)
        ]
    except (TemplateError, ValueError):
        # One of them wants more than a question.
        return False
    return prompts[0] == prompts[1]


def say_of_turns(samples: Iterable[dict[str, list[int]]]) -> None:
    """Says that `generate()` will not tell the answers of a conversation, where no token does."""
    if any(sum(pair == (0, 1) for pair in pairwise(sample.get("assistant_masks", []))) > 1 for sample in samples):
        say(
            "the chat template of this tokenizer starts answers with no token of their own: `generate()` will read a "
            "conversation, earlier answers too, as one prompt, unlike this training; pass it a `prefix_mask`"
        )
