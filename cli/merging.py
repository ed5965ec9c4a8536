"""An adapter in the weights of its model, with the logits of before."""

import warnings
from pathlib import Path
from typing import Any

import torch

from minillm.cli.console import one_line, warn
from minillm.cli.loading import check_adapter, listed, unmergeable
from minillm.conversion.comparison import TOLERANCE, difference, few_logits
from minillm.publishing.description import is_mergeable

# The sum is rounded once in the model's dtype, where the adapter beside the weights rounds twice, layer after layer.
ROUNDINGS = 8
# PEFT reads them past the model's own loading, which calls them unexpected.
PROMPT_TENSORS = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")


def merge_adapter(model: Any, model_name: str, adapter: str) -> Any:
    """The model with an adapter in its weights.

    Where the adapter changes one of two tied tables, the model has two tables afterwards.

    Raises:
        ValueError: there is no whole adapter that fits, or none that can be merged, or the merged model computes
            something else than the model with the adapter.
    """
    adapted = load_adapted(model, model_name, adapter)
    config = adapted.peft_config["default"]
    if not is_mergeable(config.to_dict()):
        raise ValueError(unmergeable(adapter, config.to_dict()))
    base = config.base_model_name_or_path
    if base and resolved(base) != resolved(model_name):
        warn(f"{adapter} was made for {base}, not for {model_name}: the merged model may be of no use")
    expected = few_logits(adapted)
    merged = merge_untied(adapted)
    if (off := difference(few_logits(merged), expected)) > tolerance(merged.dtype):
        raise ValueError(
            f"{adapter} cannot be merged into {model_name}: logits would be off by {off:.2g} of the largest"
        )
    return merged


def load_adapted(model: Any, model_name: str, adapter: str) -> Any:
    """A model with an adapter, all of whose weights were read and used. ValueError if there is none that fits."""
    from peft import PeftModel

    try:
        check_adapter(adapter, model.config)
        with warnings.catch_warnings():
            # PEFT makes up what an adapter lacks.
            warnings.filterwarnings("error", ".*missing adapter keys")
            # In one line, it was said already.
            warnings.filterwarnings("ignore", ".*Unexpected keyword arguments")
            # It advises to do what is done here.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")
            adapted = PeftModel.from_pretrained(model, adapter)
            require_all_used(adapted, adapter)
            return adapted
    except Exception as error:
        raise ValueError(f"{adapter} holds no adapter for {model_name}: {one_line(error)}") from error


def require_all_used(adapted: Any, adapter: str) -> None:
    """Refuses an adapter with tensors that have no place in the model, which PEFT drops. ValueError names them."""
    # Only this call of PEFT's, not the one that made the model, returns what had no place.
    found = adapted.load_adapter(adapter, "default").unexpected_keys
    prompt = adapted.peft_config["default"].is_prompt_learning
    surplus = sorted(key.replace(".default", "", 1) for key in found if not (prompt and key in PROMPT_TENSORS))
    if surplus:
        raise ValueError(f"it has tensors that the model has no place for: {listed(surplus)}")


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference between logits of models that compute in this dtype, in units of the largest logit."""
    return max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)


def merge_untied(adapted: Any) -> Any:
    """The merged model; tied tables stay tied if they are still the same, else the config says that they are two."""
    config = adapted.config
    was_tied = config.tie_word_embeddings
    untie(adapted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")
        merged = adapted.merge_and_unload()
    if was_tied:
        head = merged.get_output_embeddings().weight
        config.tie_word_embeddings = torch.equal(merged.get_input_embeddings().weight, head)
        merged.tie_weights()
    return merged


def untie(model: torch.nn.Module) -> None:
    """Gives each module a weight of its own: what is merged into one table must not change the other."""
    seen = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen and name.endswith(".weight"):
            copied = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            model.get_submodule(name.removesuffix(".weight")).weight = copied
        seen.add(id(parameter))


def resolved(name: str) -> str:
    """A folder's full path; a repository's name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name
