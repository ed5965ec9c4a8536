"""`minillm evaluate`: texts, items and tasks of lm-evaluation-harness, for one model or two."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minillm.cli.console import errors, one_line, say
from minillm.cli.evaluation_tables import show
from minillm.cli.loading import (
    adapter_config,
    best_device,
    check_adapter,
    load_model,
    load_tokenizer,
    readable_errors,
    require_all_weights,
)
from minillm.data.corpus import TextDocument, load_corpus
from minillm.evaluation.bits_per_byte import (
    DocumentLoss,
    PreparedTexts,
    loss_difference,
    prepare_documents,
    summarize_losses,
)
from minillm.evaluation.item_report import changed_items, compare_items, differing_items, summarize_items
from minillm.evaluation.item_scores import WAYS, ItemScores, PreparedItems, prepare_items
from minillm.evaluation.items import Item, ItemSettings, read_items
from minillm.evaluation.likelihood import fills_blanks
from minillm.experiments.reporting import environment, write_figures
from minillm.publishing.folders import new_folder, write_atomically

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What the command was given; a field is a flag."""

    model: str
    data: Path | None = None
    items: Path | None = None
    tasks: str | None = None
    compare: str | None = None
    adapter: str | None = None
    out: Path | None = None
    ways: tuple[str, ...] = ()
    shots: int = 0
    shot_file: Path | None = None
    rotate: bool = False
    chat_template: bool = False
    glm: bool | None = None
    task_folder: Path | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    limit: int | None = None
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0
    special_tokens: bool = False


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated, read and checked."""

    documents: list[TextDocument]
    items: list[Item]
    settings: ItemSettings
    tasks: list[str]
    task_manager: Any


@dataclass(frozen=True)
class Prepared:
    """What is to be scored, encoded for one model."""

    name: str
    model: Any
    tokenizer: Any
    bars: "Bars"
    texts: PreparedTexts | None
    items: PreparedItems | None


@dataclass(frozen=True)
class Judged:
    """What came out for one model."""

    losses: list[DocumentLoss] | None
    scores: ItemScores | None
    harness: dict[str, Any] | None


def run(options: Options) -> None:
    """Evaluates, prints tables, and writes the folder that was asked for.

    Raises:
        ValueError: nothing to evaluate, flags that do not fit together, or whatever is wrong with data or model.
    """
    asked = read_asked(options)
    names = [options.model] + ([] if options.compare is None else [options.compare])
    with contextlib.ExitStack() as stack:
        # Claimed first: hours of work are not lost to a folder that cannot be written.
        folder = None if options.out is None else stack.enter_context(new_folder(options.out))
        # All models are loaded, and everything is encoded for them, before the first forward of any.
        loaded = [load(name, options, number == 0) for number, name in enumerate(names)]
        prepared = [prepare(name, *pair, asked, options) for name, pair in zip(names, loaded, strict=True)]
        judged = [judge(each, asked, options) for each in prepared]
        figures = summarize(judged, options)
        if folder is not None:
            write(folder, figures, judged, asked)
    show(figures, names)
    if options.out is not None:
        say(f"written: {options.out}")


def read_asked(options: Options) -> Asked:
    """Texts, items and names of tasks, before a model is loaded."""
    require_fitting(options)
    if options.device is not None:
        check_device(options.device)
    documents = [] if options.data is None else load_corpus(options.data)
    items = [] if options.items is None else read_items(options.items)
    # Solved items come from all of a file, however few of its items are asked.
    shown = items if options.shot_file is None else read_items(options.shot_file)
    asked = items[: options.limit]
    settings = ItemSettings(
        ways=options.ways or (WAYS if any(item.options for item in asked) else ("generation",)),
        shots=options.shots,
        shot_items=shown,
        rotate=options.rotate,
        chat_template=options.chat_template,
        glm=options.glm,
        max_new_tokens=options.max_new_tokens or ItemSettings.max_new_tokens,
        seed=options.seed,
    )
    manager = None
    tasks = [] if options.tasks is None else [name.strip() for name in options.tasks.split(",") if name.strip()]
    if options.tasks is not None:
        from minillm.evaluation.harness import find_tasks

        manager = find_tasks(tasks, options.task_folder)
    return Asked(documents[: options.limit], asked, settings, tasks, manager)


def require_fitting(options: Options) -> None:
    """Refuses flags that would be of no use beside the others."""
    if options.data is None and options.items is None and options.tasks is None:
        raise ValueError("nothing to evaluate: give --data, --items or --tasks")
    needs = {
        ("items",): ("ways", "shot_file", "rotate", "max_new_tokens"),
        ("items", "tasks"): ("shots", "chat_template"),
        ("data", "items"): ("glm",),
        ("tasks",): ("task_folder",),
        ("data",): ("special_tokens",),
    }
    for wanted, names in needs.items():
        for name in names:
            given = getattr(options, name)
            if given not in (None, False, 0, ()) and all(getattr(options, each) is None for each in wanted):
                flag = "way" if name == "ways" else name.replace("_", "-")
                raise ValueError(f"--{flag} needs {' or '.join(f'--{each}' for each in wanted)}")
    if options.shot_file is not None and not options.shots:
        raise ValueError("--shot-file needs --shots: how many of its items to show before each")
    if options.rotate and options.ways and "letters" not in options.ways:
        raise ValueError("--rotate needs --way letters: options have no letters otherwise")


def check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def load(name: str, options: Options, is_first: bool) -> tuple[Any, Any]:
    """A model, the first perhaps with an adapter on top, and its tokenizer."""
    tokenizer = load_tokenizer(name)
    model = load_model(name, allow_adapter=True, dtype=DTYPES[options.dtype])
    if is_first and options.adapter is not None:
        put_on(model, options.adapter)
    return model.eval(), tokenizer


def put_on(model: Any, adapter: str) -> None:
    """Puts an adapter on a model."""
    if adapter_config(adapter) is None:
        raise ValueError(f"{adapter} is no adapter: there is no adapter_config.json in it")
    with readable_errors(adapter, "adapter"):
        check_adapter(adapter, model.config)
        found = model.load_adapter(adapter)
    require_all_weights(adapter, found.to_dict(), "an adapter for this model")


def prepare(name: str, model: Any, tokenizer: Any, asked: Asked, options: Options) -> Prepared:
    """Texts and items for one model; what it cannot take is refused here."""
    bars, texts, items = Bars(), None, None
    length, batch_size = options.max_length, options.batch_size
    if asked.documents:
        glm = fills_blanks(model) if options.glm is None else options.glm
        texts = prepare_documents(model, tokenizer, asked.documents, length, options.special_tokens, glm)
    if asked.items:
        items = prepare_items(model, tokenizer, asked.items, asked.settings, length, batch_size, bars)
    return Prepared(name, model, tokenizer, bars, texts, items)


def judge(prepared: Prepared, asked: Asked, options: Options) -> Judged:
    """Everything that is asked, of one model."""
    losses, scores, harness = None, None, None
    with on_device(prepared.model, options.device, stays=options.compare is None):
        with prepared.bars.shown(prepared.name):
            if prepared.texts is not None:
                losses = prepared.texts.run(options.batch_size, prepared.bars)
            if prepared.items is not None:
                scores = prepared.items.run()
        if asked.tasks:
            harness = run_tasks(prepared.model, prepared.tokenizer, asked, options)
    return Judged(losses, scores, harness)


@contextlib.contextmanager
def on_device(model: Any, device: str | None, stays: bool) -> Iterator[None]:
    """A model on its device; unless it stays, its memory there is free afterwards."""
    wanted = best_device() if device is None else torch.device(device)
    if model.device.type != wanted.type or wanted.index not in (None, model.device.index):
        model.to(wanted)
    yield
    if not stays:
        model.to("cpu")


def run_tasks(model: Any, tokenizer: Any, asked: Asked, options: Options) -> dict[str, Any]:
    from minillm.evaluation.harness import run_harness

    with harness_errors():
        return run_harness(
            model,
            tokenizer,
            asked.tasks,
            batch_size=options.batch_size,
            max_length=options.max_length,
            task_manager=asked.task_manager,
            num_fewshot=options.shots or None,
            limit=options.limit,
            apply_chat_template=options.chat_template,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )


@contextlib.contextmanager
def harness_errors() -> Iterator[None]:
    """The errors of tasks, which their files make of all kinds, in one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"lm-evaluation-harness: {type(error).__name__}: {one_line(error)}") from error


