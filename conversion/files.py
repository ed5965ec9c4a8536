"""Reading files that others wrote: each fault is one line that names the file, before anything large is taken.

Nothing but tensors is unpickled, an index names files of its own folder only, and no size that a file claims is
believed before it is compared with what is there.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.configuration.saved_values import refuse_impossible, what_stands
from minillm.conversion.family import ConversionError

LARGEST_JSON = 1 << 28
"""Bytes; the largest tokenizers take some 30 MB."""

ZIP = b"PK\x03\x04"
# What stands in the place of a file that was not fetched, by its first bytes.
IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch that with `git lfs pull`",
    b"<!doctype": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}
UNPICKLED = re.compile(r"GLOBAL (\S+)")

CONFIG_NAME = "config.json"
TEMPLATE_NAME = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates beside the first one, as transformers writes it."""

SETTINGS = {
    "config": (CONFIG_NAME,),
    "model": (CONFIG_NAME, "generation_config.json"),
    "tokenizer": (CONFIG_NAME, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "adapter": ("adapter_config.json",),
}
"""Mappings that transformers and PEFT read from a folder, where they are there, to load such a thing."""

_IDS, _NUMBER = (int, list), (int, float)
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "generation_config.json": {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _IDS),
        **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "num_beams", "top_k"), (int,)),
        **dict.fromkeys(("temperature", "top_p", "repetition_penalty", "length_penalty"), _NUMBER),
        "do_sample": (bool,),
    },
    "tokenizer_config.json": {"tokenizer_class": (str,), "auto_map": (dict, list)},
    "adapter_config.json": {
        **dict.fromkeys(("peft_type", "task_type", "base_model_name_or_path"), (str,)),
        "r": (int,),
        **dict.fromkeys(("lora_alpha", "lora_dropout"), _NUMBER),
        "target_modules": (str, list),
        "modules_to_save": (list,),
        "rank_pattern": (dict,),
    },
}
"""Types of values that are read, other than null."""

# As the families spell them.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
LISTED = ("num_labels", "num_local_experts", "num_experts", "n_routed_experts")

HELD = 2
"""How many times the weights of its files a model may have: a head or an embedding that is not stored, and no more."""


class Header(NamedTuple):
    """What a file says of a tensor: its dtype as the file spells it, and its shape."""

    kind: str
    shape: list[int]


def exists(file: Path) -> bool:
    """Whether anything at all stands at a place, a link to nowhere included."""
    return os.path.lexists(file)


def require_file(file: Path) -> Path:
    """The file itself.

    Raises:
        ConversionError: it is missing, a folder, a link to nowhere or a pipe, is empty or cannot be read, or a pointer
            or a web page stands in its place.
    """
    if not exists(file):
        raise ConversionError(f"{file.parent} holds no {file.name}")
    if not file.is_file():
        raise ConversionError(f"{file} is {what_stands(file)}")
    start = first_bytes(file).lstrip().lower()
    for mark, words in IMPOSTORS.items():
        if start.startswith(mark):
            raise ConversionError(f"{file} is {words}")
    return file


def first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    if not start:
        raise ConversionError(f"{file} is empty")
    return start


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's mapping. ConversionError names the file and what is wrong with it."""
    if (size := require_file(file).stat().st_size) > LARGEST_JSON:
        raise ConversionError(f"{file} is too large for JSON: {size:,} bytes")
    try:
        content = json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ConversionError(f"{file} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds no mapping but {content!r:.20}")
    return content


def require_text(file: Path) -> None:
    """Nothing for UTF-8 text, or where there is no file. ConversionError says what is wrong with it."""
    if not exists(file):
        return
    require_file(file)
    try:
        file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} is no text: {error}") from error


def require_templates(folder: Path) -> None:
    """Nothing for a folder whose chat templates compile, or that has none. ConversionError names the one at fault."""
    for file in [folder / TEMPLATE_NAME, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]:
        if not exists(file):
            continue
        require_text(file)
        with suppress(ImportError):
            try:
                # Without a conversation it is compiled, and not run.
                render_jinja_template([], chat_template=file.read_text("utf-8"))
            except ImportError:
                raise
            except Exception as error:
                # Of the package jinja2, or whatever its compiler stumbles over.
                reason = str(error) or type(error).__name__
                raise ConversionError(f"{file} does not compile: {reason}; mend it or take it away") from error


