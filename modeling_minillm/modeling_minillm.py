"""The decoder: blocks around a residual stream, the language model and the task heads.

Every variant is a row of settings: norms, feed-forwards, residual wirings and position schemes come from the tables of
the files beside this one and are chosen when a layer is built; masks and biases are made once per forward in
`minillm.back_ends`.
"""

import os
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from minillm.attention import MiniLLMAttention
from minillm.back_ends import Call, attention_inputs
from minillm.cache import CACHE_NAME, one_cache, with_room
from minillm.capabilities import check, kind_of
from minillm.checks import (
    GivenTokens,
    check_attention_mask,
    check_cache,
    check_call,
    check_tokens,
    read_answer_spans,
    read_labels,
    read_text_labels,
)
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.default_targets import PEFT_TABLES, fill_peft_tables
from minillm.feed_forward import MLPS, MiniLLMRouter
from minillm.generation import MiniLLMGenerationMixin
from minillm.geometry import read_geometry
from minillm.head import MiniLLMHeadMixin, build_head, keep_positions, last_real_token
from minillm.import_hooks import after_import
from minillm.infilling import MiniLLMInfillingMixin
from minillm.initialization import initialize, mark_gains
from minillm.loss import causal_lm_loss, join_router_loss, refuse_router_logits, skips_logits
from minillm.normalization import NORMS, identity
from minillm.position_schemes import POSITION_EMBEDDINGS, POSITION_TABLES
from minillm.residual import residual_of
from minillm.rotary import MiniLLMRotaryEmbedding, follows_length
from minillm.tensor_parallel import local_heads
from minillm.token_facts import Tokens, document_lengths, read_tokens
from minillm.tuning import TuningOfModel

logger = logging.get_logger(__name__)

PAGED_KEYS = ("read_index", "write_index")

# Here and not where the package registers itself, so that it holds where only a model's folder has the code.
after_import.call(fill_peft_tables, PEFT_TABLES)