class Bars:
    """Called with what is done: bars on a terminal while `shown`, with the time that is left; else nothing."""

    def __init__(self) -> None:
        self.bars: Progress | None = None
        self.bar_of: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.bars is None:
            return
        if what not in self.bar_of:
            self.bar_of[what] = self.bars.add_task(what, total=total)
        self.bars.update(self.bar_of[what], completed=done)

    @contextlib.contextmanager
    def shown(self, name: str) -> Iterator[None]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as self.bars:
            if errors.is_terminal:
                errors.print(f"evaluating {name}", markup=False, highlight=False)
            yield
        self.bars, self.bar_of = None, {}


def summarize(judged: Sequence[Judged], options: Options) -> dict[str, Any]:
    """All figures, as results.json holds them."""
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    figures: dict[str, Any] = {"settings": told, "environment": environment(), "models": []}
    for one in judged:
        figures["models"].append(
            {
                "data": None if one.losses is None else nested(summarize_losses(one.losses, options.seed)._asdict()),
                "items": None if one.scores is None else summarize_items(one.scores, options.seed),
                "tasks": None if one.harness is None else one.harness["results"],
            }
        )
    if len(judged) == 2:
        model, base = judged
        compared: dict[str, Any] = {}
        if model.losses is not None and base.losses is not None:
            difference = loss_difference(model.losses, base.losses, options.seed)
            compared["data"] = {"bits_per_byte": difference._asdict()}
        if model.scores is not None and base.scores is not None:
            compared["items"] = compare_items(model.scores, base.scores, options.seed)
        figures["compared"] = compared
    return figures


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Named tuples as mappings, which JSON would make lists of."""
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in values.items()}


def write(folder: Path, figures: dict[str, Any], judged: Sequence[Judged], asked: Asked) -> None:
    """results.json, and as lines of JSON documents, items, and the items that ways or models differ in."""
    write_figures(folder / "results.json", figures)
    for one, prefix in zip(judged, ("", "base-"), strict=False):
        if one.losses is not None:
            write_lines(folder / f"{prefix}documents.jsonl", [loss._asdict() for loss in one.losses])
        if one.scores is not None:
            write_lines(
                folder / f"{prefix}items.jsonl", [one.scores.record(index) for index in range(len(asked.items))]
            )
            write_lines(folder / f"{prefix}differing.jsonl", differing_items(one.scores))
        for task, samples in (one.harness or {}).get("samples", {}).items():
            write_lines(folder / f"{prefix}task-{task.replace('/', '-')}.jsonl", samples)
    scores = [one.scores for one in judged if one.scores is not None]
    if len(scores) == 2:
        write_lines(folder / "changed.jsonl", changed_items(*scores))


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    write_atomically(path, "".join(lines))
