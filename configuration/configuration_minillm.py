"""`MiniLLMConfig`: every architectural choice as one typed, validated field."""

import copy
import difflib
import math
from types import SimpleNamespace
from typing import Any, Literal

import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import parse
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from minillm.configuration.feed_forward_fields import (
    FEED_FORWARD_OWNERS,
    MLP_PLANS,
    MOE_DEFAULTS,
    derive_feed_forward,
    feed_forward_conflicts,
)
from minillm.configuration.presets import PRESETS
from minillm.configuration.rope_fields import OLD_SPELLINGS, check_rope, take_old_spellings
from minillm.configuration.spellings import FOREIGN_SPELLINGS, KNOWN_EXTRA_KEYS
from minillm.version import __version__

logger = logging.get_logger(__name__)

SCHEMA_VERSION = 1
"""Number of the meaning of the fields below; a config that carries a newer one is refused."""

OLDEST_TRANSFORMERS = "5.17"

if parse(transformers.__version__) < parse(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"MiniLLM needs transformers >= {OLDEST_TRANSFORMERS}, found {transformers.__version__}: "
        f"pip install -U 'transformers>={OLDEST_TRANSFORMERS},<6'"
    )

FIELD_OWNERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "prompt_is_prefix": ("attention_type", ("prefix",)),
    "answer_start_token_id": ("attention_type", ("prefix",)),
    "turn_token_ids": ("attention_type", ("prefix",)),
    "mask_token_id": ("attention_type", ("prefix",)),
    "gmask_token_id": ("attention_type", ("prefix",)),
    "smask_token_id": ("attention_type", ("prefix",)),
    "sop_token_id": ("attention_type", ("prefix",)),
    "rope_interleaved": ("position_embedding_type", ("rope",)),
    "rope_2d": ("position_embedding_type", ("rope",)),
    "position_table_size": ("position_embedding_type", ("learned", "glm_2d")),
    "alibi_scale": ("position_embedding_type", ("alibi",)),
    "alibi_bias_max": ("position_embedding_type", ("alibi",)),
    "alibi_rounding": ("position_embedding_type", ("alibi",)),
    "sandwich_dim": ("position_embedding_type", ("sandwich",)),
    "deepnorm_alpha": ("norm_placement", ("deepnorm",)),
    "deepnorm_beta": ("norm_placement", ("deepnorm",)),
    "num_parallel_norms": ("parallel_residual", (True,)),
    **FEED_FORWARD_OWNERS,
}
"""Fields that say something only under certain values of another field: set anywhere else they are refused."""

POSITIVE_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "max_position_embeddings sliding_window position_table_size sandwich_dim norm_eps deepnorm_alpha "
    "deepnorm_beta alibi_scale alibi_bias_max initializer_range"
).split()
UNIT_INTERVAL_FIELDS = (
    "attention_dropout hidden_dropout embedding_dropout embedding_gradient_scale router_jitter_noise".split()
)
TOKEN_FIELDS = (
    "bos_token_id eos_token_id mask_token_id gmask_token_id smask_token_id sop_token_id answer_start_token_id "
    "turn_token_ids"
).split()
NO_DECODER_FIELDS = (
    "is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads "
    "chunk_size_feed_forward"
).split()
"""transformers' own fields for models of other kinds, which no part of this one reads."""


def tensor_parallel_plan(mlp_type: str, qk_norm: bool) -> dict[str, str]:
    """How each projection is cut over ranks, by module name."""
    plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v")}
    plan |= {"layers.*.self_attn.o_proj": "rowwise"}
    plan |= {f"layers.*.mlp.{name}": style for name, style in MLP_PLANS[mlp_type].items()}
    if qk_norm:
        # One weight for all heads: a rank's gradient comes from its own heads only.
        plan |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
    return plan