class MiniLLMDecoderLayer(GradientCheckpointingLayer):
    """One block; `minillm.residual` says how its parts are wired."""

    def __init__(self, config: MiniLLMConfig, layer_idx: int) -> None:
        super().__init__()
        residual = residual_of(config)
        self.wiring = residual.run
        self.alpha = config.deepnorm_alpha if config.norm_placement == "deepnorm" else 1.0
        self.self_attn = MiniLLMAttention(config, layer_idx)
        self.mlp = MLPS[config.mlp_type](config)
        norm, size, dropout = NORMS[config.norm_type], config.hidden_size, config.hidden_dropout
        for name in residual.norms:
            setattr(self, name, norm(config, size))
        self.dropout = nn.Dropout(dropout) if dropout else identity
        mark_gains(self, config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Maps the stream [batch, length, hidden] to the next; keyword arguments go to the attention."""
        return self.wiring(self, hidden_states, lambda stream: self.self_attn(stream, **kwargs)[0])


class MiniLLMPreTrainedModel(PreTrainedModel):
    """What all MiniLLM models share: initialisation and the choice of the attention back end."""

    config: MiniLLMConfig
    config_class = MiniLLMConfig
    base_model_prefix = "model"
    tuning = TuningOfModel()
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniLLMDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": MiniLLMDecoderLayer,
        "attentions": MiniLLMAttention,
        "router_logits": OutputRecorder(MiniLLMRouter, index=0),
    }

    def __init__(self, config: MiniLLMConfig, *inputs: Any, **kwargs: Any) -> None:
        # Fields may have been assigned since the config was made.
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)
        if os.path.isdir(self.name_or_path):
            # PEFT and transformers write it into adapters, which must find their base from any working folder.
            self.name_or_path = os.path.abspath(self.name_or_path)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The one gate of every way to choose a back end (argument, setter, config field)."""
        # First of all, lest the user install, or download, a kernel that is refused in the end. A name that nobody
        # knows is transformers' to refuse.
        if (
            kind_of(attn_implementation) != "other"
            or "/" in (attn_implementation or "")
            or attn_implementation in ALL_ATTENTION_FUNCTIONS
        ):
            check(self.config, attn_implementation)
        chosen = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        check(self.config, chosen)
        return chosen

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in this file; it stands in `minillm.feed_forward`.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The kernel for experts that fits: transformers' default takes rows of whole 16 bytes, and fails in the midst
        of a forward over others."""
        fields = vars(self.config)
        widths = fields["hidden_size"], fields["intermediate_size"]
        has_experts = fields["mlp_type"] == "moe"
        if has_experts and requested_experts == "grouped_mm" and any(width % 4 for width in widths):
            raise ValueError(
                f"experts_implementation='grouped_mm' with `hidden_size={widths[0]}` and `intermediate_size="
                f"{widths[1]}`: its rows must be a multiple of 16 bytes; use 'eager' or 'batched_mm'"
            )
        if has_experts and requested_experts is None and any(width % 8 for width in widths):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The base class would fill a rotary embedding of two axes with the frequencies of one.
        if not isinstance(module, MiniLLMRotaryEmbedding):
            super()._init_weights(module)
        initialize(module, self.config.initializer_range)


class MiniLLMModel(MiniLLMPreTrainedModel):
    """The decoder without a head: token ids to the last hidden state, after the final norm."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__(config)
        # Without `padding_idx`, which would keep a token that is also the end token from learning.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        for name in POSITION_TABLES.get(config.position_embedding_type, ()):
            setattr(self, name, nn.Embedding(vars(config)["position_table_size"], config.hidden_size))
        if config.embedding_norm:
            self.embed_layernorm = NORMS[config.norm_type](config, config.hidden_size)
        self.embed_dropout = nn.Dropout(config.embedding_dropout) if config.embedding_dropout else identity
        if config.position_embedding_type == "rope":
            self.rotary_emb = MiniLLMRotaryEmbedding(config)
        self.layers = nn.ModuleList(MiniLLMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm_type](config, config.hidden_size) if config.final_norm else nn.Identity()
        self.output_class = MoeModelOutputWithPast if config.mlp_type == "moe" else BaseModelOutputWithPast
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prefix_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        block_position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        """Runs the decoder over Q new tokens.

        Args:
            input_ids: [batch, Q] token ids, or `inputs_embeds` [batch, Q, hidden] in their place.
            attention_mask: [batch, cached + Q], 1 at real tokens and 0 at padding; or one's own 4D mask [batch or 1,
                heads or 1, Q, keys], boolean (True: visible) or additive.
            position_ids: [batch, Q] or [batch, cached + Q] on the first position axis. Left out, a token's position is
                the number of real tokens before it in its document.
            cache: a key/value cache, which is filled and returned; `past_key_values` is its older name.
            use_cache: make a `DynamicCache` if none was given.
            prefix_mask: [batch, Q], k on the k-th prompt of a document, each of which sees itself in both directions,
                and 0 elsewhere (`attention_type="prefix"`); `minillm.number_prompts` numbers them. Without it the
                forward is plain causal.
            document_ids: [batch, Q] integers, non-decreasing over real tokens: packed documents never see one another.
                Without it, and without `attention_mask` and `block_position_ids`, a document begins wherever
                `position_ids` restart at 0.
            block_position_ids: [batch, Q] positions on GLM's second axis (arXiv 2103.10360, section 2.3).
            kwargs: `output_hidden_states`, `output_attentions` and `output_router_logits` (`mlp_type="moe"`: logits
                [batch * Q, experts] per layer); the rest is for the attention's back end.

        Raises:
            ValueError: for inputs of a wrong dtype, shape or range (see `minillm.checks`), and for inputs that
                contradict the config or one another. In a traced graph, and on CUDA, a value is a RuntimeError.
        """
        # Read so, a field costs a step of decoding next to nothing.
        cache, fields = one_cache(cache, past_key_values), vars(self.config)
        given = GivenTokens(attention_mask, position_ids, prefix_mask, document_ids, block_position_ids)
        paged = any(key in kwargs for key in PAGED_KEYS)
        if not paged:
            check_cache(cache)
            check_attention_mask(attention_mask)
        check_call(self.config, kwargs, cache, paged)
        new = check_tokens(self.config, input_ids, inputs_embeds, given)
        inputs_embeds = self._look_up(new) if inputs_embeds is None else inputs_embeds
        if prefix_mask is None and fields["attention_type"] == "prefix" and not is_tracing(inputs_embeds):
            self._warn_without_prefix(inputs_embeds.shape[1], attention_mask, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        with_room(cache)
        # A paged cache brings its own mask and positions.
        known_cache = None if paged else cache
        geometry = read_geometry(self.config, inputs_embeds, known_cache)
        tokens = read_tokens(self.config, geometry, given)
        heads = local_heads(self.layers[0], fields["num_attention_heads"])
        call = Call(self.config, geometry, tokens, given, inputs_embeds, known_cache, heads)
        attention = attention_inputs(call, paged).keywords
        hidden_states = self._embed(inputs_embeds, tokens)
        position_embeddings = None
        if fields["position_embedding_type"] == "rope":
            lengths = document_lengths(geometry, tokens) if follows_length(self.config) else None
            position_embeddings = self.rotary_emb(
                hidden_states, tokens.position_ids, tokens.block_position_ids, lengths
            )
        # A cut config has part of the model decode, as a draft of its own (`assistant_early_exit`).
        for layer in islice(self.layers, fields["num_hidden_layers"]):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                position_ids=tokens.position_ids,
                **attention,
                **{"cache" if paged else CACHE_NAME: cache},
                **kwargs,
            )
        cache_keyword: dict[str, Any] = {CACHE_NAME: cache}
        return self.output_class(last_hidden_state=self.norm(hidden_states), **cache_keyword)

    def _look_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings [batch, Q, hidden] of token ids [batch, Q]."""
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            message = f"`input_ids` hold an id outside the vocabulary of {self.config.vocab_size} tokens"
            raise ValueError(message) from error

    def _embed(self, inputs_embeds: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """What enters the first block, [batch, Q, hidden]."""
        fields = vars(self.config)
        scale = fields["embedding_gradient_scale"]
        if scale != 1 and self.training:
            # This form, unlike e * a + e.detach() * (1 - a), leaves the values exactly as they are.
            inputs_embeds = inputs_embeds.detach() + (inputs_embeds - inputs_embeds.detach()) * scale
        add_positions = POSITION_EMBEDDINGS.get(fields["position_embedding_type"])
        if add_positions is not None:
            inputs_embeds = inputs_embeds + add_positions(self, tokens.position_ids, tokens.block_position_ids)
        if fields["embedding_norm"]:
            inputs_embeds = self.embed_layernorm(inputs_embeds)
        return self.embed_dropout(inputs_embeds)

    def _warn_without_prefix(self, tokens: int, attention_mask: torch.Tensor | None, cache: Cache | None) -> None:
        """Says once that a prefix model computes what a causal one would, where that is probably not meant."""
        if self.training:
            logger.warning_once(
                "This prefix model is training without `prefix_mask`, so as a plain causal model: use a collator that "
                "makes one, e.g. minillm.training.DataCollatorForPrefixLM, or set `prompt_is_prefix=False` in its "
                "config if it is meant to be causal."
            )
            return
        is_prompt = tokens > 1 and (cache is None or cache.get_seq_length() == 0)
        has_own_mask = attention_mask is not None and len(attention_mask.shape) == 4
        if self.config.prompt_is_prefix and is_prompt and not has_own_mask:
            logger.warning_once(
                "This prefix model reads a text without `prefix_mask`, so as a plain causal model, while `generate()` "
                "reads a prompt as its prefix: the two give different probabilities. Pass `prefix_mask` to score what "
                "follows a prompt, or set `prompt_is_prefix=False` in its config to have both causal."
            )


class MiniLLMForCausalLM(  # pyright: ignore[reportIncompatibleMethodOverride]: see `MiniLLMGenerationMixin`
    MiniLLMHeadMixin,
    MiniLLMPreTrainedModel,
    MiniLLMInfillingMixin,
    MiniLLMGenerationMixin,
    GenerationMixin,
):
    """The decoder with an output head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # transformers reads lists, whatever its annotation says.
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyright: ignore[reportAssignmentType]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__(config)
        self.model = MiniLLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_head(config)
        self.output_class = MoeCausalLMOutputWithPast if config.mlp_type == "moe" else CausalLMOutputWithPast
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prefix_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        block_position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_router_logits: bool | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """As `MiniLLMModel.forward`, and:

        Args:
            labels: [batch, Q] token ids, -100 where nothing is predicted. Position t - 1 predicts `labels[t]`: the
                model shifts, and never edits them.
            logits_to_keep: compute logits of the last so many positions only (0: all), of these positions [n] or
                [batch, n], or of the True positions of a boolean mask [batch, Q] (logits [n, vocab_size] then).
            output_router_logits: return router logits and the load-balancing loss `aux_loss` (`mlp_type="moe"`), and
                add `router_aux_loss_coef` times that to the loss; as the config says if left out.
            skip_logits: compute the loss without ever holding all logits, and return `logits=None`. Left out: in
                training, given labels, as `config.skip_logits` says; never in evaluation.
            kwargs: `num_items_in_batch` and `shift_labels` reach the loss.

        Returns:
            logits [batch, kept positions, vocab_size] and, given labels, the mean cross-entropy.

        Raises:
            ValueError: for `skip_logits=True` without labels, with `logits_to_keep`, or where the loss or the head is
                one that needs logits (see `minillm.loss.why_logits`).
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefix_mask=prefix_mask,
            document_ids=document_ids,
            block_position_ids=block_position_ids,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        skips = skips_logits(self, skip_logits, labels, logits_to_keep)
        if not skips:
            logits = self.lm_head(keep_positions(hidden_states, logits_to_keep))
        if labels is not None and self.loss_function is ForCausalLMLoss:
            expected = hidden_states.shape[:-1] if logits is None else logits.shape[:-1], self.config.vocab_size
            ignored = {"ignore_index": kwargs["ignore_index"]} if "ignore_index" in kwargs else {}
            labels = read_labels("labels", labels, *expected, **ignored)
            if kwargs.get("shift_labels") is not None:
                kwargs["shift_labels"] = read_labels("shift_labels", kwargs["shift_labels"], *expected, **ignored)
        if skips and labels is not None:
            loss = causal_lm_loss(hidden_states, self.lm_head, labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self.output_class(
            **join_router_loss(self.config, loss, outputs, attention_mask, self.model.gradient_checkpointing),
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniLLMForSequenceClassification(MiniLLMPreTrainedModel):
    """The decoder with a class per text, read at its last real token."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        self.model = MiniLLMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prefix_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        block_position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As `MiniLLMModel.forward`; `labels` are a class [batch], or values for regression or several labels. Which
        token is the last one says a 2D `attention_mask`; without it, the padding token."""
        refuse_router_logits(self.config, kwargs)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefix_mask=prefix_mask,
            document_ids=document_ids,
            block_position_ids=block_position_ids,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = last_real_token(hidden_states, input_ids, attention_mask, self.config.pad_token_id)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        logits = self.score(hidden_states[rows, last])
        loss = None
        if labels is not None:
            labels = read_text_labels(labels, logits.shape[0], self.num_labels, self.config.problem_type)
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniLLMForTokenClassification(GenericForTokenClassification, MiniLLMPreTrainedModel):
    """The decoder with a class per token."""

    def __init__(self, config: MiniLLMConfig) -> None:
        MiniLLMPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        self.model = MiniLLMModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(config.hidden_dropout if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prefix_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        block_position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `MiniLLMModel.forward`; `labels` [batch, Q] are classes, -100 where there is none."""
        refuse_router_logits(self.config, kwargs)
        if labels is not None:
            tokens = check_tokens(self.config, input_ids, inputs_embeds)
            labels = read_labels("labels", labels, tokens.shape[:2], self.num_labels)
        cache = one_cache(cache, past_key_values)
        inputs: tuple[Any, ...] = (input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, use_cache)
        extra = {"prefix_mask": prefix_mask, "document_ids": document_ids, "block_position_ids": block_position_ids}
        return super().forward(*inputs, **extra, **kwargs)


class MiniLLMForQuestionAnswering(GenericForQuestionAnswering, MiniLLMPreTrainedModel):
    """The decoder with a start and an end score per token."""

    def __init__(self, config: MiniLLMConfig) -> None:
        MiniLLMPreTrainedModel.__init__(self, config)
        self.model = MiniLLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        block_position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """As `MiniLLMModel.forward`; `start_positions` and `end_positions` [batch] are token indices, beyond the last
        token where there is no answer."""
        refuse_router_logits(self.config, kwargs)
        batch = check_tokens(self.config, input_ids, inputs_embeds).shape[0]
        extra = {"prefix_mask": prefix_mask, "document_ids": document_ids, "block_position_ids": block_position_ids}
        cache = one_cache(cache, past_key_values)
        answers = read_answer_spans(start_positions, end_positions, batch)
        inputs: tuple[Any, ...] = (input_ids, attention_mask, position_ids, cache, inputs_embeds, *answers)
        return super().forward(*inputs, **extra, **kwargs)


__all__ = [
    "MiniLLMForCausalLM",
    "MiniLLMForQuestionAnswering",
    "MiniLLMForSequenceClassification",
    "MiniLLMForTokenClassification",
    "MiniLLMModel",
    "MiniLLMPreTrainedModel",
]
