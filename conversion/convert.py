"""The verbs: `load` and `convert` bring a family's checkpoint in, `export` takes a MiniLLM out again.

Names and shapes of all tensors are compared before any is read: every native tensor must be used once, and every
tensor of MiniLLM filled.
"""

import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.conversion.carried_files import carry_over_plainly
from minillm.conversion.checkpoint import (
    CONFIG_NAME,
    MAX_SHARD_SIZE,
    WEIGHT_DTYPES,
    Checkpoint,
    finite_tensor,
    local_folder,
    require_finite,
    require_weights,
    widest,
    write_weights,
)
from minillm.conversion.comparison import compare_conversion, compare_export
from minillm.conversion.families import BLOOM, FALCON, GLM, GPT2, LLAMA, MIXTRAL, MPT
from minillm.conversion.family import ConversionError, Family, NameMapping, tensors_of
from minillm.conversion.files import faults_of
from minillm.conversion.gguf_file import GGUFCheckpoint
from minillm.conversion.glm_families import BAICHUAN, BAICHUAN2, CHATGLM, CHATGLM2, GLM_130B, GLM_INFILLING
from minillm.conversion.transforms import Tensors
from minillm.modeling_minillm import MiniLLMForCausalLM
from minillm.publishing.cards import CARD_NAME, model_card
from minillm.publishing.folders import claimed, new_folder, require_apart
from minillm.publishing.hub import completed_generation_config

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GPT2,
        BLOOM,
        LLAMA,
        FALCON,
        MPT,
        BAICHUAN,
        BAICHUAN2,
        GLM_INFILLING,
        GLM_130B,
        CHATGLM,
        CHATGLM2,
        GLM,
        MIXTRAL,
    )
}
HEAD = "lm_head.weight"

Step = tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]
Make = Callable[[str], torch.Tensor]
Progress = Callable[[int, int], None]
"""Called with the number of tensors done and the number of all."""


