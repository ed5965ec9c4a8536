"""Loading models, tokenizers and checkpoints, with one readable error for whatever is wrong with them."""

import contextlib
import dataclasses
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from minillm.cli.console import one_line, warn
from minillm.configuration.saved_values import what_stands
from minillm.conversion.checkpoint import Checkpoint, require_weights
from minillm.conversion.files import (
    CONFIG_NAME,
    SETTINGS,
    exists,
    read_config,
    read_headers,
    read_json,
    read_settings,
    require_file,
    require_held,
    require_templates,
    weight_files,
)
from minillm.data.packed_rows import MANIFEST
from minillm.publishing.cards import is_repository
from minillm.publishing.description import adapter_kind, is_mergeable

NAMED_KEYS = 3
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer*", "vocab*")
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
    require_place(name)
    if what != "tokenizer":
        require_config(Path(name))
    with readable_errors(name, what):
        if Path(name).is_dir():
            read_settings(Path(name), SETTINGS[what])
            if what == "tokenizer":
                require_templates(Path(name))
                if exists(file := Path(name) / "tokenizer.json"):
                    require_file(file)
        elif Path(name).exists():
            (read_config if what == "config" else read_json)(Path(name))
        return loader.from_pretrained(name, **options)


def require_place(name: str) -> None:
    """Refuses, by its name, what can be neither a folder or file nor a repository.

    Raises:
        ValueError: an empty name, or a device, a pipe or a link to nowhere.
    """
    if not name:
        raise ValueError("the name is empty: give a folder or a repository")
    if exists(Path(name)) and not Path(name).is_dir() and not Path(name).is_file():
        raise ValueError(f"{name} is {what_stands(Path(name))}: give a folder or a repository")


def require_config(place: Path) -> None:
    """Refuses a folder or file that holds no config, and says what it is.

    Raises:
        ValueError: as above.
    """
    if place.is_file():
        try:
            place.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is no config file, since it is no text: give the folder it is in") from error
    if not place.is_dir() or exists(place / CONFIG_NAME):
        return
    kind = "no model"
    if exists(place / MANIFEST):
        kind = "packed rows to train on, no model"
    elif any(any(place.glob(pattern)) for pattern in TOKENIZER_FILES):
        kind = "a tokenizer, no model"
    raise ValueError(f"{place} holds {kind}: it has no {CONFIG_NAME}")


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
    if is_missing(adapter.get("base_model_name_or_path")):
        raise ValueError(missing_base(name, adapter))
    if not allow_adapter and not is_mergeable(adapter):
        raise ValueError(f"{unmergeable(name, adapter)}: load both with PEFT")
    if not allow_adapter:
        raise ValueError(f"{name} is an adapter: merge it with `{merge_command(name, adapter)}`")
    base = base_of(name, adapter)
    try:
        model = load_checked(base, **options)
    except ValueError as error:
        reason = one_line(error).rstrip(".")
        raise ValueError(f"the base model of the adapter {name} cannot be loaded: {reason}") from error
    with readable_errors(name, "adapter"):
        check_adapter(name, model.config)
        with warnings.catch_warnings():
            # In one line, it was said already.
            warnings.filterwarnings("ignore", ".*Unexpected keyword arguments")
            found = model.load_adapter(name)
    require_all_weights(name, found.to_dict(), f"an adapter for {base}")
    return model


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model, or of an adapter: its base model's where it holds none, as PEFT saves it.

    Args:
        name: folder or repository.
        options: for `from_pretrained`.

    Raises:
        ValueError: there is none, it cannot be loaded, or an adapter's base model is missing or not named.
    """
    adapter = adapter_config(name)
    if adapter is None:
        return load_pretrained(AutoTokenizer, name, "tokenizer", **options)
    base = base_of(name, adapter)
    if not lacks_tokenizer(name):
        try:
            return load_pretrained(AutoTokenizer, name, "tokenizer", **options)
        except ValueError:
            # What a repository holds is known by trying.
            if Path(name).is_dir():
                raise
    if lacks_tokenizer(base):
        raise ValueError(f"neither the adapter {name} nor its base model {base} holds a tokenizer")
    return load_pretrained(AutoTokenizer, base, "tokenizer", **options)


def lacks_tokenizer(name: str) -> bool:
    """Whether a place is a folder without any file of a tokenizer."""
    folder = Path(name)
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def base_of(name: str, adapter: Mapping[str, Any]) -> str:
    """The base model that an adapter names. ValueError if it names none, or a folder that is not here."""
    base = adapter.get("base_model_name_or_path")
    if is_missing(base):
        raise ValueError(missing_base(name, adapter))
    if not base:
        merging = f", or merge the two with `{merge_command(name, adapter)}`" if is_mergeable(adapter) else ""
        raise ValueError(
            f"{name} is an adapter that names no base model: write its place into {name}/{ADAPTER_CONFIG} as "
            f"base_model_name_or_path{merging}"
        )
    return base


def is_missing(base: str | None) -> bool:
    """Whether the base model that an adapter names is a folder that is not here."""
    return bool(base) and not is_repository(base) and not Path(base).exists()


def missing_base(name: str, adapter: Mapping[str, Any]) -> str:
    """That the base model of an adapter is missing, and what to do."""
    merging = f", or merge the two with `{merge_command(name, adapter)}`" if is_mergeable(adapter) else ""
    return (
        f"{name} is an adapter for {adapter['base_model_name_or_path']}, which is missing: if that model is "
        f"elsewhere, write its place into {name}/{ADAPTER_CONFIG} as base_model_name_or_path{merging}"
    )


def merge_command(name: str, adapter: Mapping[str, Any]) -> str:
    """The command that merges an adapter; `BASE` stands for a base model that is missing or not named."""
    base = adapter.get("base_model_name_or_path")
    return f"minillm export {'BASE' if not base or is_missing(base) else base} OUT --adapter {name}"


def unmergeable(name: str, adapter: Mapping[str, Any]) -> str:
    """That an adapter cannot be merged."""
    return f"{name} is a {adapter_kind(adapter)} adapter, which cannot be merged into weights"


def load_checked(name: str, **options: Any) -> Any:
    if Path(name).is_dir():
        with readable_errors(name, "model"):
            checkpoint = Checkpoint(Path(name))
            read_config(checkpoint.file)
            config = AutoConfig.from_pretrained(name)
            # Since mismatched weights are made up, whatever their size.
            require_held(checkpoint.file, config, checkpoint.shapes)
    # Mismatched shapes are listed with the rest, rather than in a table of transformers' own.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load_pretrained(AutoModelForCausalLM, name, "model", **options)
    require_all_weights(name, found)
    return model


def require_all_weights(name: str, found: Mapping[str, Any], of: str = "a causal language model") -> None:
    """Refuses weights that are not exactly those of the model or adapter, by transformers' account of a loading.

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
        raise ValueError(f"{name} does not hold exactly the weights of {of}; {'; '.join(faults)}")


def listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more


def adapter_config(name: str) -> dict[str, Any] | None:
    """What `adapter_config.json` of a PEFT adapter says; None where there is no such file.

    Raises:
        ValueError: the file cannot be read, or there can be none.
    """
    require_place(name)
    with readable_errors(name, "adapter"):
        if Path(name).is_dir():
            return read_settings(Path(name), SETTINGS["adapter"]).get(ADAPTER_CONFIG)
        file = find_adapter_config_file(name)
        return None if file is None else read_json(Path(file))


def check_adapter(name: str, base: Any) -> None:
    """Looks at the files of an adapter before PEFT does, which believes the sizes in them.

    Args:
        name: folder or repository; of the latter, only the settings are looked at.
        base: the config of the model that it is for.

    Raises:
        ValueError: one is missing or damaged, or they do not fit.
    """
    config = adapter_config(name)
    if config is not None:
        check_adapter_settings(f"{name}/{ADAPTER_CONFIG}", config, getattr(base, "num_hidden_layers", None))
    if not Path(name).is_dir():
        return
    config = config or {}
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


def check_adapter_settings(place: str, config: Mapping[str, Any], layers: int | None) -> None:
    """Refuses, by their names, values of which PEFT says little; warns of names that it passes over.

    Args:
        layers: how many the model has; None where that is not known.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = config.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{place}: `peft_type={kind!r}` is no kind of adapter that PEFT knows")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := config.get(key), str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{place}: `{key}={pattern!r}` is no regular expression: {error}") from error
    replication = config.get("layer_replication")
    if replication and not is_replication(replication, layers):
        most = "" if layers is None else f", of {layers} layers"
        raise ValueError(f"{place}: `layer_replication={replication!r}` must be a list of [first, end]{most}")
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    if unknown := sorted(set(config) - known):
        warn(f"{place}: PEFT does not know {', '.join(unknown)} and goes on without")


def is_replication(value: Any, layers: int | None) -> bool:
    """Whether a value is a list of ranges of layers, each a first one and an end that is not in it."""
    return isinstance(value, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and all(type(number) is int for number in span)
        and 0 <= span[0] < span[1] <= (span[1] if layers is None else layers)
        for span in value
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
