"""`minillm export` and `minillm push`."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.cli.console import replaced_folder


def export_model(model_name: str, out: Path, adapter: str | None = None, dtype: str | None = None) -> None:
    """Writes a complete folder: weights, config, tokenizer, code and card; an adapter is merged into the weights.

    Raises:
        ValueError: an unknown dtype.
        OSError: no model, tokenizer or adapter at the given place.
    """
    chosen = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(chosen, torch.dtype):
        raise ValueError(f"--dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=chosen or "auto")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with replaced_folder(Path(out)) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def push_model(model_name: str, repository: str, private: bool | None = None) -> str:
    """Uploads model and tokenizer; returns the commit's address."""
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model.push_to_hub(repository, private=private)
    return str(tokenizer.push_to_hub(repository, private=private))
