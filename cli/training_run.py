"""`minillm train`: options from flags and a file, and the stock Trainer on them."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.cli.console import console, replaced_folder
from minillm.cli.progress import ProgressCallback
from minillm.evaluation import perplexity
from minillm.training import (
    DataCollatorForCausalLM,
    DataCollatorForPrefixLM,
    DataCollatorForSFT,
    SetEpochCallback,
    load_corpus,
    pack_dataset,
    split_corpus,
    tokenize_documents,
)

OBJECTIVES = ("causal", "prefix", "sft")


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


def read_options(file: Path | None, flags: dict[str, Any]) -> TrainOptions:
    """Merges a YAML or JSON file and flags; flags win.

    Raises:
        ValueError: an unknown key, a missing one, or options that contradict one another.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = yaml.safe_load(Path(file).read_text("utf-8")) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{file} must hold a mapping of options")
    flags = {name: getattr(value, "value", value) for name, value in flags.items()}
    values |= flags
    known = {field.name for field in fields(TrainOptions)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown options {unknown} in {file}; allowed: {sorted(known)}")
    for name in ("out", "data"):
        if name not in values:
            raise ValueError(f"--{name} is missing (a flag, or a key of --config)")
        values[name] = Path(values[name])
    options = TrainOptions(**values)
    if (options.preset is None) == (options.model is None):
        raise ValueError("give exactly one of --preset (from scratch) and --model (go on from a model)")
    if options.preset is not None and options.tokenizer is None:
        raise ValueError("--preset needs --tokenizer: make one with `minillm tokenizer train`")
    if options.objective not in (None, *OBJECTIVES):
        raise ValueError(f"--objective {options.objective!r} is unknown; allowed: {', '.join(OBJECTIVES)}")
    return options


def build_model(options: TrainOptions, tokenizer: Any) -> Any:
    if options.model is not None:
        return AutoModelForCausalLM.from_pretrained(options.model)
    overrides = {"max_position_embeddings": options.max_length} if options.max_length else {}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return MiniLLMForCausalLM(MiniLLMConfig.from_preset(options.preset, vocab_size=len(tokenizer), **ids, **overrides))


def choose_objective(options: TrainOptions, config: Any) -> str:
    """The given objective, or the model's own; refuses a prefix for a model that has none."""
    kind = getattr(config, "attention_type", "causal")
    objective = options.objective or ("prefix" if kind == "prefix" else "causal")
    if objective == "prefix" and kind != "prefix":
        raise ValueError(f"--objective prefix needs a model with attention_type='prefix'; this one is {kind!r}")
    return objective


def build_collator(objective: str, tokenizer: Any, options: TrainOptions, config: Any) -> DataCollatorForCausalLM:
    length = options.max_length or config.max_position_embeddings
    common = {"tokenizer": tokenizer, "max_length": length, "seed": options.seed}
    if objective == "sft":
        return DataCollatorForSFT(**common, prompt_is_prefix=getattr(config, "attention_type", None) == "prefix")
    return (DataCollatorForPrefixLM if objective == "prefix" else DataCollatorForCausalLM)(**common)


def read_samples(options: TrainOptions, objective: str, tokenizer: Any) -> tuple[list, list]:
    """Samples to train on and held-out ones."""
    if objective != "sft":
        train, held_out = split_corpus(load_corpus(options.data))
        return tokenize_documents(train, tokenizer), tokenize_documents(held_out, tokenizer)
    samples = [read_answer_line(line, number, tokenizer) for number, line in jsonl_lines(options.data)]
    count = max(1, len(samples) // 20)
    if len(samples) < 2:
        raise ValueError(f"{options.data} holds {len(samples)} samples; at least 2 are needed, one to hold out")
    return samples[:-count], samples[-count:]


def jsonl_lines(path: Path) -> list[tuple[int, str]]:
    text = Path(path).read_text("utf-8")
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_answer_line(line: str, number: int, tokenizer: Any) -> dict[str, list[int]]:
    """A line `{"prompt": ..., "completion": ...}` or `{"messages": [...]}` as a sample for the SFT collator."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if "messages" in record:
        encoded = tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}
    if not {"prompt", "completion"} <= set(record):
        raise ValueError(f"line {number} has the keys {sorted(record)}; needed: prompt and completion, or messages")
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {"prompt_ids": encode(record["prompt"]), "completion_ids": encode(record["completion"]) + end}


def run(options: TrainOptions) -> None:
    """Trains, reports the held-out perplexity, and writes the model (with LoRA: the adapter) to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    set_seed(options.seed)
    model = build_model(options, tokenizer)
    objective = choose_objective(options, model.config)
    collator = build_collator(objective, tokenizer, options, model.config)
    train_samples, held_out = read_samples(options, objective, tokenizer)
    rows, held_out_rows = pack_dataset(train_samples, collator), pack_dataset(held_out, collator)
    console.print(f"{len(rows)} rows to train on, {len(held_out_rows)} held out, objective {objective}")
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
    checkpoints = options.out.with_name(f"{options.out.name}-checkpoints")
    arguments = TrainingArguments(
        str(checkpoints),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate or (2e-3 if options.lora else 1e-3),
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.max_steps // 20),
        weight_decay=0.1,
        logging_steps=max(1, options.max_steps // 50),
        save_steps=max(1, options.max_steps // 5),
        save_total_limit=1,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    callbacks = [SetEpochCallback(collator), ProgressCallback(objective)]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks)
    trainer.pop_callback(next(cb for cb in trainer.callback_handler.callbacks if "Printer" in type(cb).__name__))
    checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None
    if checkpoint:
        console.print(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    score = perplexity(trainer.model, held_out_rows, collator)
    console.print(f"held-out perplexity {score.perplexity:.2f} on {score.num_tokens:,} tokens")
    with replaced_folder(options.out) as partial:
        trainer.model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    console.print(f"written: {options.out} (checkpoints: {checkpoints})")