def detect(raw: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConversionError: none, or more than one, that it could be.
    """
    kind = raw.get("model_type")
    same_type = [family for family in FAMILIES.values() if family.model_type == kind]
    found = [family for family in same_type if family.matches is None or family.matches(raw)]
    if len(found) == 1:
        return found[0]
    if same_type:
        names = " or ".join(repr(family.name) for family in same_type)
        raise ConversionError(f"`model_type={kind!r}`: the config does not tell which family; say `family={names}`")
    known = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
    raise ConversionError(f"`model_type={kind!r}` in {CONFIG_NAME} is no family that can be converted; known: {known}")


def family_of(name: str) -> Family:
    """The family called `name`. ConversionError lists them all if there is none."""
    if name not in FAMILIES:
        raise ConversionError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


class Rewriter:
    """Makes the tensors of one naming from those of another, one rule at a time; each source is read once.

    Args:
        steps: (source names, target names, function from source tensors to target tensors).
        read: gives a source tensor.
        dtype: what tensors are cast to; None leaves them as they are.

    Raises:
        ConversionError: `dtype` is none of weights; later, a tensor that it makes infinite.
    """

    def __init__(self, steps: Iterable[Step], read: Make, dtype: torch.dtype | None) -> None:
        if dtype not in (None, *WEIGHT_DTYPES):
            raise ConversionError(f"`dtype={dtype}`: weights can be {', '.join(map(str, WEIGHT_DTYPES))}")
        self.by_target = {name: step for step in steps for name in step[1]}
        self.read, self.dtype = read, dtype
        self.made: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """The target tensor called `name`."""
        if name not in self.made:
            sources, targets, function = self.by_target[name]
            self.made |= dict(zip(targets, function([self.read(source) for source in sources]), strict=True))
        tensor = self.made.pop(name).contiguous()
        if self.dtype not in (None, tensor.dtype):
            tensor = require_finite(name, tensor.to(self.dtype), f"in {self.dtype}: choose a wider `dtype`")
        # A part of a fused tensor would keep all of it alive.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class Plan:
    """How a family's checkpoint becomes a MiniLLM; everything is checked before a tensor is read.

    Args:
        checkpoint: where the tensors come from.
        family: a family's name; None finds it in the config.
        ignore_keys: config keys that the caller vouches for.
        overrides: fields of `MiniLLMConfig` that replace what the family says.

    Raises:
        ConversionError: a key or tensor that is not understood, missing or of a wrong shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | GGUFCheckpoint,
        family: str | None,
        ignore_keys: Iterable[str],
        overrides: dict[str, Any],
    ) -> None:
        raw = {key: value for key, value in checkpoint.config.items() if key not in set(ignore_keys)}
        self.raw, self.overrides = raw, overrides
        raw["_name_or_path"] = raw.get("_name_or_path") or checkpoint.folder.resolve().name
        self.checkpoint = checkpoint
        with faults_of(checkpoint.file):
            self.family = detect(raw) if family is None else family_of(family)
            self.config = self.family.read_config(raw, overrides)
            self.mappings, self.targets = self.family.mappings(self.config)
            self.source_names = self._source_names()
            self._check_tensors()

    @property
    def read_names(self) -> list[str]:
        """The names, in the files, of the tensors that rules read."""
        return [self.source_names[name] for mapping in self.mappings for name in mapping.native]

    def _source_names(self) -> dict[str, str]:
        """Canonical native name to the name in the files, which may lack the prefix of the base model."""
        prefix = self.family.base_prefix
        bare = prefix and not any(name.startswith(prefix) for name in self.checkpoint.names)
        names = {prefix + name if bare and name != HEAD else name: name for name in self.checkpoint.names}
        return {name: source for name, source in names.items() if not name.endswith(self.family.ignored_tensors)}

    def _check_tensors(self) -> None:
        wanted = {name for mapping in self.mappings for name in mapping.native}
        found = set(self.source_names)
        if self.config.tie_word_embeddings and HEAD in found - wanted:
            self._check_tied_head()
            found.remove(HEAD)
        if missing := sorted(wanted - found):
            raise ConversionError(f"the {self.family.name} checkpoint lacks {some(missing)}")
        if unused := sorted(found - wanted):
            raise ConversionError(f"the {self.family.name} checkpoint holds {some(unused)}, which no rule reads")
        require_weights(self.checkpoint.kinds, self.read_names)
        for mapping in self.mappings:
            for name, tensor in native_shapes(mapping, self.targets, self.config).items():
                shape = self.checkpoint.shapes[self.source_names[name]]
                if shape != list(tensor.shape):
                    raise ConversionError(
                        f"`{name}` has shape {shape}; a {self.family.name} of this config has {list(tensor.shape)}"
                    )

    def _check_tied_head(self) -> None:
        embedding = next(m.native[0] for m in self.mappings if m.minillm == ("model.embed_tokens.weight",))
        if not torch.equal(*(self.checkpoint.tensor(self.source_names[name]) for name in (embedding, HEAD))):
            raise ConversionError(
                f"`{HEAD}` differs from `{embedding}`, but `tie_word_embeddings=True`: set `tie_word_embeddings=False`"
            )

    def rewriter(self, dtype: torch.dtype | None) -> Rewriter:
        steps = (
            (mapping.native, mapping.minillm, given(self.config, mapping.transform.to_minillm))
            for mapping in self.mappings
        )
        return Rewriter(steps, lambda name: finite_tensor(self.checkpoint, self.source_names[name]), dtype)


def given(
    config: MiniLLMConfig, transform: Callable[[Tensors, MiniLLMConfig], Tensors]
) -> Callable[[Tensors], Tensors]:
    return lambda tensors: transform(tensors, config)


def native_shapes(
    mapping: NameMapping, targets: dict[str, torch.Tensor], config: MiniLLMConfig
) -> dict[str, torch.Tensor]:
    """The native tensors of a rule, on the meta device."""
    native = mapping.transform.to_native([targets[name] for name in mapping.minillm], config)
    return dict(zip(mapping.native, native, strict=True))


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_checkpoint(source: str | Path, revision: str | None) -> Checkpoint | GGUFCheckpoint:
    if str(source).endswith(".gguf") and revision is None:
        if not Path(source).exists():
            raise ConversionError(f"{source} does not exist")
        return GGUFCheckpoint(Path(source))
    return Checkpoint(local_folder(source, revision))


