"""`minillm train`: from options to a trained model, its checkpoints and its record."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import typer
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from minillm.cli.console import errors, say
from minillm.cli.loading import load_model, load_pretrained
from minillm.cli.processes import exchange, is_first, join, leave, quiet_others, together, world_size
from minillm.cli.progress import Line, LineCallback
from minillm.cli.train_command import TrainOptions
from minillm.cli.training_checkpoints import (
    NOTE,
    Begun,
    asks_for_more,
    checkpoints_of,
    close,
    find_begun,
    note_of,
    require_no_shorter,
    settle,
)
from minillm.cli.training_data import infer_objective, read_samples, say_of_turns
from minillm.cli.training_evaluation import HeldOut, count_tokens, write_samples
from minillm.cli.training_model import adapted, fresh_config, loaded_dtype, name_tokens
from minillm.cli.training_plan import (
    Machine,
    Plan,
    choose_machine,
    choose_threads,
    make_plan,
    require_buildable,
    training_arguments,
)
from minillm.cli.training_record import PICTURE, REPORT, Record, RecordCallback, record_of, require_free_record
from minillm.cli.training_report import card_section, flops_words, report, score_words
from minillm.cli.training_signals import StopCallback
from minillm.cli.training_trainer import LogitFreeTrainer, LongerCallback, OpeningCallback, load_finished
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.data.samples import Samples
from minillm.evaluation.held_out import HeldOutScore, loss_by_frequency
from minillm.experiments.memory import peak_bytes
from minillm.experiments.reporting import amount
from minillm.modeling_minillm import MiniLLMForCausalLM
from minillm.publishing.folders import (
    claimed,
    full_disk_in_words,
    mapping_in,
    new_folder,
    reserved,
    write_atomically,
)
from minillm.training import (
    DataCollatorForCausalLM,
    DataCollatorForGLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    DocumentCollator,
    SetEpochCallback,
    pack_dataset,
)
from minillm.training.put_back import random_states_kept, thread_count_kept

MASK_OF = {"causal": "causal", "prefix": "prefix", "glm": "prefix", "sft": None}
"""Objectives, and the `attention_type` that each needs."""


class Job(NamedTuple):
    """What a run trains, on what, and how."""

    options: TrainOptions
    machine: Machine
    plan: Plan
    objective: str
    tokenizer: Any
    model: Any
    collator: DocumentCollator
    samples: Samples
    held_out_samples: Samples
    rows: Any
    held_out_rows: Any


def build_model(options: TrainOptions, tokenizer: Any, precision: str = "fp32") -> Any:
    """The model to train, in the dtype of its training.

    Raises:
        ValueError: there is none, or another library's.
    """
    if options.model is None:
        return MiniLLMForCausalLM(fresh_config(options, tokenizer))
    model = load_model(options.model, dtype=loaded_dtype(options, precision), **(options.settings or {}))
    if not isinstance(model, MiniLLMForCausalLM):
        raise ValueError(f"{options.model} holds a {model.config.model_type!r} model; only MiniLLM's are trained")
    return model


def choose_objective(options: TrainOptions, config: MiniLLMConfig) -> str:
    """The given objective, that of answers where the data hold some, or the model's own; refuses one that the model's
    mask does not fit."""
    kind = config.attention_type
    if kind == "bidirectional":
        raise ValueError(
            "a bidirectional model sees the tokens that it would have to predict: train a causal or prefix one"
        )
    objective = options.objective or infer_objective(options) or kind
    if MASK_OF[objective] not in (None, kind):
        raise ValueError(
            f"--objective {objective} needs a model with attention_type={MASK_OF[objective]!r}; this one is {kind!r}"
        )
    return objective


def row_length(options: TrainOptions, config: MiniLLMConfig) -> int:
    """The tokens in a row. ValueError if the model has no positions for so many."""
    length = options.max_length or config.max_position_embeddings
    # The table of learned positions; other schemes have none.
    rows = config.position_table_size
    if rows is not None and length > rows:
        raise ValueError(
            f"max_length is {length}, but the model has a table of {rows} learned positions "
            f"(position_table_size={rows}): set --max-length to at most {rows}"
        )
    return length


def build_collator(objective: str, tokenizer: Any, options: TrainOptions, config: Any) -> DocumentCollator:
    common = {"tokenizer": tokenizer, "max_length": row_length(options, config), "seed": options.seed}
    if objective == "sft":
        return DataCollatorForSFT(**common, prompt_is_prefix=config.attention_type == "prefix")
    if objective == "glm":
        two_axes = config.position_embedding_type == "glm_2d" or config.rope_2d
        # As generate() and fill() go on.
        return DataCollatorForGLM(**common, gmask_counts=not two_axes)
    return (DataCollatorForPrefixLM if objective == "prefix" else DataCollatorForCausalLM)(**common)


def run(options: TrainOptions) -> None:
    """Trains, reports the held-out perplexity, and writes the model (with LoRA: the adapter) to `out`.

    Nobody else writes `out`, its checkpoints and its record meanwhile. Where a launcher started several processes, the
    first one writes and speaks.
    """
    quiet_others()
    with folders(options), random_states_kept(), thread_count_kept():
        try:
            train(options, checkpoints_of(options.out))
        finally:
            leave()


@contextlib.contextmanager
def folders(options: TrainOptions) -> Iterator[None]:
    """The folders of a run are free, or the run's own, and nobody else writes them meanwhile."""
    if not is_first():
        yield
        return
    checkpoints = checkpoints_of(options.out)
    begun = Begun(None, mapping_in(checkpoints / NOTE))
    kind = replacing(begun, options)
    if begun.note.get("finished") and not kind and options.out.is_dir() and any(options.out.iterdir()):
        raise ValueError(
            f"{options.out} is not empty: this run is finished; more --max-steps go on from its last checkpoint, or "
            "choose another --out"
        )
    with (
        claimed(options.out, **kind),
        reserved(checkpoints),
        reserved(record_of(options.out)),
        full_disk_in_words(checkpoints),
    ):
        yield


