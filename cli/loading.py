"""Loading models, tokenizers and checkpoints, with one readable error for whatever is wrong with them."""

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import find_adapter_config_file

from minillm.cli.console import one_line
from minillm.conversion.checkpoint import CONFIG_NAME, Checkpoint, require_weights
from minillm.conversion.files import (
    SETTINGS,
    read_headers,
    read_json,
    read_settings,
    require_file,
    require_held,
    require_text,
    weight_files,
)

NAMED_KEYS = 3
ADAPTER_CONFIG = "adapter_config.json"
TRAINER_STATE = "trainer_state.json"


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


def best_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def load_pretrained(loader: Any, name: str, what: str, **options: Any) -> Any:
    """`loader.from_pretrained(name)`.

    The settings in a folder are read before it: transformers passes over some that are damaged, and does not name
    others.

    Args:
        loader: an Auto class of transformers.
        name: folder or repository.
        what: the thing in words: a key of `SETTINGS`.

    Raises:
        ValueError: it cannot be loaded; the message names it and the reason.
    """
    with readable_errors(name, what):
        if Path(name).is_dir():
            read_settings(Path(name), SETTINGS[what])
            if what == "tokenizer":
                require_text(Path(name) / "chat_template.jinja")
        elif Path(name).exists():
            read_json(Path(name))
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
        check_adapter(name)
        found = model.load_adapter(name)
    require_all_weights(name, found.to_dict())
    return model


def load_checked(name: str, **options: Any) -> Any:
    if Path(name).is_dir():
        with readable_errors(name, "model"):
            checkpoint = Checkpoint(Path(name))
            config = AutoConfig.from_pretrained(name)
            # Since mismatched weights are made up, whatever their size.
            require_held(Path(name) / CONFIG_NAME, config, checkpoint.shapes)
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
        if Path(name).is_dir():
            return read_settings(Path(name), SETTINGS["adapter"]).get(ADAPTER_CONFIG)
        file = find_adapter_config_file(name)
        return None if file is None else read_json(Path(file))


def check_adapter(name: str) -> None:
    """Looks at the files of an adapter before PEFT does, which believes the sizes in them.

    Raises:
        ValueError: one is missing or damaged, or they do not fit.
    """
    if not Path(name).is_dir():
        return
    config = read_settings(Path(name), SETTINGS["adapter"]).get(ADAPTER_CONFIG, {})
    headers = {
        key: header
        for file in weight_files(Path(name), ("adapter_model.safetensors", "adapter_model.bin"))
        for key, header in read_headers(file).items()
    }
    require_weights({key: header.kind for key, header in headers.items()}, headers)
    most = max((size for header in headers.values() for size in header.shape), default=0)
    for key, rank in [("r", config.get("r")), *(config.get("rank_pattern") or {}).items()]:
        if isinstance(rank, int) and rank > most:
            raise ValueError(
                f"{Path(name) / 'adapter_config.json'}: `{key}={rank}`, but no tensor has more than {most} rows"
            )


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The Trainer's newest checkpoint that was written to its end; None without one."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: -int(path.name.partition("-")[2])):
        try:
            # The Trainer writes this file last.
            json.loads((path / TRAINER_STATE).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def check_checkpoint(folder: Path) -> None:
    """Looks at the files of a Trainer's checkpoint before the Trainer does.

    Raises:
        ValueError: one is damaged; the message names it and says what to do.
    """
    try:
        for file in sorted(folder.glob("*.json")):
            content = read_json(file)
            if file.name == TRAINER_STATE and not isinstance(content.get("global_step"), int):
                raise ValueError(f"{file} holds no `global_step`")
        for file in sorted(folder.glob("*.safetensors")):
            read_headers(file)
        for file in sorted(path for suffix in ("pt", "pth", "bin") for path in folder.glob(f"*.{suffix}")):
            # As torch writes them; what they hold is the Trainer's.
            if not zipfile.is_zipfile(require_file(file)):
                raise ValueError(f"{file} is damaged or cut off")
    except ValueError as error:
        raise ValueError(f"{error}; remove {folder}, and the same command trains from where it can") from error
