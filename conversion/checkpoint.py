"""Reading checkpoints tensor by tensor, and writing them shard by shard."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from minillm.conversion.carried_files import (
    GENERATION_CONFIG_NAME,
    MORE_TEMPLATES,
    TOKENIZER_FILES,
    carry_over,
    read_json,
)
from minillm.conversion.family import NAMED_IDS, ConversionError, real_ids

MAX_SHARD_SIZE = "2GB"
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# As safetensors spells them, and torch.
WEIGHT_KINDS = dict(zip("F64 F32 F16 BF16 float64 float32 float16 bfloat16".split(), WEIGHT_DTYPES * 2, strict=True))
CONFIG_NAME = "config.json"


class Checkpoint:
    """A folder's config and its tensors, read one at a time: nothing but a tensor's own bytes stays in memory.

    Args:
        folder: holds `config.json` and weights, as safetensors or `.bin`, whole or in shards.

    Attributes:
        config: the content of `config.json`.
        names: tensor names in the order of the files.
        shapes, kinds: shape and dtype of each tensor; the dtype as the files spell it.

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
        self.kinds: dict[str, str] = {}
        for file in self.files:
            for name, kind, shape in self._headers_in(file):
                if name in self.where:
                    raise ConversionError(f"the tensor `{name}` stands in {self.where[name].name} and in {file.name}")
                self.where[name], self.kinds[name], self.shapes[name] = file, kind, shape

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
        return without_unreal_ids(GenerationConfig.from_pretrained(self.folder))

    def carry_over(self, target: Path) -> None:
        """Copies tokenizer and generation config, with the code that the tokenizer's config names.

        Raises:
            ConversionError: a file is a link that leads out of the folder.
        """
        carry_over(self.folder, target)

    def _headers_in(self, file: Path) -> Iterator[tuple[str, str, list[int]]]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                    yield from [(name, part.get_dtype(), part.get_shape()) for name, part in slices.items()]
            else:
                yield from [
                    (name, kind_of(tensor), list(tensor.shape)) for name, tensor in self._unpickled(file).items()
                ]
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


def kind_of(tensor: torch.Tensor) -> str:
    """The dtype of a tensor in words; its layout, where that is no plain one."""
    return str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")


def require_weights(kinds: dict[str, str], names: Iterable[str]) -> None:
    """Refuses tensors that are no floating-point weights. ConversionError names the first."""
    if wrong := [name for name in names if kinds[name] not in WEIGHT_KINDS]:
        raise ConversionError(
            f"`{wrong[0]}` is stored as {kinds[wrong[0]]}, as no original weights are: convert those, in float64, "
            "float32, float16 or bfloat16"
        )


def widest(kinds: dict[str, str], names: Iterable[str]) -> torch.dtype:
    """The dtype of the largest elements among these tensors."""
    return max((WEIGHT_KINDS[kinds[name]] for name in names), key=lambda dtype: dtype.itemsize)


def require_finite(name: str, tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor. ConversionError where it holds NaN or an infinite number."""
    # Of a tensor with a NaN both bounds are NaN; unlike `isfinite` it needs no memory.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise ConversionError(f"`{name}` holds NaN or infinite numbers {where}")
    return tensor


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
        wanted = [
            "*.json",
            *TOKENIZER_FILES,
            GENERATION_CONFIG_NAME,
            f"{MORE_TEMPLATES}/*.jinja",
            "*.py",
            "model*.safetensors",
        ]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(str(source), revision=revision, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConversionError(f"{source} is no folder here and no repository that can be read: {error}") from error


def without_unreal_ids(generation: GenerationConfig) -> GenerationConfig:
    """The same with None for ids below 0, with which a batch could not be padded."""
    for name in NAMED_IDS:
        setattr(generation, name, real_ids(getattr(generation, name)))
    return generation


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
