"""Loading models, tokenizers and checkpoints, with one readable error for whatever is wrong with them."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.utils import find_adapter_config_file

from minillm.cli.console import one_line

NAMED_KEYS = 3


@contextlib.contextmanager
def readable_errors(name: str, what: str) -> Iterator[None]:
    """Turns whatever loading `what` from the folder or repository `name` raises into one ValueError in words."""
    try:
        yield
    except Exception as error:
        # Damaged weights, wrong keys and unreachable hubs raise unrelated classes.
        if not Path(name).exists():
            message = f"{name} is no folder here and no repository that can be read: {one_line(error)}"
        else:
            message = f"{name} holds no {what} that can be loaded: {one_line(error)}"
        raise ValueError(message) from error


def load_pretrained(loader: Any, name: str, what: str, **options: Any) -> Any:
    """`loader.from_pretrained(name)`.

    Args:
        loader: an Auto class of transformers.
        name: folder or repository.
        what: the thing in words, for the error.

    Raises:
        ValueError: it cannot be loaded; the message names it and the reason.
    """
    with readable_errors(name, what):
        return loader.from_pretrained(name, **options)


def load_model(name: str, allow_adapter: bool = False, **options: Any) -> Any:
    """A causal language model all of whose weights were read: transformers makes up missing ones with a warning only.

    Args:
        name: folder or repository.
        allow_adapter: take an adapter too, on top of the base model that it names.
        options: for `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded, its weights are not exactly the model's, or it is an adapter.
    """
    adapter = adapter_config(name)
    if adapter is None:
        return load_checked(name, **options)
    base = adapter.get("base_model_name_or_path")
    if not allow_adapter:
        raise ValueError(f"{name} is an adapter: merge it with `minillm export {base or 'BASE'} OUT --adapter {name}`")
    if not base:
        raise ValueError(f"{name} is an adapter that names no base model: merge it into one with `minillm export`")
    try:
        model = load_checked(base, **options)
    except ValueError as error:
        raise ValueError(
            f"{name} is an adapter for {base}, which cannot be loaded: {error}. If that model is elsewhere, write its "
            f"place into {name}/adapter_config.json as base_model_name_or_path, or merge the two with "
            f"`minillm export BASE OUT --adapter {name}`"
        ) from error
    with readable_errors(name, "adapter"):
        found = model.load_adapter(name)
    require_all_weights(name, found.to_dict())
    return model


def load_checked(name: str, **options: Any) -> Any:
    # Mismatched shapes are listed with the rest, rather than in a table of transformers' own.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load_pretrained(AutoModelForCausalLM, name, "model", **options)
    require_all_weights(name, found)
    return model


def require_all_weights(name: str, found: Mapping[str, Any]) -> None:
    """Refuses weights that are not exactly those of the model, by transformers' account of a loading.

    Raises:
        ValueError: the message names the first keys of each kind.
    """
    keys = {
        "missing": sorted(found["missing_keys"]),
        "that it does not have": sorted(found["unexpected_keys"]),
        "of another shape": sorted(str(key) for key, *_ in found["mismatched_keys"]),
    }
    faults = [f"{kind}: {listed(names)}" for kind, names in keys.items() if names]
    if faults:
        raise ValueError(f"{name} does not hold exactly the weights of a causal language model; {'; '.join(faults)}")


def listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more


def adapter_config(name: str) -> dict[str, Any] | None:
    """What `adapter_config.json` of a PEFT adapter says; None where there is no such file.

    Raises:
        ValueError: the file cannot be read.
    """
    with readable_errors(name, "adapter"):
        file = find_adapter_config_file(name)
        return None if file is None else json.loads(Path(file).read_text("utf-8"))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The Trainer's newest checkpoint that was written to its end; None without one."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: -int(path.name.partition("-")[2])):
        try:
            # The Trainer writes this file last.
            json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None