def replacing(begun: Begun, options: TrainOptions) -> dict[str, Any]:
    """What may stand at `out`: of a finished run that is to go on, its model."""
    return {"model_type": MiniLLMConfig.model_type, "overwrite": True} if asks_for_more(begun, options) else {}


def train(options: TrainOptions, checkpoints: Path) -> None:
    begun = find_begun(checkpoints, options)
    machine = choose_machine(options, begun)
    join(machine.device)
    with together():
        if is_first() and begun.checkpoint is None:
            require_free_record(record_of(options.out))
        job = prepare(options, machine)
        require_no_shorter(begun, job.plan.total_steps)
        threads = choose_threads(options, begun, machine, lambda: probe(job))
        arguments = training_arguments(options, job.plan, machine, checkpoints)
        require_buildable(arguments, job.model)
    note = note_of(
        options,
        precision=machine.precision,
        threads=threads,
        total_steps=job.plan.total_steps,
        lengthened=lengthened(begun, job.plan),
    )
    record = None
    if is_first():
        settle(checkpoints, begun, note)
        record = Record(record_of(options.out), begun.step)
        plan = {**note, **job.plan._asdict()}
        record.write_settings(dataclasses.asdict(options), plan, arguments, job.model.config)
    exchange(None)
    if begun.checkpoint is not None:
        say(f"going on from {begun.checkpoint}")
    Run(job, begun, arguments, checkpoints, record, note).go()


