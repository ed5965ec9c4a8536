"""`minillm train`: options from flags and a file, and a Trainer on them."""

import contextlib
import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

from minillm.cli.console import one_line, say
from minillm.cli.loading import best_device, check_checkpoint, last_complete_checkpoint, load_model, load_pretrained
from minillm.cli.progress import ProgressCallback
from minillm.cli.training_data import read_samples, say_of_turns
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.conversion.files import read_json
from minillm.evaluation import perplexity
from minillm.loss import why_logits
from minillm.modeling_minillm import MiniLLMForCausalLM
from minillm.publishing.folders import (
    claimed,
    full_disk_in_words,
    new_folder,
    require_free,
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
from minillm.training.put_back import random_states_kept

MASK_OF = {"causal": "causal", "prefix": "prefix", "glm": "prefix", "sft": None}
"""Objectives, and the `attention_type` that each needs."""

TURN_FIELDS = ("answer_start_token_id", "turn_token_ids")
BLANK_FIELDS = ("mask_token_id", "gmask_token_id", "smask_token_id", "sop_token_id")
LOWEST = {"max_steps": 1, "batch_size": 1, "max_length": 2, "learning_rate": 0.0}


@dataclass
class TrainOptions:
    """What `minillm train` needs; the names are those of its flags and of the keys of `--config`."""

    out: Path
    data: Path
    preset: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    objective: str | None = None
    lora: bool = False
    max_steps: int = 1000
    batch_size: int = 8
    max_length: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    special_tokens: bool = False


def read_options(file: Path | None, flags: dict[str, Any]) -> TrainOptions:
    """Merges a YAML or JSON file and flags; flags win.

    Raises:
        ValueError: an unknown key, a missing one, or options that contradict one another.
    """
    values = read_file(file) if file is not None else {}
    values |= {name: getattr(value, "value", value) for name, value in flags.items()}
    kinds = {field.name: field.type for field in fields(TrainOptions)}
    if unknown := sorted(set(values) - set(kinds), key=str):
        raise ValueError(f"unknown options {unknown} in {file}; allowed: {sorted(kinds)}")
    for name in ("out", "data"):
        if values.get(name) is None:
            raise ValueError(f"--{name} is missing (a flag, or a key of --config)")
    values = {name: read_value(name, value, kinds[name]) for name, value in values.items()}
    options = TrainOptions(**values)
    if (options.preset is None) == (options.model is None):
        raise ValueError("give exactly one of --preset (from scratch) and --model (go on from a model)")
    if options.preset is not None and options.tokenizer is None:
        raise ValueError("--preset needs --tokenizer: make one with `minillm tokenizer train`")
    if options.preset is not None and options.lora:
        raise ValueError("--lora adapts a trained model: give --model in place of --preset")
    if options.objective not in (None, *MASK_OF):
        raise ValueError(f"--objective {options.objective!r} is unknown; allowed: {', '.join(MASK_OF)}")
    return options


def read_file(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    try:
        values = yaml.safe_load(Path(file).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is neither YAML nor JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a mapping of options")
    return values


def read_value(name: str, value: Any, kind: Any) -> Any:
    """A value of `--config` or of a flag in the type of its option."""
    kinds = get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return None
    if Path in kinds and isinstance(value, (str, Path)):
        return Path(value)
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML reads 1e-3 as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) not in kinds:
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"the option {name} must be {names}, not {value!r}")
    if name in LOWEST and not LOWEST[name] <= value < math.inf:  # pyright: ignore[reportOperatorIssue]: those are numbers
        raise ValueError(f"the option {name} is {value}; it must be at least {LOWEST[name]}")
    return value


def build_model(options: TrainOptions, tokenizer: Any) -> Any:
    if options.model is not None:
        model = load_model(options.model)
        if not isinstance(model, MiniLLMForCausalLM):
            raise ValueError(f"{options.model} holds a {model.config.model_type!r} model; only MiniLLM's are trained")
        return model
    overrides = {"max_position_embeddings": options.max_length} if options.max_length else {}
    return MiniLLMForCausalLM(MiniLLMConfig.for_tokenizer(tokenizer, options.preset, **overrides))


def choose_objective(options: TrainOptions, config: MiniLLMConfig) -> str:
    """The given objective, or the model's own; refuses one that the model's mask does not fit."""
    kind = config.attention_type
    if kind == "bidirectional":
        raise ValueError(
            "a bidirectional model sees the tokens that it would have to predict: train a causal or prefix one"
        )
    objective = options.objective or kind
    if MASK_OF[objective] not in (None, kind):
        raise ValueError(
            f"--objective {objective} needs a model with attention_type={MASK_OF[objective]!r}; this one is {kind!r}"
        )
    return objective


def build_collator(objective: str, tokenizer: Any, options: TrainOptions, config: Any) -> DocumentCollator:
    length = options.max_length or config.max_position_embeddings
    # The table of learned positions; other schemes have none.
    rows = config.position_table_size
    if rows is not None and length > rows:
        raise ValueError(
            f"max_length is {length}, but the model has a table of {rows} learned positions "
            f"(position_table_size={rows}): set --max-length to at most {rows}"
        )
    common = {"tokenizer": tokenizer, "max_length": length, "seed": options.seed}
    if objective == "sft":
        return DataCollatorForSFT(**common, prompt_is_prefix=config.attention_type == "prefix")
    if objective == "glm":
        two_axes = config.position_embedding_type == "glm_2d" or config.rope_2d
        # As generate() and fill() go on.
        return DataCollatorForGLM(**common, gmask_counts=not two_axes)
    return (DataCollatorForPrefixLM if objective == "prefix" else DataCollatorForCausalLM)(**common)


def go_on_from(checkpoints: Path, options: TrainOptions) -> str | None:
    """The checkpoint of an interrupted run with the same options; notes them for the next run.

    Raises:
        ValueError: the folder of checkpoints belongs to a run with other options, or to something else, or the
            checkpoint is damaged.
    """
    note = checkpoints / "options.json"
    now = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    if not note.exists():
        require_free(checkpoints)
    checkpoint = last_complete_checkpoint(checkpoints)
    if checkpoint is None:
        # Nothing is lost of a run that failed before its first checkpoint, so its options do not bind.
        remove_unfinished(checkpoints, None)
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(now, indent=2))
        return None
    then = read_json(note)
    differing = {name: value for name, value in then.items() if now.get(name) != value}
    if differing:
        raise ValueError(
            f"{checkpoints} was begun with other options ({differing}): repeat them, remove it, or choose another "
            "--out"
        )
    check_checkpoint(checkpoint)
    remove_unfinished(checkpoints, checkpoint)
    say(f"going on from {checkpoint}")
    return str(checkpoint)


