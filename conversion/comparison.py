"""Whether a written model computes what its source does: logits of a few tokens, before the folder takes its place.

One model at a time is held, in float32, so that weights are compared and not the rounding of two back ends. Writing
holds a shard and a layer, whatever the size of a model; so the comparison is left out, and the log says so, where a
model in float32 would take more than `SHARE_OF_MEMORY` of the memory that is free.
"""

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers.utils import logging

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.conversion.checkpoint import CONFIG_NAME, Checkpoint, widest
from minillm.conversion.family import ConversionError, Family
from minillm.conversion.files import read_json
from minillm.conversion.gguf_file import GGUFCheckpoint
from minillm.modeling_minillm import MiniLLMForCausalLM
from minillm.training.put_back import evaluating, quiet

logger = logging.get_logger(__name__)

SHARE_OF_MEMORY = 0.5
"""How much of the free memory a model may take to be compared; 0 leaves all comparisons out."""

TOKENS = 24
TOLERANCE = 1e-4
"""Largest difference between logits, in units of the largest logit: some hundred times float32's own noise."""

CONTAINER = Path("/sys/fs/cgroup")

Load = Callable[[], torch.nn.Module]


class NotComparableError(Exception):
    """There is nothing to compare with; the message says why."""


def free_memory() -> int:
    """Bytes that can be had without swapping, by the system and by the limit of its container (cgroup v2)."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = (CONTAINER / "memory.stat").read_text().partition("\ninactive_file ")[2].partition("\n")[0]
    except (OSError, ValueError):
        # No limit, or another system.
        return free
    return min(free, limit - used + int(cached or 0))


def fits_in_memory(elements: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a model of so many weights may be held beside what is there."""
    return elements * dtype.itemsize <= SHARE_OF_MEMORY * free_memory()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compare in: float32, or float64 where weights are so."""
    return torch.promote_types(dtype, torch.float32)


def few_logits(model: Any) -> torch.Tensor:
    """Logits [1, tokens, vocab_size] of tokens spread over the vocabulary, in float64; modes are put back.

    A prefix model reads the first third as its prefix.
    """
    config = model.config
    returned = config.return_dict
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    count = max(1, min(TOKENS, longest))
    ids = (torch.arange(count) * max(1, config.vocab_size // count) + 3) % config.vocab_size
    inputs = {"input_ids": ids[None].to(model.device)}
    if getattr(config, "attention_type", None) == "prefix":
        inputs["prefix_mask"] = (torch.arange(count) < count // 3).long()[None].to(model.device)
    # The models inside a model ask the config.
    config.return_dict = True
    try:
        with evaluating(model):
            return model(**inputs, use_cache=False).logits.double().cpu()
    finally:
        config.return_dict = returned


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference between logits, in units of the largest of `expected`; infinite where either is none."""
    if found.shape != expected.shape:
        return float("inf")
    off = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    return off if off == off else float("inf")


def compare_models(source: Load, written: Load, elements: int, dtype: torch.dtype) -> None:
    """Compares the logits of two models, of which one is held at a time; the log tells the outcome.

    Args:
        source, written: load the models in `dtype`; `NotComparableError` says that there is none.
        elements: number of weights.
        dtype: what they are held in.

    Raises:
        ConversionError: the logits differ.
    """
    try:
        if not fits_in_memory(elements, dtype):
            raise NotComparableError(
                f"its {elements:,} weights in {str(dtype).removeprefix('torch.')} would take more than "
                f"{SHARE_OF_MEMORY:.0%} of the free memory"
            )
        with quiet():
            try:
                expected = logits_of(source)
            except (RuntimeError, AttributeError, TypeError, ValueError, IndexError) as error:
                # Settings with which a class of transformers can be built, but not run.
                raise NotComparableError(f"the source itself cannot be run: {error}") from error
            if not expected.isfinite().all():
                raise NotComparableError("the source itself computes no finite logits")
            found = logits_of(written)
    except NotComparableError as reason:
        logger.warning(f"The logits of the written model were not compared with its source's: {reason}.")
        return
    off = difference(found, expected)
    if off > TOLERANCE:
        raise ConversionError(
            f"the written model differs from its source: logits of {found.shape[1]} tokens are off by "
            f"{off:.2g} of the largest; nothing was written"
        )
    logger.info(f"Logits of {found.shape[1]} tokens agree with the source's to {off:.1g} of the largest.")


