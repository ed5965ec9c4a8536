"""`minillm demo`: a tokenizer, three small models and a LoRA fine-tune on text that every machine with Python has.

The work is cut into stages. Each leaves a published folder and an entry in `state.json`; a later run with the same
settings skips what is done, and goes on from the Trainer's last checkpoint inside a stage.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from minillm.cli.console import console
from minillm.cli.loading import best_device, last_complete_checkpoint
from minillm.cli.progress import ProgressCallback, Schedule, fastest_thread_count
from minillm.cli.report import write_report
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.data import (
    CorpusError,
    TextDocument,
    cut_document,
    docstring_prose,
    load_corpus,
    split_corpus,
    tokenize_documents,
)
from minillm.evaluation import BigramModel, UnigramModel, ngram_perplexity, perplexity
from minillm.modeling_minillm import MiniLLMForCausalLM
from minillm.publishing.folders import new_folder, write_atomically
from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer
from minillm.training import (
    DataCollatorForCausalLM,
    DataCollatorForPrefixLM,
    DocumentCollator,
    SetEpochCallback,
    pack_dataset,
)
from minillm.training.put_back import random_states_kept, thread_count_kept
from minillm.version import __version__

VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "prefix": {"attention_type": "prefix"},
    "alibi": {"position_embedding_type": "alibi"},
}
ARCHITECTURE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # About hidden_size ** -0.5: so narrow a model learns far more slowly from the usual 0.02.
    "initializer_range": 0.08,
}
BATCH_SIZE = 4
LENGTH = 256
TOKENIZER_CHARACTERS = 4_000_000
SAMPLE_CHARACTERS = 2000
HELD_OUT_ROWS = 160
LORA_SHARE = 0.25
LEAST_LORA_STEPS = 4
PROMPTS = ("def __init__(self", "import ", "    return ")


@dataclass(frozen=True)
class Settings:
    """What a run is; a folder that was begun with other settings is refused."""

    corpus: str | None
    steps: int
    vocab_size: int
    seed: int
    version: str = __version__


class Demo:
    """One run of the demo into a folder.

    Args:
        out: where models, report and state go.
        settings: corpus (None: Python's standard library), steps per variant, vocabulary and seed.

    Raises:
        ValueError: the folder was begun with other settings, or the corpus cannot be used.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out = out
        self.settings = settings
        self.state_file = out / "state.json"
        self.state = self._read_state()
        self.started = time.monotonic() - self.state.get("seconds", 0.0)
        self.device = best_device().type
        self.schedule = Schedule(settings.steps * len(VARIANTS) + self.lora_steps)

    @property
    def lora_steps(self) -> int:
        return max(LEAST_LORA_STEPS, round(self.settings.steps * LORA_SHARE))

    def _read_state(self) -> dict[str, Any]:
        fresh = {"settings": asdict(self.settings), "seconds": 0.0, "stages": {}}
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file: choose another --out")
        if not self.state_file.exists():
            if self.out.exists() and any(self.out.iterdir()):
                raise ValueError(f"{self.out} is not empty and holds no earlier demo: choose another --out")
            return fresh
        try:
            state = json.loads(self.state_file.read_text("utf-8"))
            begun, _ = state["settings"], state["stages"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.state_file} is damaged ({error}): choose another --out") from error
        if begun != fresh["settings"]:
            differing = {key: value for key, value in begun.items() if fresh["settings"].get(key) != value}
            raise ValueError(
                f"{self.out} was begun with other settings ({differing}): repeat them, or choose another --out"
            )
        return state

    def finish(self, stage: str, result: dict[str, Any]) -> None:
        self.state["stages"][stage] = result
        self.state["seconds"] = time.monotonic() - self.started
        write_atomically(self.state_file, json.dumps(self.state, indent=2))

    def done(self, stage: str) -> dict[str, Any] | None:
        result = self.state["stages"].get(stage)
        published = stage in (*VARIANTS, "tokenizer", "lora")
        if result is not None and published and not (self.out / stage).is_dir():
            console.print(f"{stage} was finished in an earlier run, but its folder is gone: made again")
            return None
        if result is not None:
            console.print(f"[green]skipped[/] {stage}: finished in an earlier run")
        return result

    @random_states_kept()
    @thread_count_kept()
    def run(self) -> dict[str, Any]:
        """Runs all stages and returns the report's figures."""
        # Read and split before anything is written, so that a bad corpus leaves no trace.
        self.train_texts, self.held_out_texts = split_corpus(load_corpus(self.settings.corpus))
        self.other_texts = other_kind_of_text(self.train_texts, self.held_out_texts)
        characters = sum(len(document.text) for document in self.train_texts)
        console.print(
            f"corpus: {len(self.train_texts)} documents to train on ({characters:,} characters), "
            f"{len(self.held_out_texts)} held out"
        )
        self.tokenizer = self.make_tokenizer()
        self.train_samples = self.sample(self.train_texts, self.settings.steps * BATCH_SIZE)
        self.held_out_samples = self.sample(self.held_out_texts, HELD_OUT_ROWS)
        baselines = self.score_baselines()
        self.choose_threads()
        variants = {name: self.train_variant(name, fields) for name, fields in VARIANTS.items()}
        lora = self.tune()
        texts = self.visit_as_stranger()
        report = {"baselines": baselines, "variants": variants, "lora": lora}
        return write_report(self.out, report, texts, asdict(self.settings), self.state["seconds"])

    def make_tokenizer(self) -> MiniLLMTokenizer:
        folder = self.out / "tokenizer"
        if self.done("tokenizer") is not None:
            return MiniLLMTokenizer.from_pretrained(folder)
        texts, taken = [], 0
        for document in self.train_texts:
            texts.append(document.text)
            taken += len(document.text)
            if taken >= TOKENIZER_CHARACTERS:
                break
        console.print(f"training a byte-level BPE tokenizer of {self.settings.vocab_size} tokens ...")
        tokenizer = MiniLLMTokenizer.train_from_iterator(
            texts, vocab_size=self.settings.vocab_size, show_progress=console.is_terminal
        )
        with self.replaced(folder) as partial:
            tokenizer.save_pretrained(partial)
        self.finish("tokenizer", {"tokens": len(tokenizer)})
        return tokenizer

    def sample(self, documents: list, rows: int) -> list[dict[str, list[int]]]:
        """Tokenized parts of documents, in an order that depends on the seed, enough to fill `rows` rows.

        Whole documents differ so much in length and kind that a few long tables of numbers could make up most of it.
        """
        parts = [part for document in documents for part in cut_document(document, SAMPLE_CHARACTERS)]
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(self.settings.seed)).tolist()
        samples, tokens = [], 0
        for index in order:
            samples += tokenize_documents([parts[index]], self.tokenizer)
            tokens += len(samples[-1]["input_ids"])
            if tokens >= rows * LENGTH:
                break
        return samples

    def collator(self, name: str) -> DocumentCollator:
        kind = DataCollatorForPrefixLM if name == "prefix" else DataCollatorForCausalLM
        return kind(self.tokenizer, max_length=LENGTH, padding="max_length", seed=self.settings.seed)

    def held_out_rows(self, collator: DocumentCollator, samples: list | None = None) -> list:
        return pack_dataset(samples or self.held_out_samples, collator, fixed_prefixes=True)[:HELD_OUT_ROWS]

    def score_baselines(self) -> dict[str, Any]:
        """Unigram and bigram perplexity on the tokens that the causal models score, and on the prefix model's."""
        if (result := self.done("baselines")) is not None:
            return result
        documents = [sample["input_ids"] for sample in self.train_samples]
        result = {}
        for name in ("causal", "prefix"):
            collator = self.collator(name)
            rows = self.held_out_rows(collator)
            scores = {}
            for kind, model in (("unigram", UnigramModel), ("bigram", BigramModel)):
                score = ngram_perplexity(model(documents, len(self.tokenizer)), rows, collator)
                scores |= {kind: score.perplexity, "tokens": score.num_tokens}
            result |= scores if name == "causal" else {"prefix": scores}
        self.finish("baselines", result)
        return result

    def choose_threads(self) -> None:
        """Two threads on a busy machine are far slower than one: measures, rather than believes."""
        if self.device != "cpu" or all(name in self.state["stages"] for name in (*VARIANTS, "lora")):
            return
        if "threads" in self.state["stages"]:
            # Sums of another number of threads are rounded otherwise: a resumed run goes on as it began.
            torch.set_num_threads(self.state["stages"]["threads"]["count"])
            return
        model, collator = self.new_model({}), self.collator("causal")
        batch = collator(self.held_out_rows(collator)[:BATCH_SIZE])
        threads, seconds = fastest_thread_count(lambda: model(**batch).loss.backward())
        torch.set_num_threads(threads)
        self.finish("threads", {"count": threads})
        console.print(f"{threads} thread{'s' if threads > 1 else ''}: {seconds:.2f} s for a forward and backward pass")

    def new_model(self, fields: dict[str, Any]) -> MiniLLMForCausalLM:
        set_seed(self.settings.seed)
        return MiniLLMForCausalLM(MiniLLMConfig.for_tokenizer(self.tokenizer, **ARCHITECTURE, **fields))

    def train_variant(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        if (result := self.done(name)) is not None:
            self.schedule.skip(self.settings.steps)
            return result
        collator = self.collator(name)
        rows = pack_dataset(self.train_samples, collator)
        model = self.new_model(fields)
        curve = self.train(name, model, rows, collator, self.settings.steps, learning_rate=4e-3)
        score = perplexity(model, self.held_out_rows(collator), collator)
        self.publish(name, model)
        result = {"perplexity": score.perplexity, "tokens": score.num_tokens, "curve": curve}
        self.finish(name, result)
        console.print(f"[bold]{name}[/]: held-out perplexity {score.perplexity:.2f} on {score.num_tokens:,} tokens")
        return result

    def train(
        self, name: str, model: Any, rows: Any, collator: DocumentCollator, steps: int, learning_rate: float
    ) -> list[tuple[float, float]]:
        """Trains with the stock Trainer, from its last checkpoint if there is one; returns (step, loss) pairs."""
        folder = self.out / "checkpoints" / name
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=max(1, steps // 40),
            save_steps=max(1, steps // 4),
            save_total_limit=1,
            seed=self.settings.seed,
            use_cpu=self.device == "cpu",
            disable_tqdm=True,
            report_to="none",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[SetEpochCallback(collator), ProgressCallback(name, self.schedule)],
        )
        # Its own printer writes a dictionary a step into the progress bar.
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint is not None:
            console.print(f"{name}: going on from {checkpoint.name}")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    @staticmethod
    def replaced(folder: Path) -> AbstractContextManager[Path]:
        """A folder to write into, in the place of what an earlier run that did not finish its stage has left."""
        return new_folder(folder, MiniLLMConfig.model_type, overwrite=True)

    def publish(self, name: str, model: MiniLLMForCausalLM) -> None:
        with self.replaced(self.out / name) as partial:
            model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)

    def tune(self) -> dict[str, Any]:
        """LoRA on text of another kind: the causal model before and after, on held-out text of that kind."""
        if (result := self.done("lora")) is not None:
            return result
        steps = self.lora_steps
        collator = self.collator("causal")
        text, train_texts, held_out_texts = self.other_texts
        rows = pack_dataset(self.sample(train_texts, steps * BATCH_SIZE), collator)
        held_out = self.held_out_rows(collator, self.sample(held_out_texts, HELD_OUT_ROWS))
        base = MiniLLMForCausalLM.from_pretrained(self.out / "causal")
        base.to(self.device)  # pyright: ignore[reportArgumentType]: transformers wraps it without types
        before = perplexity(base, held_out, collator)
        set_seed(self.settings.seed)
        adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
        trained, total = adapted.get_nb_trainable_parameters()
        console.print(f"LoRA trains {trained:,} of {total:,} parameters")
        curve = self.train("lora", adapted, rows, collator, steps, learning_rate=4e-3)
        with self.replaced(self.out / "adapter") as partial:
            adapted.save_pretrained(str(partial))
        merged: Any = adapted.merge_and_unload()
        after = perplexity(merged, held_out, collator)
        self.publish("lora", merged)
        result = {
            "text": text,
            "perplexity_before": before.perplexity,
            "perplexity_after": after.perplexity,
            "tokens": after.num_tokens,
            "curve": curve,
        }
        self.finish("lora", result)
        console.print(f"[bold]lora[/]: perplexity on {text} {before.perplexity:.2f} -> {after.perplexity:.2f}")
        return result

    def visit_as_stranger(self) -> dict[str, list[str]]:
        """Text from every published model, generated by a process that cannot import MiniLLM."""
        if (result := self.done("texts")) is not None:
            return result
        names = (*VARIANTS, "lora")
        folders = [str((self.out / name).resolve()) for name in names]
        with tempfile.TemporaryDirectory() as modules:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("stranger_process.py")), json.dumps(PROMPTS), *folders],
                env={**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            raise ValueError(f"the published models do not load without MiniLLM: {done.stderr.strip()[-500:]}")
        console.print("loaded and generated in a process without MiniLLM: " + ", ".join(names))
        texts = dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))
        self.finish("texts", texts)
        return texts


def other_kind_of_text(
    train: list[TextDocument], held_out: list[TextDocument]
) -> tuple[str, list[TextDocument], list[TextDocument]]:
    """What the fine-tune learns, in words, to train on and held out: the docstrings of Python sources; for any other
    corpus its lines backwards."""
    try:
        return "docstring prose", docstring_prose(train), docstring_prose(held_out)
    except CorpusError:
        return "lines backwards", [backwards(document) for document in train], [backwards(doc) for doc in held_out]


def backwards(document: TextDocument) -> TextDocument:
    return document._replace(text="\n".join(line[::-1] for line in document.text.split("\n")))