def remove_unfinished(checkpoints: Path, complete: Path | None) -> None:
    """Removes what a run left that was ended while it wrote a checkpoint: a full disk would stay full."""
    found = [*checkpoints.glob("checkpoint-*"), *checkpoints.glob(".checkpoint-*.partial")]
    newest = -1 if complete is None else int(complete.name.partition("-")[2])
    for path in found:
        number = re.fullmatch(r"\.?checkpoint-(\d+)(\.partial)?", path.name)
        if number and int(number[1]) > newest:
            shutil.rmtree(path)


def training_arguments(options: TrainOptions, checkpoints: Path) -> TrainingArguments:
    """What the stock Trainer is told: a cosine schedule, and a checkpoint after each fifth of the steps."""
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = 2e-3 if options.lora else 1e-3
    return TrainingArguments(
        str(checkpoints),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.max_steps // 20,
        weight_decay=0.1,
        logging_steps=max(1, options.max_steps // 50),
        save_steps=max(1, options.max_steps // 5),
        save_total_limit=1,
        seed=options.seed,
        use_cpu=best_device().type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )


class LogitFreeTrainer(Trainer):
    """Asks for the loss without logits in each training step, so that the config of the model it saves does not."""

    skips_logits: bool | None = None

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.skips_logits is None:
            # Only now is the head as it trains: adapted, or sharded over devices.
            reason = why_logits(self.accelerator.unwrap_model(model))
            if reason is not None:
                say(f"each step holds all logits, which takes memory: {reason}")
            self.skips_logits = reason is None
        if self.skips_logits and model.training:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)


def name_tokens(config: MiniLLMConfig, objective: str, tokenizer: Any, is_adapter: bool) -> None:
    """Names in a prefix model's config the tokens by which `generate()` reads a prompt as the collator does."""
    fields = {"glm": BLANK_FIELDS, "sft": TURN_FIELDS if config.attention_type == "prefix" else ()}.get(objective, ())
    named = {name: getattr(tokenizer, name, None) for name in fields}
    missing = {name: value for name, value in named.items() if getattr(config, name) != value}
    for name, value in named.items():
        setattr(config, name, value)
    if missing and is_adapter:
        say(
            "the adapter cannot carry what `generate()` has to know of the tokens: set "
            f"{', '.join(f'{name}={value}' for name, value in missing.items())} in the config.json of the model"
        )


def run(options: TrainOptions) -> None:
    """Trains, reports the held-out perplexity, and writes the model (with LoRA: the adapter) to `out`.

    Nobody else writes `out` and its checkpoints meanwhile.
    """
    checkpoints = options.out.with_name(f"{options.out.name}-checkpoints")
    with claimed(options.out), reserved(checkpoints), full_disk_in_words(checkpoints), random_states_kept():
        train(options, checkpoints)


def train(options: TrainOptions, checkpoints: Path) -> None:
    name = options.tokenizer or options.model or ""
    tokenizer = load_pretrained(AutoTokenizer, name, "tokenizer")
    set_seed(options.seed)
    model = build_model(options, tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    objective = choose_objective(options, model.config)
    collator = build_collator(objective, tokenizer, options, model.config)
    name_tokens(model.config, objective, tokenizer, options.lora)
    train_samples, held_out = read_samples(options, objective, tokenizer)
    if getattr(collator, "prompt_is_prefix", False) and model.config.answer_start_token_id is None:
        say_of_turns(train_samples)
    rows = pack_dataset(train_samples, collator)
    held_out_rows = pack_dataset(held_out, collator, fixed_prefixes=True)
    say(f"{len(rows)} rows to train on, {len(held_out_rows)} held out, objective {objective}")
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
    checkpoint = go_on_from(checkpoints, options)
    arguments = training_arguments(options, checkpoints)
    callbacks = [SetEpochCallback(collator), ProgressCallback(objective)]
    trainer = LogitFreeTrainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    trained: Any = trainer.model
    with new_folder(options.out) as folder:
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    score = perplexity(trained, held_out_rows, collator)
    say(f"held-out perplexity {score.perplexity:.2f} on {score.num_tokens:,} tokens")
    say(f"written: {options.out} (checkpoints: {checkpoints})")