def prepare(options: TrainOptions, machine: Machine) -> Job:
    """Loads, reads and packs all that a run needs; nothing is written."""
    tokenizer = load_pretrained(AutoTokenizer, options.tokenizer or options.model, "tokenizer")
    set_seed(options.seed)
    model = build_model(options, tokenizer, machine.precision)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    row_length(options, model.config)
    objective = choose_objective(options, model.config)
    collator = build_collator(objective, tokenizer, options, model.config)
    if options.lora:
        model = adapted(model, options, tokenizer)
    samples, held_out = read_samples(options, objective, tokenizer)
    # Only now has a tokenizer without a chat template the one of its training.
    name_tokens(model.config, objective, tokenizer, options.lora)
    if getattr(collator, "prompt_is_prefix", False) and model.config.answer_start_token_id is None:
        say_of_turns(samples)
    rows = pack_dataset(samples, collator)
    held_out_rows = pack_dataset(held_out, collator, fixed_prefixes=True)
    say(f"{len(rows)} rows to train on, {len(held_out_rows)} held out, objective {objective}")
    plan = make_plan(options, len(rows))
    held_out_rows = [
        held_out_rows[index] for index in range(min(len(held_out_rows), options.eval_rows or len(held_out_rows)))
    ]
    return Job(options, machine, plan, objective, tokenizer, model, collator, samples, held_out, rows, held_out_rows)


def probe(job: Job) -> None:
    """A row forward and backward."""
    job.model(**job.collator([job.rows[0]])).loss.backward()
    job.model.zero_grad()


def lengthened(begun: Begun, plan: Plan) -> list[dict[str, int]]:
    """Where a run was made longer than it was begun for, earlier or now."""
    found = list(begun.note.get("lengthened", []))
    if begun.checkpoint is not None and begun.total_steps != plan.total_steps:
        found.append({"at": begun.step, "from": begun.total_steps, "to": plan.total_steps})
    return found


