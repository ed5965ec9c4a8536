"""`minillm export` and `minillm push`."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from minillm.cli.console import one_line, warn
from minillm.cli.loading import adapter_config, is_missing, load_checked, load_model, load_pretrained, missing_base
from minillm.cli.merging import load_adapted, merge_adapter, tolerance
from minillm.conversion.comparison import difference, few_logits, fits_in_memory
from minillm.publishing.cards import is_repository, read_summary
from minillm.publishing.description import is_mergeable
from minillm.publishing.folders import new_folder
from minillm.training.put_back import quiet

DTYPES = ("float32", "bfloat16", "float16")


def export_model(model_name: str, out: Path, adapter: str | None = None, dtype: str | None = None) -> None:
    """Writes a complete folder: weights, config, tokenizer, code and card; an adapter is merged into the weights.

    The logits of what is written are compared with the model's before the folder appears.

    Raises:
        ValueError: an unknown dtype, an `out` that is not empty, no model, tokenizer or adapter at the given place, an
            adapter that cannot be merged, or a written model that differs.
    """
    kind = torch_dtype(dtype)
    # Taken before the work, which would be in vain if `out` is not free.
    with new_folder(out) as folder:
        model, tokenizer = load_whole_model(model_name)
        if adapter is not None:
            model = merge_adapter(model, model_name, adapter)
        if kind is not None:
            # After the merge, so that its sum is rounded once.
            model = model.to(dtype=kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        compare_written(model, folder)


def compare_written(model: Any, folder: Path) -> None:
    """Compares a model's logits with those of the folder that it was written to. ValueError where they differ."""
    if not fits_in_memory(model.num_parameters(), model.dtype):
        warn("the logits of the written model were not compared: a second model does not fit in the free memory")
        return
    with quiet():
        written = few_logits(load_checked(str(folder), dtype="auto"))
    if (off := difference(written, few_logits(model))) > tolerance(model.dtype):
        raise ValueError(f"what was written computes other logits, off by {off:.2g} of the largest; nothing is left")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a `--dtype`. ValueError for an unknown one."""
    if name not in (None, *DTYPES):
        raise ValueError(f"--dtype {name!r} is unknown; use {', '.join(DTYPES)}")
    return None if name is None else getattr(torch, name)


def push_model(model_name: str, repository: str, private: bool | None = None, base: str | None = None) -> str:
    """Uploads model and tokenizer, or an adapter with the tokenizer that stands beside it, if one does.

    Args:
        base: the repository of an adapter's base model, where it was trained on a folder.

    Returns:
        The address of the last commit.

    Raises:
        ValueError: no model or tokenizer at the given place, a `base` for a model, an adapter whose base model others
            cannot load, or the hub cannot be reached or refuses.
    """
    adapter = adapter_config(model_name)
    if adapter is None and base is not None:
        raise ValueError(f"--base {base} is for adapters, and {model_name} is a model: leave it out")
    if adapter is None:
        parts = load_whole_model(model_name)
    else:
        parts = load_shared_adapter(model_name, adapter, base)
    trained = parts[0].get_base_model() if adapter is not None else parts[0]
    # The card is written anew; what it said of the training holds for the same weights.
    trained.training_summary = read_summary(model_name)
    try:
        return [str(part.push_to_hub(repository, private=private)) for part in parts][-1]
    except Exception as error:
        raise ValueError(f"{repository} was not uploaded: {one_line(error)}") from error


def load_shared_adapter(name: str, adapter: dict[str, Any], base: str | None) -> list[Any]:
    """An adapter on its base model, which it names so that others can load it, and the tokenizer beside it.

    Args:
        adapter: its config.
        base: the base model that it is to name; None for the one that it names.
    """
    stored = adapter.get("base_model_name_or_path")
    named = base or stored
    if base is None and is_missing(stored):
        raise ValueError(f"{missing_base(name, adapter)}; or name its repository, `--base user/base`")
    if not is_repository(named):
        place = named or "BASE"
        merging = f"; or merge the two, `minillm export {place} OUT --adapter {name}`, and push OUT"
        raise ValueError(
            f"{name} is an adapter for {named or 'a model without a name'}, which others cannot load: upload that "
            f"first, `minillm push {place} user/base`, and name it, `--base user/base`"
            f"{merging if is_mergeable(adapter) else ''}"
        )
    place = stored if stored and Path(stored).is_dir() else named
    adapted = load_adapted(load_checked(place, dtype="auto"), place, name)
    adapted.peft_config["default"].base_model_name_or_path = named
    if not (Path(name) / "tokenizer_config.json").exists():
        return [adapted]
    return [adapted, load_pretrained(AutoTokenizer, name, "tokenizer")]


def load_whole_model(name: str) -> tuple[Any, Any]:
    """A model with its tokenizer. ValueError if the place holds neither or an adapter only."""
    return load_model(name, dtype="auto"), load_pretrained(AutoTokenizer, name, "tokenizer")
