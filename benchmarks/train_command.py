"""What `minillm train` costs beside a bare Trainer: the same model on the same rows in as many steps, from folders on
disk to a folder on disk.

The command also shows progress, counts memory, notes losses, draws a curve, writes samples and a report, and keeps a
last checkpoint; the bare script trains, saves as often, scores the held-out rows and saves.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from benchmarks.timing import Comparison, Options, Stopwatch, compare, interleave, summarise
from minillm import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMTokenizer
from minillm.cli.console import console
from minillm.cli.training_options import read_options
from minillm.cli.training_run import run
from minillm.data import load_corpus, split_corpus, tokenize_documents
from minillm.evaluation import perplexity
from minillm.training import DataCollatorForCausalLM, pack_dataset

MOST = 1.02


class Plan(NamedTuple):
    """A training: `steps` of `rows` rows of `length` tokens."""

    fields: dict[str, int]
    vocab_size: int
    rows: int
    length: int
    steps: int


PLANS = {
    "full": Plan(
        {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8},
        vocab_size=2048,
        rows=8,
        length=256,
        steps=32,
    ),
    "tiny": Plan(
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        vocab_size=320,
        rows=2,
        length=32,
        steps=2,
    ),
}


def write_texts(folder: Path, files: int) -> None:
    """Some of Python's own sources."""
    folder.mkdir()
    for number, document in enumerate(load_corpus(None)[:files]):
        (folder / f"{number}.txt").write_text(document.text, "utf-8")


def write_parts(folder: Path, plan: Plan, files: int) -> None:
    """A corpus, and a fresh model with its tokenizer."""
    folder.mkdir()
    write_texts(folder / "texts", files)
    texts = [document.text for document in load_corpus(folder / "texts")]
    tokenizer = MiniLLMTokenizer.train_from_iterator(texts, vocab_size=plan.vocab_size, show_progress=False)
    config = MiniLLMConfig.for_tokenizer(tokenizer, max_position_embeddings=plan.length, **plan.fields)
    MiniLLMForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def by_command(parts: Path, plan: Plan) -> Callable[[], None]:
    """Training by the command, into a new folder each time."""

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder, quiet_console():
            run(
                read_options(
                    {
                        "model": str(parts / "model"),
                        "data": str(parts / "texts"),
                        "out": Path(folder) / "out",
                        "max_steps": plan.steps,
                        "batch_size": plan.rows,
                        "threads": 1,
                    }
                )
            )

    return train


@contextlib.contextmanager
def quiet_console() -> Any:
    """The lines are made, and go nowhere."""
    file, console.file = console.file, io.StringIO()
    try:
        yield
    finally:
        console.file = file


def by_trainer(parts: Path, plan: Plan) -> Callable[[], None]:
    """The same training in the fewest lines."""

    def train() -> None:
        tokenizer = AutoTokenizer.from_pretrained(parts / "model")
        model = AutoModelForCausalLM.from_pretrained(parts / "model")
        collator = DataCollatorForCausalLM(tokenizer, max_length=plan.length)
        rows, held_out = (
            pack_dataset(tokenize_documents(part, tokenizer), collator)
            for part in split_corpus(load_corpus(parts / "texts"))
        )
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                f"{folder}/checkpoints",
                max_steps=plan.steps,
                per_device_train_batch_size=plan.rows,
                learning_rate=5e-5,
                lr_scheduler_type="cosine",
                warmup_steps=plan.steps // 20,
                weight_decay=0.1,
                logging_steps=max(1, plan.steps // 50),
                save_steps=max(1, plan.steps // 5),
                save_total_limit=1,
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
            )
            trainer = trainer_class()(model, arguments, train_dataset=rows, data_collator=collator)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            perplexity(model, held_out, collator)
            model.save_pretrained(f"{folder}/out")
            tokenizer.save_pretrained(f"{folder}/out")

    return train


def trainer_class() -> type[Trainer]:
    """The stock Trainer, asked for a loss without logits as the command asks: else it would do other work."""

    class BareTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, {**inputs, "skip_logits": True}, *args, **kwargs)

    return BareTrainer


def measure(options: Options) -> dict[str, Any]:
    """Processor time of both, in pairs that take turns."""
    plan = PLANS["tiny" if options.tiny else "full"]
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder) / "parts", plan, 12 if options.tiny else 60)
        parts, makers = Path(folder) / "parts", {"minillm train": by_command, "bare Trainer": by_trainer}
        for make in makers.values():
            # Warm, in less than a round.
            make(parts, plan._replace(steps=1))()
        runs = {name: make(parts, plan) for name, make in makers.items()}
        times = interleave(runs, Stopwatch("cpu", "process"), options, warmup=0)
    what = f"{plan.steps} steps of {plan.rows} rows of {plan.length} tokens, processor time"
    rows = [{"what": what, "contender": name, "unit": "s", **summarise(values)} for name, values in times.items()]
    comparison = Comparison("minillm train", "bare Trainer", at_most=MOST)
    return {
        "settings": {**plan.fields, "vocab_size": plan.vocab_size, "steps": plan.steps},
        "rows": rows,
        "comparisons": compare(what, times, comparison, "time"),
        "not_measured": [],
    }