class Run:
    """A run whose settings are settled.

    Args:
        job: what is trained, on what.
        begun: what it goes on from.
        arguments: of the Trainer.
        checkpoints: their folder.
        record: None in all processes but the first.
        note: the options, as they are noted.
    """

    def __init__(
        self, job: Job, begun: Begun, arguments: Any, checkpoints: Path, record: Record | None, note: dict[str, Any]
    ) -> None:
        self.job, self.begun, self.arguments = job, begun, arguments
        self.checkpoints, self.record, self.note = checkpoints, record, note
        self.line, self.stop = Line(), StopCallback()
        batch_size = min(job.options.batch_size, 8)
        self.held_out = HeldOut(job.held_out_rows, job.collator, batch_size, self.line, self.stop)
        self.tokens_per_row = sum(len(row["input_ids"]) for row in job.rows) / len(job.rows)
        self.opening = OpeningCallback(
            lambda: job.collator([job.rows[0]]), job.plan, cast(int, job.collator.max_length)
        )
        self.started, self.seconds = time.monotonic(), 0.0

    def go(self) -> None:
        """Trains, scores and writes."""
        trainer, checkpoint = self.make_trainer(), self.begun.checkpoint
        try:
            if self.begun.step < self.job.plan.total_steps:
                with self.stop.listening():
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            elif checkpoint is not None:
                load_finished(trainer.model, checkpoint)
        finally:
            self.line.close()
        self.seconds = self.clock()
        if self.stop.stopped:
            self.end_early(trainer.state.global_step)
        score = self.last_score(trainer)
        if self.record is not None and score is not None:
            self.write(self.record, trainer.model, score)
        exchange(None)

    def last_score(self, trainer: LogitFreeTrainer) -> HeldOutScore | None:
        """The held-out losses of the model as it is in the end, which may be known already."""
        step, score = trainer.scored
        if score is not None and step == trainer.state.global_step and not self.arguments.load_best_model_at_end:
            return score
        self.held_out.stop = None
        return self.held_out.score(trainer.model)

    def clock(self) -> float:
        return time.monotonic() - self.started

    def make_trainer(self) -> LogitFreeTrainer:
        job = self.job
        tokens = job.plan.rows_per_step * self.tokens_per_row
        made: list[LogitFreeTrainer] = []
        callbacks: list[TrainerCallback] = [SetEpochCallback(job.collator), self.stop]
        if self.begun.checkpoint is not None and self.begun.total_steps != job.plan.total_steps:
            callbacks.append(LongerCallback(self.begun, job.plan))
        if self.record is not None:
            callbacks += [
                self.opening,
                LineCallback(job.objective, self.line, lambda: made[0].step_loss(), tokens),
                RecordCallback(self.record, self.clock, tokens),
            ]
        trainer = LogitFreeTrainer(
            job.model,
            self.arguments,
            train_dataset=job.rows,
            eval_dataset=None if job.options.eval_steps is None else job.held_out_rows,
            data_collator=job.collator,
            callbacks=callbacks,
        )
        made.append(trainer)
        trainer.score = lambda: self.held_out.score(trainer.model)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def end_early(self, step: int) -> None:
        """Ends the command after a signal."""
        if self.record is not None:
            self.record.draw()
        total = self.job.plan.total_steps
        errors.print(
            f"stopped after step {step} of {total}, which is saved: the same command goes on from there",
            soft_wrap=True,
        )
        raise typer.Exit(128 + self.stop.asked)

    def write(self, record: Record, model: Any, score: HeldOutScore) -> None:
        """Writes the model, the record and the note that all is done."""
        options, tokenizer = self.job.options, self.job.tokenizer
        say(f"held-out {score_words(score, options.seed)}")
        facts = self.facts(record, score)
        base = model.get_base_model() if options.lora else model
        base.training_summary = card_section(facts)
        with new_folder(options.out, **replacing(self.begun, options)) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        self.write_report(record, model, score, facts)
        close(self.checkpoints, self.note, options.keep_checkpoint)
        kept = f" (checkpoints: {self.checkpoints})" if options.keep_checkpoint else ""
        say(f"written: {options.out}{kept}")
        say(f"report: {record.folder / REPORT}")

    def write_report(self, record: Record, model: Any, score: HeldOutScore, facts: dict[str, str]) -> None:
        job = self.job
        counts = count_tokens(job.samples, model.config.vocab_size)
        samples = write_samples(model, job.tokenizer, job.held_out_samples, job.objective)
        picture = PICTURE if record.draw() else None
        where = f"`{self.checkpoints}`" if job.options.keep_checkpoint else "removed, as asked"
        facts = {**facts, **self.opening.facts, "peak of memory": amount(peak_bytes(job.machine.device), "B")}
        page = report({**facts, "checkpoints": where}, loss_by_frequency(score, counts), samples, picture)
        write_atomically(record.folder / REPORT, page)

    def facts(self, record: Record, score: HeldOutScore) -> dict[str, str]:
        """What the card and the report say of the run."""
        options, plan = self.job.options, self.job.plan
        tokens = round(plan.total_steps * plan.rows_per_step * self.tokens_per_row)
        start = f"from {options.preset}" if options.model is None else f"of {Path(options.model).name}"
        seconds = record.seconds_before + self.seconds
        facts = {
            "training": f"{'LoRA' if options.lora else 'all weights'}, {start}, objective {self.job.objective}",
            "held-out": score_words(score, options.seed),
            "steps": f"{plan.total_steps:,} of {plan.rows_per_step} rows, {tokens:,} tokens",
            "learning rate": f"{plan.learning_rate:g} at its peak, {options.schedule}, {plan.warmup_steps} steps of "
            f"warm-up, {options.optimizer}",
            "cost": f"{amount(seconds, 's')} on {self.job.machine.device} in {self.job.machine.precision}, "
            f"{world_size()} process{'es' if world_size() > 1 else ''}"
            + (f", {flops_words(self.opening.step_flops * plan.total_steps)}" if self.opening.step_flops else ""),
        }
        for longer in self.note["lengthened"]:
            facts["lengthened"] = (
                f"from {longer['from']} to {longer['to']} steps after step {longer['at']}, which is not what "
                f"{longer['to']} steps in one would have given"
            )
        return facts
