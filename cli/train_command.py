"""The options of `minillm train`: the one place where their names, types, ranges, defaults and meanings stand."""

import inspect
from dataclasses import dataclass, make_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm.cli.completion import preset_names
from minillm.cli.console import one_line_errors
from minillm.cli.options_file import add_pairs, take_file

MODEL, DATA, STEPS, RATE, ADAPTER, MACHINE, RECORD = (
    "Model",
    "Data",
    "Steps",
    "Optimizer",
    "Adapter",
    "Machine",
    "Evaluation and record",
)
"""Panels of the help."""


class Objective(str, Enum):
    causal = "causal"
    prefix = "prefix"
    glm = "glm"
    sft = "sft"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Tracker(str, Enum):
    tensorboard = "tensorboard"
    trackio = "trackio"
    wandb = "wandb"


def train(
    out: Annotated[Path | None, typer.Option(help="folder for the model; needed")] = None,
    data: Annotated[str | None, typer.Option(help="file, folder or name of a data set; needed")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file of these options; flags win", is_eager=True, callback=take_file),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="from scratch: a preset's name or a config file", autocompletion=preset_names, rich_help_panel=MODEL
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="or go on from this model", rich_help_panel=MODEL)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer folder", show_default="the model's", rich_help_panel=MODEL)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="field of the model's config",
            callback=add_pairs,
            rich_help_panel=MODEL,
        ),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="what is predicted from what",
            show_default="the model's attention_type; sft where data hold answers",
            rich_help_panel=DATA,
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="FIELD=COLUMN,... as prompt=question,completion=answer", rich_help_panel=DATA)
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="text, prompt, alpaca, sharegpt, messages or ids", rich_help_panel=DATA)
    ] = None,
    encoding: Annotated[str, typer.Option(help="encoding of text files", rich_help_panel=DATA)] = "utf-8",
    training_template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja file of a chat template, or a family such as vicuna",
            show_default="the tokenizer's",
            rich_help_panel=DATA,
        ),
    ] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens",
            help="read special tokens in the data; else they are text",
            rich_help_panel=DATA,
        ),
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="tokens per row", show_default="the model's", rich_help_panel=DATA)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="training steps", show_default="1000", rich_help_panel=STEPS)
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0.0, help="passes over the data, in place of steps", rich_help_panel=STEPS)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows a process computes at once", rich_help_panel=STEPS)] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="batches per step", rich_help_panel=STEPS)] = 1,
    save_steps: Annotated[
        int | None,
        typer.Option(min=1, help="steps between checkpoints", show_default="a fifth of all", rich_help_panel=STEPS),
    ] = None,
    keep_checkpoint: Annotated[
        bool,
        typer.Option(
            "--keep-checkpoint/--no-keep-checkpoint",
            help="keep the last checkpoint, from which more steps go on",
            rich_help_panel=STEPS,
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="seed of weights and order", rich_help_panel=STEPS)] = 0,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="peak of the schedule",
            show_default="1e-3 from scratch, 5e-5 with --model, 2e-3 with --lora",
            rich_help_panel=RATE,
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="optimizer, by transformers' name", rich_help_panel=RATE)
    ] = "adamw_torch_fused",
    schedule: Annotated[
        str, typer.Option(help="course of the learning rate, by transformers' name", rich_help_panel=RATE)
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option(min=0.0, help="steps up to the peak; below 1: a share of all", rich_help_panel=RATE)
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="decay of matrices", rich_help_panel=RATE)] = 0.1,
    trainer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="any other field of TrainingArguments",
            callback=add_pairs,
            rich_help_panel=RATE,
        ),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora/--no-lora", help="train a LoRA adapter only", rich_help_panel=ADAPTER)
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="rank of the adapter", rich_help_panel=ADAPTER)] = 16,
    lora_alpha: Annotated[
        float | None,
        typer.Option(min=0.0, help="scale times rank", show_default="twice the rank", rich_help_panel=ADAPTER),
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            help="modules it adapts, by commas; or all-linear", show_default="PEFT's", rich_help_panel=ADAPTER
        ),
    ] = None,
    dora: Annotated[bool, typer.Option("--dora/--no-dora", help="DoRA, with --lora", rich_help_panel=ADAPTER)] = False,
    train_new_tokens: Annotated[
        bool,
        typer.Option(
            "--train-new-tokens/--no-train-new-tokens",
            help="with --lora: also rows of the tokens that `tokenizer extend` added",
            rich_help_panel=ADAPTER,
        ),
    ] = False,
    precision: Annotated[
        Precision,
        typer.Option(help="auto: bf16 where an accelerator supports it, else fp32", rich_help_panel=MACHINE),
    ] = Precision.auto,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="compile the model by torch", rich_help_panel=MACHINE)
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, or the kind of accelerator", rich_help_panel=MACHINE)
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="threads on cpu",
            show_default="OMP_NUM_THREADS, else the faster of 1 and all",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(min=1, help="steps between evaluations", show_default="only at the end", rich_help_panel=RECORD),
    ] = None,
    eval_rows: Annotated[
        int | None, typer.Option(min=1, help="most held-out rows to score", show_default="all", rich_help_panel=RECORD)
    ] = None,
    report_to: Annotated[
        list[Tracker] | None, typer.Option(help="also log there; may be repeated", rich_help_panel=RECORD)
    ] = None,
) -> None:
    """Train a model with the stock Trainer: pre-training, continued pre-training, answers only, LoRA."""
    given = {name: value for name, value in locals().items() if name in TrainOptions.__dataclass_fields__}
    with one_line_errors(resumes=True):
        from minillm.cli.training_options import read_options
        from minillm.cli.training_run import run

        run(read_options(given))


if TYPE_CHECKING:
    # Checkers do not follow fields that a signature names.
    @dataclass(init=False)
    class TrainOptions:
        def __init__(self, **options: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:
    TrainOptions = make_dataclass(
        "TrainOptions",
        [
            (name, parameter.annotation, parameter.default)
            for name, parameter in inspect.signature(train).parameters.items()
            if name != "config"
        ],
        namespace={"__doc__": "The options of `minillm train` by the names of its parameters, with their defaults."},
    )