OWN_PLANS = [tensor_parallel_plan(mlp_type, qk_norm) for mlp_type in MLP_PLANS for qk_norm in (True, False)]


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
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
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
    norm_bias: bool | None = None
    norm_placement: Literal["pre", "post", "deepnorm", "sandwich"] = "pre"
    final_norm: bool | None = None
    deepnorm_alpha: float | int | None = None
    deepnorm_beta: float | int | None = None
    parallel_residual: bool = False
    num_parallel_norms: Literal[1, 2] = 1

    # feed-forward
    mlp_type: Literal["glu", "mlp", "moe"] = "glu"
    hidden_act: str = "silu"
    mlp_bias: bool = False
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    router_aux_loss_coef: float | int | None = None
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
    use_cache: bool | None = None
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
        self.minillm_version = __version__
        self.schema_version = SCHEMA_VERSION
        self._check_extra_keys(kwargs)
        self._derive()
        # On the instance, since transformers 5.17 adds to it for tied embeddings.
        self.base_model_tp_plan = tensor_parallel_plan(self.mlp_type, self.qk_norm)
        self.rope_parameters = take_old_spellings(self.position_embedding_type, self.rope_parameters, kwargs)
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            self.rope_parameters = None
        self.validate_architecture()

    def _check_extra_keys(self, kwargs: dict[str, Any]) -> None:
        """Refuses keywords that are probably meant to be a field, and warns once of the others."""
        fields = [name for name in self.__dataclass_fields__ if not name.startswith("_")]
        unknown = [key for key in kwargs if key not in KNOWN_EXTRA_KEYS and not key.startswith("_")]
        for key in unknown:
            near = difflib.get_close_matches(key, [*fields, *OLD_SPELLINGS], 1, 0.8)
            meant = FOREIGN_SPELLINGS.get(key) or next(iter(near), None)
            if meant is not None:
                raise ValueError(f"`{key}={kwargs[key]!r}` is not a field of MiniLLMConfig; did you mean `{meant}`?")
        if unknown:
            logger.warning_once(
                f"MiniLLMConfig keeps the unknown keys {sorted(unknown)} as they are: no part of the model reads them."
            )

    def _derive(self) -> None:
        """Fills the fields that follow from others where they were left out."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`hidden_size={self.hidden_size}` is not a multiple of "
                    f"`num_attention_heads={self.num_attention_heads}`: change one of them or set `head_dim`"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        derive_feed_forward(self)
        if self.position_table_size is None and self.position_embedding_type in ("learned", "glm_2d"):
            self.position_table_size = self.max_position_embeddings + (self.position_embedding_type == "glm_2d")
        if self.norm_bias is None:
            self.norm_bias = self.norm_type == "layernorm"
        if self.final_norm is None:
            self.final_norm = self.norm_placement in ("pre", "sandwich")
        if self.norm_placement == "deepnorm" and self.num_hidden_layers > 0:
            if self.deepnorm_alpha is None:
                self.deepnorm_alpha = (2 * self.num_hidden_layers) ** 0.25
            if self.deepnorm_beta is None:
                self.deepnorm_beta = (8 * self.num_hidden_layers) ** -0.25
        if self.use_cache is None:
            self.use_cache = self.attention_type != "bidirectional"
        if self.base_model_tp_plan in OWN_PLANS:
            # Not one of the user's own.
            self.base_model_tp_plan = tensor_parallel_plan(self.mlp_type, self.qk_norm)

    def validate_architecture(self) -> None:
        """Checks the fields against one another; runs when the config is made and again when a model is built, since
        fields may have been assigned in between: those that follow from others are filled in if they are None."""
        if self.is_heterogeneous:
            raise ValueError("`per_layer_config` is set, but all layers of a MiniLLM are alike: leave it out")
        self._derive()
        self._check_ranges()
        # Not read by name from the config itself, which takes transformers three function calls for each.
        fields, defaults = vars(self), type(self).__dataclass_fields__
        for name, (owner, values) in FIELD_OWNERS.items():
            nothing = (defaults[name].default, *((0,) if name in MOE_DEFAULTS else ()))
            if fields[name] not in nothing and fields[owner] not in values:
                raise ValueError(
                    f"`{name}={fields[name]!r}` has no meaning with `{owner}={fields[owner]!r}`: "
                    f"leave `{name}` out or set `{owner}` to {' or '.join(repr(value) for value in values)}"
                )
        for wrong, message in self._conflicts():
            if wrong:
                raise ValueError(message)
        if self.position_embedding_type == "rope":
            check_rope(self)

    def _check_ranges(self) -> None:
        fields = vars(self)
        for name in POSITIVE_FIELDS:
            value = fields[name]
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}={value}` must be positive and finite")
        for name in UNIT_INTERVAL_FIELDS:
            if not 0 <= fields[name] <= 1:
                raise ValueError(f"`{name}={fields[name]}` must lie between 0 and 1")
        for name in TOKEN_FIELDS:
            ids = fields[name]
            for token_id in ids if isinstance(ids, list) else [ids]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    logger.warning_once(
                        f"`{name}={token_id}` lies outside the vocabulary of `vocab_size={self.vocab_size}` ids."
                    )

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Pairs of (is it so, what is wrong and the way out)."""
        fields = SimpleNamespace(**vars(self))
        blanks = [fields.mask_token_id, fields.gmask_token_id, fields.smask_token_id]
        return [
            (
                fields.position_embedding_type != "rope" and bool(fields.rope_parameters),
                f"`rope_parameters={fields.rope_parameters}` is set, but `position_embedding_type="
                f"{fields.position_embedding_type!r}` has no rotary embedding: leave it out or set "
                "`position_embedding_type='rope'`",
            ),
            (
                fields.num_attention_heads % fields.num_key_value_heads != 0,
                f"`num_attention_heads={fields.num_attention_heads}` is not a multiple of "
                f"`num_key_value_heads={fields.num_key_value_heads}`: each key head serves equally many query heads",
            ),
            (
                fields.norm_type == "rmsnorm" and bool(fields.norm_bias),
                "`norm_bias=True` and `norm_type='rmsnorm'`: RMSNorm has no bias; set `norm_type='layernorm'` or "
                "leave `norm_bias` out",
            ),
            (
                fields.norm_head and fields.tie_word_embeddings,
                "`norm_head=True` and `tie_word_embeddings=True`: a head that is normalised cannot share the "
                "embedding; untie one of them",
            ),
            (
                fields.parallel_residual and fields.norm_placement != "pre",
                f"`parallel_residual=True` and `norm_placement={fields.norm_placement!r}`: parallel blocks are "
                "pre-norm; set `norm_placement='pre'` or `parallel_residual=False`",
            ),
            (
                bool(fields.use_cache) and fields.attention_type == "bidirectional",
                "`use_cache=True` and `attention_type='bidirectional'`: cached tokens would have to see later ones; "
                "leave `use_cache` out",
            ),
            (
                fields.alibi_rounding != "none" and fields.attention_type != "causal",
                f"`alibi_rounding={fields.alibi_rounding!r}` and `attention_type={fields.attention_type!r}`: this "
                "rounding is defined by key position alone, which only a causal mask allows; "
                "set `alibi_rounding='none'`",
            ),
            (
                (fields.sliding_window or 0) >= 2**63,
                f"`sliding_window={fields.sliding_window}` is no 64-bit number: leave it out for no window",
            ),
            (
                fields.sliding_window == 1,
                "`sliding_window=1`: a token would see itself alone; set it to 2 or more, or leave it out",
            ),
            (
                (fields.answer_start_token_id is None) != (not fields.turn_token_ids),
                f"`answer_start_token_id={fields.answer_start_token_id}` and `turn_token_ids={fields.turn_token_ids}`"
                ": give both (the token that starts an answer, and those that start a turn of any role), or neither",
            ),
            *(
                (
                    bool(getattr(fields, name, None)),
                    f"`{name}={getattr(fields, name, None)!r}` has no meaning in a decoder-only model: leave it out",
                )
                for name in NO_DECODER_FIELDS
            ),
            (
                fields.scale_residual_init and fields.norm_placement == "deepnorm",
                "`scale_residual_init=True` and `norm_placement='deepnorm'`: DeepNorm initialises these weights "
                "itself; leave `scale_residual_init` out or set `deepnorm_beta`",
            ),
            (
                fields.pad_token_id is not None and not 0 <= fields.pad_token_id < fields.vocab_size,
                f"`pad_token_id={fields.pad_token_id}` lies outside the vocabulary (`vocab_size={fields.vocab_size}`)",
            ),
            (
                (fields.sop_token_id is None) != (blanks == [None] * 3),
                f"`sop_token_id={fields.sop_token_id}` and {blanks} for `mask_token_id`, `gmask_token_id`, "
                "`smask_token_id`: give a blank and the token that starts what fills it together, or neither",
            ),
            (
                fields.sandwich_dim % 2 != 0,
                f"`sandwich_dim={fields.sandwich_dim}` must be even: sines and cosines come in pairs",
            ),
            *feed_forward_conflicts(fields),
        ]

    def _validate_ntk_rope_parameters(self, rope_parameters: dict, ignore_keys: set[str] | None = None) -> None:
        self._check_received_keys(
            "ntk", set(rope_parameters), {"rope_type", "factor"}, {"rope_theta"}, ignore_keys=ignore_keys
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MiniLLMConfig":
        """Builds the config of a named architecture.

        Args:
            name: a key of `minillm.configuration.PRESETS`, e.g. `"llama-3-8b"`.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: if there is no such preset (the message lists them all).
        """
        if name not in PRESETS:
            close = difflib.get_close_matches(str(name), PRESETS, 1)
            hint = f" did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown preset {name!r};{hint} available: {', '.join(sorted(PRESETS))}")
        return cls(**{**copy.deepcopy(PRESETS[name].fields), **overrides})
