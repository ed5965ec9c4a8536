"""The same items scored every way: by the likelihood of their options, by letters, and by generation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.evaluation.continuations import Continuation, ContinuationScore, Reader
from minillm.evaluation.items import LETTERS, Item, ItemSettings, Prompter, cyclic_orders
from minillm.evaluation.likelihood import Progress, fills_blanks
from minillm.evaluation.written_answers import Verdict, judge_answer

WAYS = ("likelihood", "letters", "generation")
LIKELIHOODS = ("sum", "token", "char", "byte", "pmi", "pmi_empty")
WRITTEN = ("exact", "contains", "choice", "number")


@dataclass(frozen=True)
class ItemScores:
    """What a model says of items; each list has an entry an item, None where a way does not apply to it.

    Attributes:
        items: the items.
        options: for each way that scores options (`sum`, `token`, `char`, `byte`, `pmi`, `pmi_empty`, `letters`) the
            scores of an item's options.
        letters: the letters that were chosen, one for each order in which an item's options were given.
        verdicts: of generated answers.
        gold_nats: negative log likelihood of the right option in nats.
    """

    items: list[Item]
    options: dict[str, list[list[float] | None]]
    letters: list[list[int] | None] | None
    verdicts: list[Verdict] | None
    gold_nats: list[float | None] | None

    @property
    def ways(self) -> list[str]:
        """The names of the ways in which items were scored."""
        return [*self.options, *(WRITTEN if self.verdicts is not None else ())]

    def chosen(self, way: str) -> list[int | None] | None:
        """The option chosen for each item: the first of the best, or the one that a generated answer names. None
        where an answer names none or a way does not apply; None at all for a way that chooses no option."""
        if way in self.options:
            return [None if scores is None else scores.index(max(scores)) for scores in self.options[way]]
        if way != "choice" or self.verdicts is None:
            return None
        return [verdict.chosen for verdict in self.verdicts]

    def correct(self, way: str) -> list[bool | None]:
        """Whether each item is answered right; None where the way does not apply to it.

        Raises:
            ValueError: a way in which the items were not scored.
        """
        if way in ("exact", "contains", "number") and self.verdicts is not None:
            return [getattr(verdict, way) for verdict in self.verdicts]
        chosen = self.chosen(way)
        if chosen is None:
            raise ValueError(f"the items were not scored by {way!r}; they were by {', '.join(self.ways) or 'no way'}")
        return [index == item.answer if item.options else None for item, index in zip(self.items, chosen, strict=True)]

    def ties(self, way: str) -> int:
        """Items of which several options score best; the first of them is chosen."""
        return sum(scores is not None and scores.count(max(scores)) > 1 for scores in self.options.get(way, []))

    def unparsed(self, way: str) -> int:
        """Generated answers in which nothing is found that could be judged, and which count as wrong."""
        judged = zip(self.verdicts or [], self.correct(way), strict=False)
        if way == "choice":
            return sum(verdict.chosen is None for verdict, right in judged if right is not None)
        if way == "number":
            return sum(not verdict.has_number for verdict, right in judged if right is not None)
        return sum(not verdict.text.strip() for verdict, _ in judged) if way in WRITTEN else 0

    def record(self, index: int) -> dict[str, Any]:
        """All that is known of an item, as a line of JSON."""
        item = self.items[index]
        told: dict[str, Any] = {"item": item.number, "question": item.question}
        told |= {"options": list(item.options), "answer": item.answer} if item.options else {}
        told |= {"answers": list(item.answers)} | ({} if item.group is None else {"group": item.group})
        scores = {way: values[index] for way, values in self.options.items() if values[index] is not None}
        told |= {"scores": scores} if scores else {}
        chosen = {way: self.chosen(way) for way in self.ways}
        told["chosen"] = {way: values[index] for way, values in chosen.items() if values is not None and item.options}
        if self.verdicts is not None:
            told["generated"] = self.verdicts[index].text
        rights = {way: self.correct(way)[index] for way in self.ways}
        return told | {"correct": {way: right for way, right in rights.items() if right is not None}}


@dataclass(frozen=True)
class PreparedItems:
    """Items as prompts and continuations for one model, all of them checked; `run` scores them."""

    reader: Reader
    items: list[Item]
    settings: ItemSettings
    options: list[Continuation]
    letters: list[Continuation]
    prompts: list[str]

    def run(self) -> ItemScores:
        """Scores the items; returns and errors as those of `score_items`."""
        found: dict[str, list[list[float] | None]] = {}
        gold, chosen, verdicts = None, None, None
        items, settings = self.items, self.settings
        if self.options:
            parts = per_item(items, self.reader.score(self.options, "options"), lambda item: 3 * len(item.options))
            found = likelihoods(items, parts)
            asked = zip(items, parts, strict=True)
            gold = [None if part is None else -part[item.answer].log_likelihood for item, part in asked]
        if self.letters:
            scores = self.reader.score(self.letters, "letters")
            parts = per_item(items, scores, lambda item: len(item.options) ** (2 if settings.rotate else 1))
            found["letters"], chosen = letter_scores(items, parts, settings.rotate)
        if self.prompts:
            numbers = [item.number for item in items]
            written = self.reader.write(self.prompts, numbers, settings.max_new_tokens, "answers")
            verdicts = [judge_answer(item, text) for item, text in zip(items, written, strict=True)]
        return ItemScores(items, found, chosen, verdicts, gold)


def prepare_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    settings: ItemSettings | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> PreparedItems:
    """All of `score_items` but the forwards: what cannot be scored is refused here."""
    settings = settings or ItemSettings()
    require_ways(items, settings)
    prompter = Prompter(tokenizer, items, settings)
    glm = fills_blanks(model) if settings.glm is None else settings.glm
    reader = Reader(model, prompter.tokenizer, glm, max_length, batch_size, progress)
    closed = [index for index, item in enumerate(items) if item.options]
    options = options_asked(prompter, closed) if "likelihood" in settings.ways else []
    letters = letters_asked(prompter, closed) if "letters" in settings.ways else []
    prompts = []
    if "generation" in settings.ways:
        prompts = [prompter.cloze(index) for index in range(len(items))]
        reader.encode_prompts(prompts, [item.number for item in items], settings.max_new_tokens)
    for asked in (options, letters):
        reader.encode(asked)
    return PreparedItems(reader, list(items), settings, options, letters, prompts)


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    settings: ItemSettings | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> ItemScores:
    """Scores items in every way that the settings name.

    - By likelihood: `Question: {question}\\nAnswer:` and each option behind it; the first best one is chosen by `sum`
      (log likelihood), `token`, `char` and `byte` (that over the option's tokens, characters, UTF-8 bytes), `pmi` and
      `pmi_empty` (that less the option's log likelihood behind `Answer:`, and behind the prefix token alone).
      `sum`, `char`, `byte` and `pmi_empty` are lm-evaluation-harness' acc, acc_norm, acc_bytes and acc_mutual_info.
    - By letters: the options stand in the prompt behind letters, which are scored. With `rotate` in all cyclic orders;
      an option's score is the mean over them.
    - By generation: the prompt of the first is continued greedily, and what comes is judged (`judge_answer`).

    Args:
        model: any causal language model of transformers. To one with `attention_type="prefix"` all before an answer
            is the prefix; with GLM's blanks (`ItemSettings.glm`) an answer fills `[MASK]`, and its end is scored too.
        tokenizer: the model's.
        items: as `read_items` returns them.
        settings: ways, shots, template; None: the defaults.
        max_length: tokens that the model takes; None: as its config says.
        batch_size: sequences in one forward.
        progress: called with what is done, how much of it and how much there is.

    Raises:
        ValueError: before any forward: no items, an unknown way, items without options where these are scored only,
            too few items to show as shots, no chat template, no prefix token, or items longer than the model, which
            are named. Later only: a loss that is no number.
    """
    return prepare_items(model, tokenizer, items, settings, max_length, batch_size, progress).run()


def require_ways(items: Sequence[Item], settings: ItemSettings) -> None:
    unknown = [way for way in settings.ways if way not in WAYS]
    if unknown or not settings.ways:
        raise ValueError(f"unknown way {unknown[0]!r}" if unknown else f"no way to score items; choose of {WAYS}")
    if not items:
        raise ValueError("there are no items to score")
    if settings.max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {settings.max_new_tokens}; it must be at least 1")
    if "generation" not in settings.ways and not any(item.options for item in items):
        raise ValueError("none of the items has options: they can be scored by generation only")
    if "letters" in settings.ways:
        for item in items:
            if len(item.options) > len(LETTERS):
                raise ValueError(f"item {item.number} has {len(item.options)} options, more than there are letters")


def options_asked(prompter: Prompter, closed: Sequence[int]) -> list[Continuation]:
    """For each item its options behind its prompt, behind the bare prompt, and behind none."""
    asked, bare = [], prompter.bare()
    for index in closed:
        item = prompter.items[index]
        for prompt in (prompter.cloze(index), bare, ""):
            asked += [Continuation(prompt, prompter.answer(option), item.number) for option in item.options]
    return asked


def letters_asked(prompter: Prompter, closed: Sequence[int]) -> list[Continuation]:
    """For each item and each order of its options the letters."""
    asked = []
    for index in closed:
        item = prompter.items[index]
        for order in cyclic_orders(len(item.options), prompter.settings.rotate):
            prompt = prompter.letters(index, order)
            asked += [
                Continuation(prompt, prompter.answer(LETTERS[place]), item.number) for place in range(len(order))
            ]
    return asked


def per_item(items: Sequence[Item], scores: Sequence[ContinuationScore], count: Any) -> list[Any]:
    """The scores of each item with options; None for others. `count`: how many belong to an item."""
    waiting = iter(scores)
    return [[next(waiting) for _ in range(count(item))] if item.options else None for item in items]


def likelihoods(items: Sequence[Item], parts: Sequence[Any]) -> dict[str, list[list[float] | None]]:
    found: dict[str, list[list[float] | None]] = {way: [None] * len(items) for way in LIKELIHOODS}
    for index, (item, part) in enumerate(zip(items, parts, strict=True)):
        if part is None:
            continue
        count = len(item.options)
        after, bare, alone = part[:count], part[count : 2 * count], part[2 * count :]
        sums = [score.log_likelihood for score in after]
        divisors = {
            "token": [score.num_tokens for score in after],
            "char": [len(option) for option in item.options],
            "byte": [len(option.encode("utf-8", "surrogatepass")) for option in item.options],
        }
        found["sum"][index] = sums
        for way, sizes in divisors.items():
            found[way][index] = [total / size for total, size in zip(sums, sizes, strict=True)]
        for way, others in (("pmi", bare), ("pmi_empty", alone)):
            found[way][index] = [total - other.log_likelihood for total, other in zip(sums, others, strict=True)]
    return found


def letter_scores(
    items: Sequence[Item], parts: Sequence[Any], rotate: bool
) -> tuple[list[list[float] | None], list[list[int] | None]]:
    """The score of each item's options, a mean over orders, and the place of the letter chosen in each order."""
    means: list[list[float] | None] = []
    places: list[list[int] | None] = []
    for item, part in zip(items, parts, strict=True):
        if part is None:
            means.append(None)
            places.append(None)
            continue
        count = len(item.options)
        orders = list(cyclic_orders(count, rotate))
        by_option: list[list[float]] = [[] for _ in range(count)]
        own = []
        for number, order in enumerate(orders):
            scores = [score.log_likelihood for score in part[number * count : (number + 1) * count]]
            own.append(scores.index(max(scores)))
            for place, option in enumerate(order):
                by_option[option].append(scores[place])
        means.append([math.fsum(scores) / len(orders) for scores in by_option])
        places.append(own)
    return means, places