def logits_of(load: Load) -> torch.Tensor:
    logits = few_logits(load())
    # Models hold references to themselves.
    gc.collect()
    return logits


def compare_conversion(plan: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Compares what `convert` wrote with transformers' own model of the checkpoint.

    Fields that the caller set otherwise are taken as the family has them: the weights are the same.

    Args:
        plan: how the checkpoint was converted (`minillm.conversion.convert.Plan`).
        folder: what was written.
        dtype: what the weights were cast to; None if they were not.

    Raises:
        ConversionError: the logits differ.
    """
    family, shapes = plan.family, shapes_of(plan.targets)
    kept = wide(dtype or widest(plan.checkpoint.kinds, plan.read_names))

    def source() -> torch.nn.Module:
        if isinstance(plan.checkpoint, GGUFCheckpoint):
            return rounded(plan.checkpoint.model, dtype or kept)
        return native_model(family, plan.checkpoint.folder, plan.raw, dtype, kept)

    def written() -> torch.nn.Module:
        if not plan.overrides:
            return MiniLLMForCausalLM.from_pretrained(folder, dtype=kept)
        try:
            config = family.read_config(plan.raw)
            fits = shapes_of(family.mappings(config)[1]) == shapes
        except ConversionError:
            config, fits = None, False
        if not fits:
            raise NotComparableError(f"with {', '.join(plan.overrides)} set otherwise, the family has no such model")
        return MiniLLMForCausalLM.from_pretrained(folder, config=config, dtype=kept)

    compare_models(source, written, elements_of(shapes), kept)


def compare_export(
    family: Family,
    checkpoint: Checkpoint,
    overrides: dict[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
    read_back: Callable[[torch.dtype], torch.nn.Module],
) -> None:
    """Compares what `export` wrote with its source.

    Args:
        family: whose model was written.
        checkpoint, overrides: the source, and fields of its config that were taken otherwise.
        folder: what was written.
        dtype: what the weights were cast to; None if they were not.
        read_back: the MiniLLM, in a dtype, that `folder` converts to: what is compared where transformers has no model
            of the family.

    Raises:
        ConversionError: the logits differ, or transformers cannot load the folder.
    """
    # From the file: the config that was exported would bring whatever went wrong with it to both sides.
    config = MiniLLMConfig.from_dict(read_json(checkpoint.folder / CONFIG_NAME), **overrides)
    shapes = shapes_of(family.mappings(config)[1])
    kept = wide(dtype or widest(checkpoint.kinds, shapes))

    def source() -> torch.nn.Module:
        model = MiniLLMForCausalLM.from_pretrained(checkpoint.folder, config=config, dtype=dtype or kept)
        return model.to(kept)  # pyright: ignore[reportArgumentType]: transformers wraps it without types

    def written() -> torch.nn.Module:
        if family.defaults is not None:
            logger.info(f"transformers has no {family.name}: the written folder is compared as MiniLLM reads it.")
            return read_back(kept)
        try:
            return native_model(family, folder, read_json(folder / CONFIG_NAME), None, kept)
        except NotComparableError as error:
            raise ConversionError(f"the written {family.name} cannot be used: {error}") from error

    compare_models(source, written, elements_of(shapes), kept)


def native_model(
    family: Family, folder: Path, raw: dict[str, Any], dtype: torch.dtype | None, kept: torch.dtype
) -> torch.nn.Module:
    """transformers' own model of a folder, its weights rounded to `dtype` and held in `kept`.

    Raises:
        NotComparableError: transformers has no such model, or cannot load it whole.
    """
    if family.defaults is not None:
        raise NotComparableError(f"transformers has no {family.name}, and code of a checkpoint is not run")
    try:
        config = family.native_config(raw)
        # Requests for more outputs have some classes compute with another back end.
        config.output_attentions = config.output_hidden_states = False
        model, info = getattr(transformers, family.architecture).from_pretrained(
            folder, config=config, dtype=dtype or kept, output_loading_info=True
        )
    except Exception as error:
        # Whatever transformers stumbles over, it says nothing about what was written.
        raise NotComparableError(f"transformers cannot load it: {error}") from error
    if lacking := sorted(info["missing_keys"]):
        raise NotComparableError(f"transformers does not find {lacking[0]} in it")
    return model.to(kept)


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with its weights rounded to `dtype`; buffers, such as RoPE's frequencies, are no weights."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return model


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def elements_of(shapes: Mapping[str, torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())