def load(
    source: str | Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    ignore_keys: Iterable[str] = (),
    **overrides: Any,
) -> MiniLLMForCausalLM:
    """Loads another family's checkpoint as a MiniLLM with equal logits.

    Args:
        source: a folder with `config.json` and weights (safetensors, or `.bin` holding nothing but tensors), a Hub
            repository, or a `.gguf` file of a LLaMA.
        family: a key of `FAMILIES`, where the config does not tell.
        dtype: dtype of the weights; None keeps that of the checkpoint.
        revision: branch, tag or commit of a repository.
        ignore_keys: config keys that would be refused, and that do not change what the model computes.
        overrides: fields of `MiniLLMConfig` to set otherwise, e.g. `alibi_rounding="none"`.

    Raises:
        ConversionError: the checkpoint is damaged or not understood; the message names the key, tensor or file.
    """
    plan = Plan(open_checkpoint(source, revision), family, ignore_keys, overrides)
    make = plan.rewriter(dtype)
    tensors = {name: make(name) for name in plan.targets}
    plan.config.dtype = kept = tensors["model.embed_tokens.weight"].dtype
    model = MiniLLMForCausalLM.from_pretrained(None, config=plan.config, state_dict=tensors, dtype=kept)
    if plan.checkpoint.generation_config is not None:
        model.generation_config = plan.checkpoint.generation_config
    return model


