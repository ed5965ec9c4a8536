"""`minillm export` and `minillm push`."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from minillm.cli.console import one_line, warn
from minillm.cli.loading import load_model, load_pretrained
from minillm.folders import new_folder

DTYPES = ("float32", "bfloat16", "float16")


def export_model(model_name: str, out: Path, adapter: str | None = None, dtype: str | None = None) -> None:
    """Writes a complete folder: weights, config, tokenizer, code and card; an adapter is merged into the weights.

    Raises:
        ValueError: an unknown dtype, an `out` that is not empty, or no model, tokenizer or adapter at the given place.
    """
    kind = torch_dtype(dtype)
    model, tokenizer = load_whole_model(model_name)
    if adapter is not None:
        model = merge_adapter(model, model_name, adapter)
    if kind is not None:
        # After the merge, so that its sum is rounded once.
        model = model.to(dtype=kind)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a `--dtype`. ValueError for an unknown one."""
    if name not in (None, *DTYPES):
        raise ValueError(f"--dtype {name!r} is unknown; use {', '.join(DTYPES)}")
    return None if name is None else getattr(torch, name)


def merge_adapter(model: Any, model_name: str, adapter: str) -> Any:
    """The model with an adapter in its weights. ValueError if there is no whole adapter that fits."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT makes up what an adapter lacks.
            warnings.filterwarnings("error", ".*missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter)
    except Exception as error:
        raise ValueError(f"{adapter} holds no adapter for {model_name}: {one_line(error)}") from error
    base = adapted.peft_config["default"].base_model_name_or_path
    if base and resolved(base) != resolved(model_name):
        warn(f"{adapter} was made for {base}, not for {model_name}: the merged model may be of no use")
    return adapted.merge_and_unload()


def resolved(name: str) -> str:
    """A folder's full path; a repository's name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def push_model(model_name: str, repository: str, private: bool | None = None) -> str:
    """Uploads model and tokenizer; returns the address of the last commit.

    Raises:
        ValueError: no model or tokenizer at the given place, or the hub cannot be reached or refuses.
    """
    model, tokenizer = load_whole_model(model_name)
    try:
        model.push_to_hub(repository, private=private)
        return str(tokenizer.push_to_hub(repository, private=private))
    except Exception as error:
        raise ValueError(f"{repository} was not uploaded: {one_line(error)}") from error


def load_whole_model(name: str) -> tuple[Any, Any]:
    """A model with its tokenizer. ValueError if the place holds neither or an adapter only."""
    return load_model(name, dtype="auto"), load_pretrained(AutoTokenizer, name, "tokenizer")
