"""Reading checkpoints tensor by tensor, and writing them shard by shard."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from minillm.conversion.family import ConversionError

MAX_SHARD_SIZE = "2GB"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
# What carries a tokenizer and the way of generating, beside what a tokenizer's own config names.
CARRIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "generation_config.json".split()
)


class Checkpoint:
    """A folder's config and its tensors, read one at a time: nothing but a tensor's own bytes stays in memory.

    Args:
        folder: holds `config.json` and weights, as safetensors or `.bin`, whole or in shards.

    Attributes:
        config: the content of `config.json`.
        names: tensor names in the order of the files.

    Raises:
        ConversionError: no or damaged config, no weights, or a shard that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / CONFIG_NAME)
        self.files = weight_files(folder)
        self._pickle: tuple[Path, dict[str, torch.Tensor]] | None = None
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for file in self.files:
            for name, shape in self._shapes_in(file):
                if name in self.where:
                    raise ConversionError(f"the tensor `{name}` stands in {self.where[name].name} and in {file.name}")
                self.where[name], self.shapes[name] = file, shape

    @property
    def names(self) -> Iterable[str]:
        return self.where

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        file = self.where[name]
        if file.suffix == ".safetensors":
            # Opened anew each time: the map of an open file keeps every page that was ever read.
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name).clone()
        return self._unpickled(file)[name].clone()

    @property
    def generation_config(self) -> GenerationConfig | None:
        if not (self.folder / GENERATION_CONFIG_NAME).is_file():
            return None
        return GenerationConfig.from_pretrained(self.folder)

    def carry_over(self, target: Path) -> None:
        """Copies tokenizer and generation config, with the code that the tokenizer's config names."""
        carry_over(self.folder, target)

    def _shapes_in(self, file: Path) -> Iterator[tuple[str, list[int]]]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    yield from [(name, opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
            else:
                yield from [(name, list(tensor.shape)) for name, tensor in self._unpickled(file).items()]
        except FileNotFoundError as error:
            raise ConversionError(f"{file} is missing") from error
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise ConversionError(f"{file} is damaged or cut off: {error}") from error

    def _unpickled(self, file: Path) -> dict[str, torch.Tensor]:
        """A `.bin` file's tensors, mapped from disk; nothing but tensors is unpickled."""
        if self._pickle is None or self._pickle[0] != file:
            self._pickle = None
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                # The format before torch 1.6 cannot be mapped.
                content = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise ConversionError(f"{file} holds something else than tensors, or is damaged: {error}") from error
            self._pickle = (file, content)
        return self._pickle[1]


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{file.parent} holds no {file.name}") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds no mapping")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, safetensors before `.bin`.

    Raises:
        ConversionError: there are none, or one that the index names is missing.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            files = [folder / name for name in dict.fromkeys(read_json(index).get("weight_map", {}).values())]
            if missing := [file.name for file in files if not file.is_file()]:
                raise ConversionError(f"{index} names {', '.join(missing)}, which {folder} lacks")
            return files
    raise ConversionError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards"
    )


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or a copy of a Hub repository's files in the cache.

    Raises:
        ConversionError: it is neither, or a revision of a folder is asked for.
    """
    if revision is not None and Path(source).exists():
        raise ConversionError(f"`revision={revision!r}`: {source} is here, and only repositories have revisions")
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise ConversionError(f"{source} is a file: name its folder, or a `.gguf` file")
    try:
        wanted = ["*.json", *CARRIED, "*.py", "model*.safetensors"]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(str(source), revision=revision, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConversionError(f"{source} is no folder here and no repository that can be read: {error}") from error


def carry_over(source: Path, target: Path) -> None:
    """Copies tokenizer and generation config, with the code that the tokenizer's config names."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "tokenizer_config.json").is_file():
        classes = read_json(source / "tokenizer_config.json").get("auto_map", {}).get("AutoTokenizer") or []
        for reference in [classes] if isinstance(classes, str) else classes:
            module = (reference or "").rpartition("--")[2].partition(".")[0]
            if module and (source / f"{module}.py").is_file() and not (target / f"{module}.py").exists():
                shutil.copyfile(source / f"{module}.py", target / f"{module}.py")


def write_weights(
    folder: Path,
    shapes: dict[str, torch.Tensor],
    produce: Callable[[str], torch.Tensor],
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> dict[str, torch.dtype]:
    """Writes safetensors, shard by shard; no more than one shard is in memory.

    Args:
        shapes: meta tensors by name, which say how large the tensors will be.
        produce: makes the tensor of a name.

    Returns:
        The dtype of each tensor as written.
    """
    kinds: dict[str, torch.dtype] = {}
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file_name, names in plan.filename_to_tensors.items():
        tensors = {name: produce(name) for name in names}
        kinds |= {name: tensor.dtype for name, tensor in tensors.items()}
        save_file(tensors, folder / file_name, {"format": "pt"})
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8"
        )
    return kinds