def convert(
    source: str | Path,
    out: str | Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    ignore_keys: Iterable[str] = (),
    max_shard_size: str | int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> MiniLLMConfig:
    """Writes a folder with the MiniLLM of another family's checkpoint: weights, config, code, tokenizer, model card.

    Tensors are read and written one output shard at a time, so that memory holds no more than a shard and a layer. The
    folder appears when it is complete; an interruption leaves nothing. Before that its logits are compared with those
    of transformers' own model of the checkpoint, where there is one that fits in memory; else the log says so.

    Args:
        out: the folder; it must not exist, or be empty.
        overwrite: replace an older MiniLLM in `out`. A folder with anything else in it, or a link, is never replaced.
        max_shard_size: bytes, or e.g. `"2GB"`, of a weight file.
        progress: told how many tensors of how many are written.
        source, family, dtype, revision, ignore_keys, overrides: as for `load`.

    Raises:
        ConversionError: as `load`, or the written model computes something else than its source.
        ValueError: `out` is not free, or is the source, or one is inside the other; nothing is read before.
        FolderInUse: another process writes `out`.
    """
    check_output(source, out, MiniLLMConfig.model_type, overwrite)
    checkpoint = open_checkpoint(source, revision)
    checkpoint.check_carried()
    plan = Plan(checkpoint, family, ignore_keys, overrides)
    make = counted(plan.rewriter(dtype), len(plan.targets), progress)
    with new_folder(out, MiniLLMConfig.model_type, overwrite) as folder:
        kept = dtype or widest(checkpoint.kinds, plan.read_names)
        shapes = {name: tensor.to(kept) for name, tensor in plan.targets.items()}
        kinds = write_weights(folder, shapes, make, max_shard_size)
        plan.config.dtype = kinds["model.embed_tokens.weight"]
        plan.config.architectures = [MiniLLMForCausalLM.__name__]
        plan.config.save_pretrained(folder)
        with torch.device("meta"):
            model = MiniLLMForCausalLM(plan.config)
        model_card(model).save(folder / CARD_NAME)
        checkpoint.carry_over(folder)
        if not (folder / "generation_config.json").exists():
            completed_generation_config(model).save_pretrained(folder)
        compare_conversion(plan, folder, dtype)
    return plan.config


def check_output(source: str | Path, out: str | Path, model_type: str, overwrite: bool) -> None:
    """Refuses, before any work, an `out` that may not be written."""
    require_apart(source, out)
    with claimed(out, model_type, overwrite):
        pass


def counted(make: Make, total: int, progress: Progress | None) -> Make:
    """`make`, telling `progress` after each tensor."""
    if progress is None:
        return make
    done = 0

    def made(name: str) -> torch.Tensor:
        nonlocal done
        tensor = make(name)
        done += 1
        progress(done, total)
        return tensor

    return made


def export(
    source: str | Path,
    out: str | Path,
    family: str,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Writes a MiniLLM folder as a checkpoint of another family, where that family computes exactly the same.

    No code goes with it: the tokenizer becomes one of transformers. The logits of the written model are compared with
    the source's before the folder appears, where one model at a time fits in memory; else the log says so.

    Args:
        source: a folder or Hub repository with a MiniLLM causal language model.
        out: the folder; it must not exist, or be empty.
        family: a key of `FAMILIES`.
        overwrite: replace an older model of the family in `out`; else as for `convert`.
        overrides: fields of the config to take otherwise, e.g. `hidden_dropout=0.0`.
        dtype, max_shard_size, progress: as for `convert`.

    Returns:
        The native config.

    Raises:
        ConversionError: the family has no such model (each field in the way is named), the folder is damaged or holds
            links that lead out of it, or the written model or tokenizer differs from the source's.
        ValueError, FolderInUse: as `convert`.
    """
    target = family_of(family)
    check_output(source, out, target.model_type, overwrite)
    checkpoint = Checkpoint(local_folder(source))
    checkpoint.check_carried()
    if checkpoint.config.get("model_type") != MiniLLMConfig.model_type:
        raise ConversionError(f"{source} holds a {checkpoint.config.get('model_type')!r} model, not a MiniLLM")
    with faults_of(checkpoint.file):
        config = MiniLLMConfig.from_dict(checkpoint.config, **copy.deepcopy(overrides))
        check_minillm_tensors(checkpoint, tensors_of(config))
    native_config = target.write_config(config)
    mappings, shapes = target.mappings(config)
    native = {}
    for mapping in mappings:
        native |= native_shapes(mapping, shapes, config)
    steps = ((m.minillm, m.native, given(config, m.transform.to_native)) for m in mappings)
    make = counted(Rewriter(steps, partial(finite_tensor, checkpoint), dtype), len(native), progress)
    with new_folder(out, target.model_type, overwrite) as folder:
        kept = dtype or widest(checkpoint.kinds, shapes)
        shapes = {name: tensor.to(kept) for name, tensor in native.items()}
        kinds = write_weights(folder, shapes, make, max_shard_size)
        native_config["dtype"] = str(kinds[next(iter(native))]).removeprefix("torch.")
        if target.defaults is None:
            target.native_config(native_config).save_pretrained(folder)
        else:
            (folder / CONFIG_NAME).write_text(json.dumps(native_config, indent=2) + "\n", "utf-8")
        carry_over_plainly(checkpoint.folder, folder)
        compare_export(target, checkpoint, overrides, folder, dtype, partial(load, folder, family))
    return native_config


def check_minillm_tensors(checkpoint: Checkpoint, shapes: dict[str, torch.Tensor]) -> None:
    """Compares names and shapes in a MiniLLM folder with what its config says. ConversionError where they differ."""
    names = set(checkpoint.names)
    if missing := sorted(set(shapes) - names):
        raise ConversionError(f"{checkpoint.folder} lacks {some(missing)}")
    if unused := sorted(names - set(shapes)):
        raise ConversionError(f"{checkpoint.folder} holds {some(unused)}, which no causal language model has")
    require_weights(checkpoint.kinds, shapes)
    for name, tensor in shapes.items():
        if checkpoint.shapes[name] != list(tensor.shape):
            raise ConversionError(
                f"`{name}` has shape {checkpoint.shapes[name]}; its config says {list(tensor.shape)}"
            )