def read_settings(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The content of the settings that stand in a folder, by file name.

    Raises:
        ConversionError: one is damaged, or holds a value of a type that its readers fail over.
    """
    readers = {CONFIG_NAME: read_config}
    found = {name: readers.get(name, read_json)(folder / name) for name in names if exists(folder / name)}
    for name, content in found.items():
        for key, kinds in KINDS.get(name, {}).items():
            value = content.get(key)
            wrong = isinstance(value, bool) and bool not in kinds
            if value is not None and (wrong or not isinstance(value, kinds) or value != value):
                raise ConversionError(f"{folder / name}: `{key}={value!r}` must be {in_words(kinds)}")
    return found


def read_config(file: Path) -> dict[str, Any]:
    """The content of a `config.json`.

    Raises:
        ConversionError: it is damaged, holds what `refuse_impossible` refuses or, of a MiniLLM, what its config does.
    """
    content = read_json(file)
    with faults_of(file):
        refuse_impossible(content)
        if content.get("model_type") == MiniLLMConfig.model_type:
            # Whoever loads a tokenizer beside it reads it as a config of no model in particular.
            MiniLLMConfig.from_json_file(file)
    return content


def in_words(kinds: tuple[type, ...]) -> str:
    return " or ".join({str: "text", dict: "a mapping", list: "a list"}.get(kind, kind.__name__) for kind in kinds)


def weight_files(folder: Path, names: Iterable[str] = ("model.safetensors", "pytorch_model.bin")) -> list[Path]:
    """The files of a folder's weights.

    Args:
        names: of files that may hold them, whole or in shards; the first that is there does.

    Raises:
        ConversionError: there are none, or the index is damaged, or names a file that is missing or not of the folder.
    """
    for whole in names:
        if exists(folder / whole):
            return [require_file(folder / whole)]
        if exists(index := folder / f"{whole}.index.json"):
            return shards(index, Path(whole).suffix)
    raise ConversionError(f"{folder} holds no weights: neither {' nor '.join(names)}, whole or in shards")


def shards(index: Path, suffix: str) -> list[Path]:
    """The files that an index names, each once. Errors are those of `weight_files`."""
    content = read_json(index)
    found, facts = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(found, dict) or not found:
        raise ConversionError(f"{index} holds no `weight_map` from tensors to files")
    if not isinstance(facts, dict):
        # transformers writes into it.
        raise ConversionError(f"{index}: `metadata={facts!r}` must be a mapping: write {{}}")
    for tensor, name in found.items():
        if not isinstance(name, str) or re.search(r"[/\\]", name) or Path(name).suffix != suffix:
            raise ConversionError(f"{index} has `{tensor}` in {name!r}, which is no {suffix} file of its folder")
    files = [index.parent / name for name in dict.fromkeys(found.values())]
    if missing := [file.name for file in files if not exists(file)]:
        raise ConversionError(f"{index} names {', '.join(missing)}, which {index.parent} lacks")
    return [require_file(file) for file in files]


def read_headers(file: Path) -> dict[str, Header]:
    """Dtype and shape of each tensor of a file; no tensor is read.

    Raises:
        ConversionError: the file is damaged, or holds something else than tensors.
    """
    if require_file(file).suffix != ".safetensors":
        return {name: Header(kind_of(tensor), list(tensor.shape)) for name, tensor in unpickled(file).items()}
    try:
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            headers = {name: Header(part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{file} is damaged or cut off: {error}") from error
    if not headers:
        raise ConversionError(f"{file} holds no tensors")
    return headers


def unpickled(file: Path) -> dict[str, torch.Tensor]:
    """A `.bin` file's tensors, mapped from disk; nothing but tensors is unpickled.

    Raises:
        ConversionError: the file is damaged, or holds something else.
    """
    try:
        with warnings.catch_warnings():
            # On the protocol of a pickle.
            warnings.simplefilter("ignore", UserWarning)
            # The format before torch 1.6 cannot be mapped.
            mapped = first_bytes(require_file(file)).startswith(ZIP)
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        if (code := UNPICKLED.search(str(error))) is not None:
            raise ConversionError(f"{file} asks for code ({code[1]}), which is never run") from error
        raise ConversionError(f"{file} is damaged, or no dictionary of tensors") from error
    except ConversionError:
        raise
    except Exception as error:
        # Damaged files raise whatever the reader stumbles over.
        raise ConversionError(f"{file} is damaged or cut off: {str(error) or type(error).__name__}") from error
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{file} is no dictionary of tensors but of type {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"{file} is no dictionary of tensors: {name!r} is of type {type(value).__name__}")
        if value.device.type != "cpu" or (
            value.layout is torch.strided and value.untyped_storage().nbytes() < value.nbytes
        ):
            raise ConversionError(f"{file} lacks the content of `{name}`, of shape {list(value.shape)}")
    return dict(content)


def kind_of(tensor: torch.Tensor) -> str:
    """The dtype of a tensor in words; its layout, where that is no plain one."""
    return str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")


@contextmanager
def faults_of(place: str | Path) -> Iterator[None]:
    """Errors about what stands in `place` name it."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise ConversionError(message if str(place) in message else f"{place}: {message}") from error


def require_plausible(file: Path, raw: Mapping[str, Any], shapes: Mapping[str, Iterable[int]]) -> None:
    """Refuses a config that no model with these tensors has, before anything is built from its numbers.

    Args:
        file: its name.
        raw: its content.
        shapes: of the tensors beside it.

    Raises:
        ConversionError: more layers than tensors, more labels or experts than any tensor has rows, or what
            `refuse_impossible` refuses.
    """
    with faults_of(file):
        refuse_impossible(raw)
    most = max((size for shape in shapes.values() for size in shape), default=0)
    bounds = dict.fromkeys(LAYERS, len(shapes)) | dict.fromkeys(LISTED, max(len(shapes), most))
    for key, bound in bounds.items():
        if isinstance(raw.get(key), int) and raw[key] > bound:
            raise ConversionError(
                f"{file}: `{key}={raw[key]}` cannot be: its weights are {len(shapes)} tensors of up to {most:,} rows"
            )


def require_held(place: str | Path, config: Any, shapes: Mapping[str, Iterable[int]]) -> None:
    """Refuses a config whose model is far larger than the weights that are there: transformers would make them up.

    Args:
        place: what to name.
        config: a config of transformers; of a quantized model nothing is known.
        shapes: of the tensors that are there.

    Raises:
        ConversionError: telling both sizes.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config).num_parameters()
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    if wanted > HELD * held:
        raise ConversionError(f"{place}: the config is of a model of {wanted:,} weights; {held:,} are there")
