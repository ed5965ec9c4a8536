"""The model that `minillm train` trains: built or loaded, named to its tokenizer, with an adapter."""

from pathlib import Path
from typing import Any

import torch

from minillm.cli.config_settings import fields_of_file, is_file
from minillm.cli.console import say
from minillm.cli.train_command import TrainOptions
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.head import NormHead

TURN_FIELDS = ("answer_start_token_id", "turn_token_ids")
BLANK_FIELDS = ("mask_token_id", "gmask_token_id", "smask_token_id", "sop_token_id")

FIRST_NEW = "first_new_token_id"
"""Where `minillm tokenizer extend` notes, in the tokenizer's config, from which id on tokens are new."""


def fresh_config(options: TrainOptions, tokenizer: Any) -> MiniLLMConfig:
    """The config of a model from scratch: the preset's or the file's, with the options over it."""
    fields = {"max_position_embeddings": options.max_length} if options.max_length else {}
    fields |= options.settings or {}
    if is_file(options.preset):
        return MiniLLMConfig.for_tokenizer(tokenizer, None, **{**fields_of_file(Path(options.preset)), **fields})
    return MiniLLMConfig.for_tokenizer(tokenizer, options.preset, **fields)


def loaded_dtype(options: TrainOptions, precision: str) -> Any:
    """The dtype to load trained weights in: float32 where they are trained, since small steps vanish in 16 bits; as
    stored below an adapter that computes in 16 bits."""
    return "auto" if options.lora and precision != "fp32" else torch.float32


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


def adapted(model: Any, options: TrainOptions, tokenizer: Any) -> Any:
    """The model with a fresh LoRA adapter.

    Raises:
        ValueError: no module has a name of `--lora-targets`, or nothing says which tokens are new.
    """
    from peft import LoraConfig, get_peft_model

    targets = options.lora_targets
    if targets is not None and targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
        named = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        unknown = sorted(set(targets) - named)
        if unknown or not targets:
            known = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in model.named_modules()
                    if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
                }
            )
            raise ValueError(
                f"--lora-targets {options.lora_targets!r}: no module is called {', '.join(unknown or ['so'])}; there "
                f"are {', '.join(known)}, or all-linear"
            )
    rows = new_token_rows(model, tokenizer) if options.train_new_tokens else None
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha,
        target_modules=targets,
        use_dora=options.dora,
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def new_token_rows(model: Any, tokenizer: Any) -> dict[str, list[int]]:
    """The rows to train of each table: those of the tokens that an extension added.

    Raises:
        ValueError: the tokenizer does not say which are new, or the head's rows cannot be trained by themselves.
    """
    first = tokenizer.init_kwargs.get(FIRST_NEW)
    if not isinstance(first, int) or not 0 < first < len(tokenizer):
        raise ValueError(
            "--train-new-tokens: the tokenizer does not say which of its tokens are new; extend it with `minillm "
            "tokenizer extend --model`"
        )
    rows = list(range(first, len(tokenizer)))
    head = model.get_output_embeddings()
    if isinstance(head, NormHead):
        raise ValueError(
            "--train-new-tokens: the rows of a normalised head cannot be trained by themselves; make it a plain one "
            "with `model.fold_norm_head()`, or train all weights, without --lora"
        )
    tied = head.weight is model.get_input_embeddings().weight
    say(f"{len(rows)} new tokens train with the adapter, from id {first} on")
    return {"embed_tokens": rows} if tied else {"embed_tokens": rows, "lm_head": rows}
