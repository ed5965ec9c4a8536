"""`MiniLLMConfig`: every architectural choice as one typed, validated field."""

import copy
import difflib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from packaging.version import parse
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from minillm.configuration.attention_fields import attention_conflicts
from minillm.configuration.derived_fields import (
    DERIVED,
    FOLLOWED,
    LEFT_OUT,
    Derived,
    derive,
    followed_plan,
    recognised,
    tensor_parallel_plan,
)
from minillm.configuration.feed_forward_fields import feed_forward_conflicts
from minillm.configuration.field_ranges import check_owners, check_ranges
from minillm.configuration.norm_fields import norm_conflicts
from minillm.configuration.preset import PRESETS
from minillm.configuration.rope_fields import (
    OLD_SPELLINGS,
    assigned_rope,
    check_rope,
    refuse_unknown_rope_keys,
    take_old_spellings,
)
from minillm.configuration.saved_values import one_line, refuse_impossible, what_stands
from minillm.configuration.spellings import foreign_conflicts, refuse_misspelt, warn_of_unknown
from minillm.configuration.token_fields import TOKEN_FIELDS, ids_outside, token_conflicts, warn_of_tokens
from minillm.version import __version__

logger = logging.get_logger(__name__)

SCHEMA_VERSION = 1
"""Number of the meaning of the fields below; a config that carries a newer one is refused."""

OLDEST_TRANSFORMERS = "5.17"

