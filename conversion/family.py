"""A family as data: how its config keys and tensor names map to MiniLLM's, read in both directions."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from minillm.configuration.configuration_minillm import MISREAD, MiniLLMConfig
from minillm.configuration.feed_forward_fields import GATED_ACTS
from minillm.configuration.saved_values import refuse_impossible
from minillm.configuration.spellings import KNOWN_EXTRA_KEYS
from minillm.conversion.transforms import SAME, Transform
from minillm.modeling_minillm import MiniLLMForCausalLM

ROPE_SPELLINGS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})

# Keys of any config.json that say nothing about what the model computes.
GENERIC_KEYS = (
    frozenset(PreTrainedConfig.__dataclass_fields__)
    | KNOWN_EXTRA_KEYS
    | frozenset(
        "_name_or_path transformers_version auto_map architectures model_type torch_dtype dtype pretraining_tp "
        "unsloth_version use_cache gradient_checkpointing unk_token_id num_beams".split()
    )
) - ROPE_SPELLINGS
GENERIC_KEYS -= {"quantization_config"}

# They shape fresh weights, or stamp the file; the weights of a checkpoint are there already.
NOT_COMPARED = frozenset(
    "initializer_range scale_residual_init deepnorm_beta use_cache skip_logits minillm_version schema_version "
    "dtype".split()
)


LINE_BREAK = re.compile(r"\s*\n\s*")

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
NAMED_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


class ConversionError(ValueError):
    """A checkpoint or a config that cannot be converted exactly; the message, one line, names the key or tensor."""

    def __init__(self, message: str) -> None:
        super().__init__(LINE_BREAK.sub(" ", message))


class TensorRule(NamedTuple):
    """Which native tensors make which of MiniLLM's.

    Names may hold `{i}` (index of a block; the rule then holds for each), `{next}` (i + 1, within the model), `{last}`
    (the last block), `{p}` (weight, and bias where there is one) and, among native names, `{e}` (each expert).

    Attributes:
        native: name or names in the family's checkpoints.
        minillm: name or names in MiniLLM's.
        transform: how the tensors themselves change.
        when: a condition on the config; always, if left out.
    """

    native: str | tuple[str, ...]
    minillm: str | tuple[str, ...]
    transform: Transform = SAME
    when: Callable[[MiniLLMConfig], bool] | None = None


class NameMapping(NamedTuple):
    """A rule with concrete names."""

    native: tuple[str, ...]
    minillm: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: what the user calls it.
        model_type, architecture: what stands in its config.json.
        keys: native key to the field, or fields, of `MiniLLMConfig` that have its value.
        tensors: the rules of its weights.
        fixed: fields that follow from being of this family: a value, or a function of the other fields.
        required: native keys that must have one of these values, since MiniLLM has no setting for others; the first is
            what is written on the way out.
        defaults: values of keys that a config.json may leave out (families that transformers ships have their own).
        ignored: native keys that do not change what the model computes.
        read, write: what no table says: functions from native values to fields, and from a config to native values.
        matches: tells families with the same `model_type` apart, from the raw config.
        partial_rotary: whether its RoPE may turn a part of each head; others turn whole heads, whatever a config says.
        base_prefix: prefix of all tensors but the head; some files lack it.
        ignored_tensors: endings of native names that hold no weights (buffers).
    """

    name: str
    model_type: str
    architecture: str
    keys: Mapping[str, str | tuple[str, ...]]
    tensors: tuple[TensorRule, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] | None = None
    ignored: frozenset[str] = frozenset()
    read: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    write: Callable[[MiniLLMConfig], dict[str, Any]] | None = None
    matches: Callable[[dict[str, Any]], bool] | None = None
    partial_rotary: bool = False
    base_prefix: str = ""
    ignored_tensors: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def read_config(self, raw: dict[str, Any], overrides: Mapping[str, Any] | None = None) -> MiniLLMConfig:
        """MiniLLM's config for a native config.json.

        Raises:
            ConversionError: a key that is not understood, or a value that is none or that MiniLLM has no setting for.
        """
        try:
            refuse_impossible(raw)
            return self._read(raw, overrides or {})
        except ConversionError:
            raise
        except (ValueError, *MISREAD) as error:
            raise ConversionError(f"the {self.name} config cannot be expressed: {error}") from error

    def _read(self, raw: dict[str, Any], overrides: Mapping[str, Any]) -> MiniLLMConfig:
        if raw.get("quantization_config") or raw.get("quantization_bit"):
            raise ConversionError(
                f"`{'quantization_config' if raw.get('quantization_config') else 'quantization_bit'}`: the checkpoint "
                "is quantized; convert the original weights"
            )
        self._refuse_unknown(raw)
        values = self._complete(raw)
        for key, allowed in self.required.items():
            if values.get(key, allowed[0]) not in allowed:
                raise ConversionError(
                    f"`{key}={values[key]!r}` in a {self.name} config: only {' or '.join(map(repr, allowed))} can be "
                    "converted"
                )
        if missing := [key for key, names in self.keys.items() if names in SIZES and values.get(key) is None]:
            raise ConversionError(f"the {self.name} config lacks `{missing[0]}`, which has no default")
        found: dict[str, Any] = {}
        for key, names in self.keys.items():
            if key in values:
                found |= dict.fromkeys(_tuple(names), values[key])
        if self.read is not None:
            found |= self.read(values)
        for name, value in self.fixed.items():
            found[name] = value(found) if callable(value) else value
        found |= {name: real_ids(found[name]) for name in NAMED_IDS if name in found}
        found |= overrides
        if only_ours := words_of_our_own({name: found[name] for name in found if name not in overrides}):
            raise ConversionError(
                f"{', '.join(only_ours)} in a {self.name} config: only MiniLLM has it; set the field to what is meant"
            )
        if "rope_parameters" not in overrides:
            self._refuse_partial_rotary(found.get("rope_parameters"))
        return MiniLLMConfig(**found)

    def _refuse_partial_rotary(self, rope: Any) -> None:
        factor = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
        if not self.partial_rotary and factor not in (None, 1):
            raise ConversionError(
                f"`rope_parameters['partial_rotary_factor']={factor!r}`: a {self.name} turns whole heads and does not "
                "read it, while MiniLLM would; take it out of the config, or set `rope_parameters` to what is meant"
            )

    def write_config(self, config: MiniLLMConfig) -> dict[str, Any]:
        """The native config.json, complete, of a config that this family expresses exactly.

        Raises:
            ConversionError: naming each field that stands in the way, with the value the family has.
        """
        in_the_way = [f"{word} (only MiniLLM has it)" for word in words_of_our_own(vars(config))]
        values = {key: allowed[0] for key, allowed in self.required.items()}
        values |= {key: getattr(config, _tuple(names)[0]) for key, names in self.keys.items()}
        if self.write is not None:
            values |= self.write(config)
        values = {"model_type": self.model_type, "architectures": [self.architecture], **values}
        wrong = self._fixed_otherwise(config)
        try:
            values = self._complete(self._with_floats(values))
            back = self.read_config(values)
        except (ValueError, *MISREAD) as error:
            if not wrong and not in_the_way:
                raise ConversionError(f"this model is no {self.name}: {error}") from error
        else:
            names = sorted(item.name for item in fields(MiniLLMConfig) if item.name not in GENERIC_FIELDS)
            wrong = {name: getattr(back, name) for name in names if getattr(config, name) != getattr(back, name)}
        in_the_way += [f"`{name}={getattr(config, name)!r}` ({self.name} has {wrong[name]!r})" for name in wrong]
        if in_the_way:
            raise ConversionError(f"this model is no {self.name}; in the way: {', '.join(in_the_way)}")
        return values

    def _fixed_otherwise(self, config: MiniLLMConfig) -> dict[str, Any]:
        """Fields that are the same in every model of this family, and are something else in this one."""
        wanted = {name: value(vars(config)) if callable(value) else value for name, value in self.fixed.items()}
        return {
            name: value
            for name, value in wanted.items()
            if name not in NOT_COMPARED and getattr(config, name) != value
        }

    def _with_floats(self, values: dict[str, Any]) -> dict[str, Any]:
        """Whole numbers as floats where the native config takes nothing else."""
        declared = {} if self.defaults is not None else CONFIG_MAPPING[self.model_type].__dataclass_fields__
        kinds = {key: item.type for key, item in declared.items()}
        return {key: float(value) if kinds.get(key) is float else value for key, value in values.items()}

    def _complete(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The config with every default filled in, old spellings read as transformers reads them."""
        if self.defaults is not None:
            return copy.deepcopy({**self.defaults, **raw})
        try:
            return self.native_config(raw).to_dict()
        except (ValueError, *MISREAD) as error:
            raise ConversionError(f"this is no valid {self.name} config: {error}") from error

    def native_config(self, raw: dict[str, Any]) -> PreTrainedConfig:
        """transformers' own config of a native config.json, which stays as it is; errors are those of transformers."""
        # Its classes write their defaults into nested dictionaries, and those may be a config's own.
        return CONFIG_MAPPING[self.model_type].from_dict(copy.deepcopy(raw))

    def _refuse_unknown(self, raw: dict[str, Any]) -> None:
        known = GENERIC_KEYS | self.ignored | set(self.keys) | set(self.required)
        if self.defaults is not None:
            known |= set(self.defaults)
        else:
            native = CONFIG_MAPPING[self.model_type]
            known |= set(native.__dataclass_fields__) | set(native.attribute_map)
            if "rope_parameters" in native.__dataclass_fields__:
                known |= ROPE_SPELLINGS
        if unknown := sorted(set(raw) - known):
            raise ConversionError(
                f"a {self.name} config has no key {', '.join(f'`{key}={raw[key]!r}`' for key in unknown)}: what it "
                "means is unknown; name it in `ignore_keys` if it does not change what the model computes"
            )

    def mappings(self, config: MiniLLMConfig) -> tuple[list[NameMapping], dict[str, torch.Tensor]]:
        """The rules with concrete names, and MiniLLM's tensors by name on the meta device."""
        targets = tensors_of(config)
        found = [mapping for rule in self.tensors for mapping in _expand(rule, config, targets)]
        filled = [name for mapping in found for name in mapping.minillm]
        if sorted(filled) != sorted(targets):
            raise ConversionError(
                f"the {self.name} rules do not fit this config: {sorted(set(targets).symmetric_difference(filled))}"
            )
        return found, targets


def words_of_our_own(values: Mapping[str, Any]) -> list[str]:
    """Fields with values that no family has, since transformers knows none of them."""
    act, rope = values.get("hidden_act"), values.get("rope_parameters")
    kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
    found = [f"`hidden_act={act!r}`"] if act in GATED_ACTS else []
    return found + ([f"`rope_parameters['rope_type']={kind!r}`"] if kind == "ntk" else [])


def tensors_of(config: MiniLLMConfig) -> dict[str, torch.Tensor]:
    """The tensors that a saved MiniLLM holds, by name on the meta device."""
    with torch.device("meta"):
        tensors = MiniLLMForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


GENERIC_FIELDS = frozenset(PreTrainedConfig.__dataclass_fields__) - {"tie_word_embeddings"} | NOT_COMPARED


def real_ids(ids: Any) -> Any:
    """A token id, or a list of them, without those below 0: in old checkpoints they stand for no token."""
    if isinstance(ids, list):
        return [one for one in ids if real_ids(one) is not None] or None
    return None if isinstance(ids, int) and ids < 0 else ids


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _expand(rule: TensorRule, config: MiniLLMConfig, targets: dict[str, torch.Tensor]) -> Iterator[NameMapping]:
    native, minillm = _tuple(rule.native), _tuple(rule.minillm)
    if rule.when is not None and not rule.when(config):
        return
    text = " ".join((*native, *minillm))
    layers = config.num_hidden_layers
    blocks = range(layers - ("{next}" in text)) if "{i}" in text else range(1)
    for i in blocks:
        for p in ("weight", "bias") if "{p}" in text else ("",):
            marks = {"i": i, "next": i + 1, "last": layers - 1, "p": p, "e": "{e}"}
            ours = tuple(name.format(**marks) for name in minillm)
            if all(name in targets for name in ours):
                theirs = tuple(_experts(tuple(name.format(**marks) for name in native), config))
                yield NameMapping(theirs, ours, rule.transform)


def _experts(names: tuple[str, ...], config: MiniLLMConfig) -> Iterator[str]:
    for name in names:
        if "{e}" in name:
            yield from (name.format(e=e) for e in range(config.num_local_experts))
        else:
            yield name
