"""Reading checkpoints tensor by tensor, and writing them shard by shard."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from minillm.conversion.carried_files import (
    GENERATION_CONFIG_NAME,
    MORE_TEMPLATES,
    TOKENIZER_FILES,
    carried_files,
    carry_over,
)
from minillm.conversion.family import NAMED_IDS, ConversionError, real_ids
from minillm.conversion.files import (
    CONFIG_NAME,
    exists,
    read_headers,
    read_json,
    require_plausible,
    unpickled,
    weight_files,
)

MAX_SHARD_SIZE = "2GB"
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# As safetensors spells them, and torch.
WEIGHT_KINDS: dict[str, torch.dtype] = dict(
    zip("F64 F32 F16 BF16 float64 float32 float16 bfloat16".split(), WEIGHT_DTYPES * 2, strict=True)
)


class Checkpoint:
    """A folder's config and its tensors, read one at a time: nothing but a tensor's own bytes stays in memory.

    Args:
        folder: holds `config.json` and weights, as safetensors or `.bin`, whole or in shards.

    Attributes:
        file: what to name when the checkpoint is wrong as a whole.
        config: the content of `config.json`.
        names: tensor names in the order of the files.
        shapes, kinds, where: shape, dtype and file of each tensor; the dtype as the files spell it.

    Raises:
        ConversionError: a file that conversion reads is missing or damaged, or the config is of no model with these
            tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / CONFIG_NAME
        self.config = read_json(self.file)
        self._pickle: tuple[Path, dict[str, torch.Tensor]] | None = None
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        self.kinds: dict[str, str] = {}
        for file in weight_files(folder):
            for name, header in read_headers(file).items():
                if name in self.where:
                    raise ConversionError(f"the tensor `{name}` stands in {self.where[name]} and in {file.name}")
                self.where[name], self.kinds[name], self.shapes[name] = file, header.kind, header.shape
        require_plausible(self.file, self.config, self.shapes)

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
        if self._pickle is None or self._pickle[0] != file:
            # One map at a time.
            self._pickle = None
            self._pickle = (file, unpickled(file))
        return self._pickle[1][name].clone()

    @property
    def generation_config(self) -> GenerationConfig | None:
        file = self.folder / GENERATION_CONFIG_NAME
        return without_unreal_ids(GenerationConfig.from_dict(read_json(file))) if exists(file) else None

    def check_carried(self) -> None:
        """Looks at what `carry_over` copies, before there is any work that would be lost.

        Raises:
            ConversionError: a file is damaged, or a link that leads out of the folder.
        """
        carried_files(self.folder)

    def carry_over(self, target: Path) -> None:
        """Copies tokenizer and generation config, with the code that the tokenizer's config names.

        Raises:
            ConversionError: a file is a link that leads out of the folder.
        """
        carry_over(self.folder, target)


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


def finite_tensor(checkpoint: Any, name: str) -> torch.Tensor:
    """A checkpoint's tensor. ConversionError where it holds NaN or an infinite number."""
    return require_finite(name, checkpoint.tensor(name), f"in {checkpoint.where[name]}")


def require_finite(name: str, tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor. ConversionError where it holds NaN or an infinite number."""
    # Of a tensor with a NaN both bounds are NaN; unlike `isfinite` it needs no memory.
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise ConversionError(f"`{name}` holds NaN or infinite numbers {where}")
    return tensor


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