MISREAD = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What reading a saved config can stumble over where a value has the wrong type."""

if parse(transformers.__version__) < parse(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"MiniLLM needs transformers >= {OLDEST_TRANSFORMERS}, found {transformers.__version__}: "
        f"pip install -U 'transformers>={OLDEST_TRANSFORMERS},<6'"
    )


@strict
class MiniLLMConfig(PreTrainedConfig):
    r"""One decoder, in which architectures are settings. `MiniLLMConfig()` has the shape of LLaMA-7B.

    Args:
        vocab_size (`int`, defaults to 32000): number of token ids.
        hidden_size (`int`, defaults to 4096): width of the residual stream.
        num_hidden_layers (`int`, defaults to 32): number of blocks.
        num_attention_heads (`int`, defaults to 32): query heads per block.
        num_key_value_heads (`int`, *optional*): key/value heads; as many as query heads (MHA) if left out, 1 is MQA
            (arXiv 1911.02150), anything between is GQA (arXiv 2305.13245).
        head_dim (`int`, *optional*): width of one head; `hidden_size // num_attention_heads` if left out.
        intermediate_size (`int`, *optional*): inner width of the feed-forward; if left out, `8/3 * hidden_size`
            rounded up to a multiple of 256 for `glu` and for each expert of `moe`, `4 * hidden_size` for `mlp`.
        max_position_embeddings (`int`, defaults to 2048): length the model is made for. A limit only where positions
            come from a table (`learned`, `glm_2d`); ALiBi, Sandwich, RoPE and sinusoidal positions run past it.

        attention_type (`str`, defaults to `"causal"`): `causal`; `prefix` (tokens inside `prefix_mask` see one
            another in both directions, the rest is causal: GLM, arXiv 2103.10360); `bidirectional` (encoder).
        sliding_window (`int`, *optional*): a token sees the last `sliding_window` tokens, itself included (both ways
            if bidirectional), from 2 on; inside a prefix block everything stays visible. Padding between real tokens,
            which would count, is refused.
        prompt_is_prefix (`bool`, defaults to `True`): whether `generate()` takes the prompt as the prefix.
        answer_start_token_id (`int`, *optional*), turn_token_ids (`list[int]`, *optional*): tokens of a chat by which
            `generate()` tells prompts from answers: an answer begins after `answer_start_token_id` and ends with
            `eos_token_id` or before the next of `turn_token_ids` (all roles); all else is prompt, each run of it a
            bidirectional block of its own. Without them the whole prompt is one.
        qk_norm (`bool`, defaults to `False`): normalise queries and keys per head, before RoPE (arXiv 2302.05442).
        attention_qkv_bias, attention_out_bias (`bool`, default to `False`): biases of the q/k/v and output projection.
        attention_dropout (`float`, defaults to 0): dropout on attention probabilities.

        position_embedding_type (`str`, defaults to `"rope"`): `rope` (arXiv 2104.09864), `alibi` (2108.12409),
            `sandwich` (2212.10356), `learned`, `sinusoidal` (1706.03762), `glm_2d` (2103.10360), `none`.
        rope_parameters (`dict`, *optional*): transformers' RoPE dictionary: `rope_type` (`default`, `linear`,
            `dynamic`, `yarn`, `llama3`, `longrope`, or `ntk` for a fixed NTK-aware base), `rope_theta` (10000),
            `factor`, `partial_rotary_factor`, ... The old `rope_theta` and `rope_scaling` land here.
        rope_interleaved (`bool`, defaults to `False`): rotate pairs (2i, 2i+1) instead of (i, i + d/2).
        rope_2d (`bool`, defaults to `False`): rotate the first half of a head by `position_ids`, the second by
            `block_position_ids` (ChatGLM-6B).
        position_table_size (`int`, *optional*): rows of a learned table; `max_position_embeddings`, one more for
            `glm_2d`, if left out.
        alibi_scale (`float`, defaults to 1): factor on the bias (Falcon: `head_dim ** -0.5`).
        alibi_bias_max (`float`, defaults to 8): slopes are `2 ** (-alibi_bias_max * i / heads)` (MPT's name).
        alibi_rounding (`str`, defaults to `"none"`): `none` is exact at any length; `bloom` rounds the bias to the
            model's dtype, `falcon` slopes and positions to bfloat16, as those models do.
        sandwich_dim (`int`, defaults to 128): number of channels of Sandwich's sinusoids.

        norm_type (`str`, defaults to `"rmsnorm"`): `rmsnorm` (arXiv 1910.07467) or `layernorm` (1607.06450).
        norm_eps (`float`, defaults to 1e-6): added to the variance.
        norm_bias (`bool`, *optional*): bias of LayerNorm; yes for `layernorm` if left out.
        norm_placement (`str`, defaults to `"pre"`): `pre`, `post`, `deepnorm` (arXiv 2203.00555), `sandwich`
            (CogView, 2105.13290: a norm before and one after each sub-layer).
        final_norm (`bool`, *optional*): norm after the last block; yes for `pre` and `sandwich` if left out.
        deepnorm_alpha, deepnorm_beta (`float`, *optional*): DeepNorm's residual factor and initial gain;
            `(2N) ** 0.25` and `(8N) ** -0.25` for N blocks if left out.
        parallel_residual (`bool`, defaults to `False`): attention and feed-forward read the same stream (GPT-J).
        num_parallel_norms (`int`, defaults to 1): one shared norm or one for each of the two (Falcon 7B / 40B).

        mlp_type (`str`, defaults to `"glu"`): `glu` (gated, arXiv 2002.05202), `mlp`, or `moe` (a mixture of gated
            experts as in Mixtral, 2401.04088).
        hidden_act (`str`, defaults to `"silu"`): a name in transformers' `ACT2FN`; for `glu` and `moe` also `gtu`
            (tanh times sigmoid, 1612.08083) and `bilinear` (no activation).
        mlp_bias (`bool`, defaults to `False`): biases of the feed-forward; experts have none.
        num_local_experts (`int`, *optional*): experts per block; 8 for `moe` if left out, 0 elsewhere.
        num_experts_per_tok (`int`, *optional*): experts that a token goes through; 2 for `moe` if left out, 0
            elsewhere. Their weights sum to 1, so with one expert the router learns from its own loss alone.
        router_aux_loss_coef (`float`, *optional*): weight of the load-balancing loss (arXiv 2101.03961, section 2.2),
            which is added to the loss if router logits are asked for; 0.001 for `moe` if left out, 0 elsewhere.
        router_jitter_noise (`float`, defaults to 0): in training, what enters router and experts is multiplied by
            factors drawn from `1 - noise` to `1 + noise`.
        output_router_logits (`bool`, defaults to `False`): return router logits and the load-balancing loss, and train
            with it.

        embedding_norm (`bool`, defaults to `False`): a norm right after the embedding (BLOOM).
        embedding_gradient_scale (`float`, defaults to 1): factor on the gradient of the embedding (GLM-130B: 0.1).
        norm_head (`bool`, defaults to `False`): rows of the output head are divided by their length (Baichuan2).
        hidden_dropout, embedding_dropout (`float`, default to 0): dropout on each sub-layer's output and on the
            embedding.
        initializer_range (`float`, defaults to 0.02): standard deviation of the normal initialisation.
        scale_residual_init (`bool`, defaults to `False`): divide the initial weights of output and down projections
            by `sqrt(2 * num_hidden_layers)` (GPT-2).
        use_cache (`bool`, *optional*): return a key/value cache; yes unless bidirectional.
        skip_logits (`bool`, defaults to `False`): in training, compute the loss without ever holding all logits, and
            return none (`None`, which older files hold, is `False`).
        pad_token_id, bos_token_id, eos_token_id: special ids; none, 1 and 2.
        mask_token_id, gmask_token_id, smask_token_id, sop_token_id (`int`, *optional*): GLM's blanks, and the token
            that starts what fills one. With them `generate()` gives a prompt that holds both GLM's prefix and axes.
        tie_word_embeddings (`bool`, defaults to `False`): share the input embedding with the output head.

    Raises:
        ValueError: for impossible or meaningless combinations, naming the fields and the way out.
    """

    model_type = "minillm"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "aux_loss", "router_logits"]
    # The name under which other libraries read it.
    attribute_map = {"num_experts": "num_local_experts"}
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # size
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: Derived[int] = LEFT_OUT
    head_dim: Derived[int] = LEFT_OUT
    intermediate_size: Derived[int] = LEFT_OUT
    max_position_embeddings: int = 2048

    # who may look at whom
    attention_type: Literal["causal", "prefix", "bidirectional"] = "causal"
    sliding_window: int | None = None
    prompt_is_prefix: bool = True
    answer_start_token_id: int | None = None
    turn_token_ids: list[int] | None = None
    qk_norm: bool = False
    attention_qkv_bias: bool = False
    attention_out_bias: bool = False
    attention_dropout: float | int = 0.0

    # how order is known
    position_embedding_type: Literal["rope", "alibi", "sandwich", "learned", "sinusoidal", "glm_2d", "none"] = "rope"
    rope_parameters: dict | None = None
    rope_interleaved: bool = False
    rope_2d: bool = False
    position_table_size: int | None = None
    alibi_scale: float | int = 1.0
    alibi_bias_max: float | int = 8.0
    alibi_rounding: Literal["none", "bloom", "falcon"] = "none"
    sandwich_dim: int = 128

    # normalisation and residual wiring
    #
    #   pre       h = h + f(norm(h))             post      h = norm(h + f(h))
    #   sandwich  h = h + norm'(f(norm(h)))      deepnorm  h = norm(alpha * h + f(h))
    #   parallel  h = h + attention(norm(h)) + feed_forward(norm(h))
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float | int = 1e-6
    norm_bias: Derived[bool] = LEFT_OUT
    norm_placement: Literal["pre", "post", "deepnorm", "sandwich"] = "pre"
    final_norm: Derived[bool] = LEFT_OUT
    deepnorm_alpha: float | int | None = None
    deepnorm_beta: float | int | None = None
    parallel_residual: bool = False
    num_parallel_norms: Literal[1, 2] = 1

    # feed-forward
    mlp_type: Literal["glu", "mlp", "moe"] = "glu"
    hidden_act: str = "silu"
    mlp_bias: bool = False
    num_local_experts: Derived[int] = LEFT_OUT
    num_experts_per_tok: Derived[int] = LEFT_OUT
    router_aux_loss_coef: Derived[float | int] = LEFT_OUT
    router_jitter_noise: float | int = 0.0
    output_router_logits: bool = False

    # stabilisers, initialisation
    embedding_norm: bool = False
    embedding_gradient_scale: float | int = 1.0
    norm_head: bool = False
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    scale_residual_init: bool = False

    # transformers' own
    use_cache: Derived[bool] = LEFT_OUT
    skip_logits: bool | None = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    smask_token_id: int | None = None
    sop_token_id: int | None = None
    tie_word_embeddings: bool = False

    # stamps
    minillm_version: str | None = None
    schema_version: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if (self.schema_version or 0) > SCHEMA_VERSION:
            raise ValueError(
                f"this config has `schema_version={self.schema_version}` (written by MiniLLM {self.minillm_version}), "
                f"but MiniLLM {__version__} understands up to {SCHEMA_VERSION}: pip install -U minillm-hf"
            )
        saved = self.schema_version is not None
        self.minillm_version = __version__
        self.schema_version = SCHEMA_VERSION
        derived = kwargs.pop("derived_fields", None if saved else {})
        if derived is not None and not isinstance(derived, dict):
            raise ValueError(f"`derived_fields={derived!r}` must be a dictionary: leave it out")
        names = [*self._field_names(), *OLD_SPELLINGS]
        if not saved:
            refuse_misspelt(kwargs, names)
        warn_of_unknown(kwargs, names)
        if derived and derived.get("rope_parameters") == self.rope_parameters:
            self.rope_parameters = None
        rope = self._take_rope(kwargs, saved)
        # On the instance, since transformers 5.17 adds to it for tied embeddings.
        self.base_model_tp_plan = tensor_parallel_plan(  # pyright: ignore[reportAttributeAccessIssue]
            self.mlp_type, self.qk_norm
        )
        super().__post_init__(**kwargs)
        fields = vars(self)
        if not rope:
            fields["rope_parameters"] = None
        fields["derived_fields"] = derived
        self.validate_architecture()

    @classmethod
    def _field_names(cls) -> list[str]:
        return [name for name in cls.__dataclass_fields__ if not name.startswith("_")]

    def _take_rope(self, kwargs: dict[str, Any], saved: bool) -> bool:
        """Reads the old spellings of RoPE from `kwargs`; returns whether there is anything said about RoPE."""
        self.rope_parameters = take_old_spellings(self.position_embedding_type, self.rope_parameters, kwargs)
        given = kwargs.get("rope_scaling") or self.rope_parameters or {}
        # A saved config has a base; what lacks it was written by hand, and may mean one by a key of another library.
        if not saved or (given.get("rope_theta") is None and kwargs.get("rope_theta") is None):
            refuse_unknown_rope_keys(given)
        return bool(given) or any(kwargs.get(key) is not None for key in ("rope_theta", "partial_rotary_factor"))

    def __setattr__(self, key: str, value: Any) -> None:
        key = type(self).attribute_map.get(key, key)
        if key not in FOLLOWED or "derived_fields" not in vars(self):
            super().__setattr__(key, value)
            return
        fields = vars(self)
        before = fields.get(key)
        super().__setattr__(key, value)
        if key == "rope_parameters":
            if value is before:
                # transformers completes the dictionary in place and assigns it.
                return
            if value is not None:
                fields[key] = assigned_rope(value, before)
        if key in DERIVED:
            fields["derived_fields"] = {name: old for name, old in self._derived().items() if name != key}
        self._derive()

    def _derived(self) -> dict[str, Any]:
        fields = vars(self)
        # None, or missing in a pickle, if the config was saved before there was such a record.
        return recognised(fields) if fields.get("derived_fields") is None else fields["derived_fields"]

    def _derive(self) -> None:
        """Fills in the fields that follow from others where nobody has set them."""
        fields = vars(self)
        fields["derived_fields"] = derive(fields, self._derived())
        self.base_model_tp_plan = followed_plan(self.base_model_tp_plan, fields)  # pyright: ignore[reportAttributeAccessIssue]

    def validate_architecture(self) -> None:
        """Checks the fields against one another; runs when the config is made and again when a model is built or the
        config saved, since fields may have been assigned in between."""
        if self.is_heterogeneous:
            raise ValueError("`per_layer_config` is set, but all layers of a MiniLLM are alike: leave it out")
        self._derive()
        # Not read by name from the config itself, which takes transformers three function calls for each.
        fields = vars(self)
        check_ranges(fields)
        warn_of_tokens(fields)
        check_owners(fields, type(self).__dataclass_fields__)
        for wrong, message in self._conflicts():
            if wrong:
                raise ValueError(message)
        self.validate_rope()

    def validate_rope(self) -> None:
        """Checks `rope_parameters`, by key and value."""
        if self.position_embedding_type == "rope":
            self.standardize_rope_params()
            check_rope(self)

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Pairs of (is it so, what is wrong and the way out)."""
        fields = SimpleNamespace(**vars(self))
        rules = (attention_conflicts, norm_conflicts, feed_forward_conflicts, token_conflicts, foreign_conflicts)
        return [pair for rule in rules for pair in rule(fields)]

    def _validate_ntk_rope_parameters(self, rope_parameters: dict, ignore_keys: set[str] | None = None) -> None:
        self._check_received_keys(
            "ntk", set(rope_parameters), {"rope_type", "factor"}, {"rope_theta"}, ignore_keys=ignore_keys
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "MiniLLMConfig":
        """As in transformers; with `return_unused_kwargs=True` a pair, which its annotation leaves out, too.

        Raises:
            ValueError: for a file that holds no config, or one that `from_dict` refuses; the message names its place.
            OSError: for a file that cannot be read.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (ValueError, *MISREAD) as error:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no config that can be read: {one_line(error)}"
            ) from error

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own, which takes a folder without a config for a model of default sizes.

        Raises:
            OSError: if there is no config, or something else than a file stands in its place.
            ValueError: if it holds no settings, or what no model has.
        """
        place = Path(pretrained_model_name_or_path)
        file = place / (kwargs.get("subfolder") or "") / "config.json"
        if os.path.lexists(file) and not file.is_file():
            raise OSError(f"{file} is {what_stands(file)}")
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not found:
            if place.is_file() or file.is_file():
                raise ValueError(f"{place if place.is_file() else file} holds no settings")
            raise OSError(f"{place} has no config.json, without which its weights mean nothing")
        refuse_impossible(found)
        return found, kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        found = super()._dict_from_json_file(json_file)
        if not isinstance(found, dict):
            raise ValueError(f"{json_file} holds no mapping but {found!r:.20}")
        return found

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MiniLLMConfig":
        """Builds a config from the dictionary of a saved one and overrides for it, which `from_pretrained` and the
        Auto classes pass on.

        Args:
            config_dict: a key that is no field is kept with a warning.
            kwargs: fields to set otherwise; what follows from them does. Others are left to the caller, as in
                transformers, and given back with `return_unused_kwargs=True`.

        Raises:
            ValueError: for an override that is probably a misspelt field, for values of another type than the field's,
                and for what the constructor refuses.
        """
        refuse_impossible(config_dict)
        refuse_misspelt(kwargs, [*cls._field_names(), *OLD_SPELLINGS])
        for key in ("rope_theta", "partial_rotary_factor"):
            if kwargs.get(key) is not None:
                raise ValueError(f"`{key}={kwargs[key]!r}` is no override: give the whole of `rope_parameters`")
        # The stamp marks what it stands in as saved.
        try:
            found = super().from_dict({"schema_version": SCHEMA_VERSION, **config_dict}, **kwargs)
            config = found[0] if isinstance(found, tuple) else found
            config.validate_architecture()
        except MISREAD as error:
            raise ValueError(f"the config cannot be read: {one_line(error)}") from error
        return found

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "MiniLLMConfig":
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def update(self, config_dict: dict[str, Any]) -> None:
        """Sets attributes; with the dictionary of a saved config, those that it had derived go on following."""
        super().update({key: value for key, value in config_dict.items() if key != "derived_fields"})
        if "derived_fields" in config_dict:
            # What was None there is derived here already.
            vars(self)["derived_fields"] = {**self._derived(), **config_dict["derived_fields"]}
            self._derive()

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Writes the config, if it can be read again.

        Raises:
            ValueError: if it could not; the file is not touched.
        """
        self._check_json()
        try:
            text = self.to_json_string(use_diff=use_diff)
            self.from_dict(self._decode_special_floats(json.loads(text)))
        except Exception as error:
            raise ValueError(f"this config is not saved, since it could not be loaded again: {error}") from error
        Path(json_file_path).write_text(text, "utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: for fields that contradict one another, or that no file could hold; nothing is written.
        """
        self.validate_architecture()
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def _check_json(self) -> None:
        """Refuses, by its name, what JSON cannot hold."""
        for key, value in self.to_dict().items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(f"this config is not saved, since `{key}={value!r}` cannot be: {error}") from error

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MiniLLMConfig":
        """Builds the config of a named architecture.

        Args:
            name: a key of `minillm.configuration.PRESETS`, e.g. `"llama-3-8b"`.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: if there is no such preset (the message names those that are spelt alike).
            ImportError: in the copy of this code beside a saved model, which has no presets.
        """
        if not PRESETS:
            raise ImportError("presets come with the plug-in: `pip install minillm-hf`, then `import minillm`")
        if name not in PRESETS:
            close = " or ".join(repr(each) for each in difflib.get_close_matches(str(name), PRESETS, 3))
            hint = f"did you mean {close}? " if close else ""
            raise ValueError(
                f"unknown preset {name!r}: {hint}`minillm presets` and `minillm.configuration.PRESETS` list them all"
            )
        return cls(**{**copy.deepcopy(PRESETS[name].fields), **overrides})

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, preset: str | None = None, **fields: Any
    ) -> "MiniLLMConfig":
        """Builds the config of a model that uses this tokenizer: `vocab_size`, `bos_token_id`, `eos_token_id` and
        `pad_token_id` are the tokenizer's.

        Args:
            tokenizer: a tokenizer of transformers.
            preset: name of a preset to start from; left out: the defaults. Ids of its blanks and start token are left
                out where the vocabulary does not have them all: they are another tokenizer's.
            fields: other fields, and those of the four that are to differ, e.g. a `vocab_size` rounded up.

        Raises:
            TypeError: if it is no tokenizer of transformers.
            ValueError: if `vocab_size` is given and has no room for all of the tokenizer's ids, if the id of a special
                token is given that the vocabulary does not have, or there is no such preset.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            found = repr(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else type(tokenizer).__name__
            raise TypeError(
                f"`tokenizer` must be a tokenizer of transformers, not {found}: load one by "
                "`AutoTokenizer.from_pretrained(...)`; one of the library tokenizers becomes one by "
                "`PreTrainedTokenizerFast(tokenizer_object=...)`"
            )
        needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
        vocab_size = fields.get("vocab_size", needed)
        if vocab_size < needed:
            raise ValueError(
                f"`vocab_size={vocab_size}` has no room for the {needed} ids of the tokenizer: leave it out, or give "
                f"at least {needed}"
            )
        for name, token_id in ids_outside(fields, vocab_size):
            raise ValueError(
                f"`{name}={token_id}` lies outside the vocabulary of `vocab_size={vocab_size}` ids: give the id of a "
                "token that the tokenizer has, or leave it out"
            )
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fields = {"vocab_size": needed, **ids, **fields}
        if preset is None:
            return cls(**fields)
        own = PRESETS[preset].fields if preset in PRESETS else {}
        foreign = {name: own[name] for name in TOKEN_FIELDS if name in own and name not in fields}
        if any(ids_outside(foreign, vocab_size)):
            fields |= dict.fromkeys(foreign)
        return cls.from_preset(preset, **fields)
