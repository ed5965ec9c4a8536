"""Numbers that decide how the work is done, never what comes out: what is computed in parts, and from which size on.

One object of this process, `minillm.tuning.tuning`, which every model has as its attribute `tuning`; so a model that
was loaded without the plug-in has it too.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

KINDS_OF_KEYS = {"chunk_logits": (str, "a device type"), "longest_fold": (torch.dtype, "a torch.dtype")}


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def checked(name: str, value: Any) -> Any:
    """The value of a field of `Tuning`, if it is of that field's kind; a mapping as one that is read only, so that no
    entry escapes the check.

    Raises:
        ValueError: if it is not.
    """
    if name == "use_liger":
        fits, kind = isinstance(value, bool), "True or False"
    elif name == "folding_devices":
        fits = isinstance(value, tuple) and all(isinstance(each, str) for each in value)
        kind = "a tuple of device types, such as ('cuda',)"
    elif name in KINDS_OF_KEYS:
        key, kind = KINDS_OF_KEYS[name]
        fits = isinstance(value, Mapping) and all(isinstance(k, key) and is_count(n) for k, n in value.items())
        kind = f"a mapping from {kind} to an integer of at least 0"
        if name == "chunk_logits":
            fits, kind = fits and "cuda" in value, f"{kind}, with an entry for 'cuda'"
        value = MappingProxyType(dict(value)) if fits else value
    else:
        fits, kind = is_count(value), "an integer of at least 0"
    if not fits:
        raise ValueError(f"`tuning.{name} = {value!r}`: it must be {kind}")
    return value


@dataclass
class Tuning:
    """Set an attribute, and models of this process follow from their next call on: `model.tuning.use_liger = False`.
    Mappings are set whole.

    Attributes:
        chunk_logits: logits that are alive at once in a loss without all of them, by device type ("cuda" stands for
            every type that is not named): on CPU what its caches hold, on CUDA what keeps matrix products large. A
            token's logits stay together.
        use_liger: on CUDA such a loss is made by Liger's kernel, where `liger-kernel` is installed.
        growing_elements: elements of a layer's cached keys from which on the cache makes room for tokens to come;
            fewer are joined anew in the time that room takes. `2**62`: never.
        least_room: tokens that a layer of the cache makes room for at once, or one in eight of those it holds where
            that is more.
        blocks_from: on CPU, attention over more new tokens than this is worked through in blocks. `2**62`: never.
        any_model_blocks_from: the same for other models under the name "minillm_blocks", whose own masks of so few
            tokens cost less than blocks do.
        plain_blocks_up_to: on CPU, beyond so many tokens SDPA's own way with plain causal attention beats blocks.
        kept_elements: elements of masks that blocks keep for all layers; those beyond are made anew wherever they are
            used, the backward pass included, so that memory grows with the length and not with its square.
        open_block_keys: fewer keys that need no mask are not worth a call of SDPA to themselves, unless they are all
            of a block.
        folding_devices: device types on which ALiBi becomes channels of queries and keys in 16-bit models, so that
            SDPA's fused kernels serve. `()`: none.
        longest_fold: up to so many tokens that is as exact as a table of the bias, by dtype. The larger
            `slope * position`, the fewer digits of a float32 sum are left to the score, which float16 is fine enough
            to show. In bfloat16 the limit is that of two digits below 256.
        widest_fold: the widest heads that SDPA's fused kernels take.
    """

    chunk_logits: Mapping[str, int] = field(default_factory=lambda: {"cpu": 2**22, "cuda": 2**27})
    use_liger: bool = True
    growing_elements: int = 2**16
    least_room: int = 64
    blocks_from: int = 128
    any_model_blocks_from: int = 256
    plain_blocks_up_to: int = 1024
    kept_elements: int = 2**26
    open_block_keys: int = 1024
    folding_devices: tuple[str, ...] = ("cuda",)
    longest_fold: Mapping[torch.dtype, int] = field(
        default_factory=lambda: {torch.bfloat16: 2**16, torch.float16: 2**13}
    )
    widest_fold: int = 256

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dataclass_fields__
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise AttributeError(f"`tuning` has no {name!r}: {hint}")
        super().__setattr__(name, checked(name, value))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # Read-only mappings can be neither copied nor pickled.
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return type(self), tuple(dict(value) if isinstance(value, Mapping) else value for value in values)


class TuningOfModel:
    """The attribute `tuning` of models: the one object of the process, which no other can replace."""

    def __get__(self, model: Any, owner: type) -> Tuning:
        return tuning

    def __set__(self, model: Any, value: Any) -> None:
        raise AttributeError("`model.tuning` is one object for all models: set a field, `model.tuning.NAME = value`")


tuning = Tuning()
