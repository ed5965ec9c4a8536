"""How a prefix travels through `generate()`: small hooks around transformers' own generation."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from minillm.cache import CACHE_NAME
from minillm.capabilities import check, refusal
from minillm.checks import check_prompts, require, require_integers
from minillm.configuration.configuration_minillm import MiniLLMConfig
from minillm.infilling import continue_positions, glm_inputs, has_two_axes
from minillm.position_schemes import POSITION_BIASES
from minillm.prompts import find_prompts, number_prompts

logger = logging.get_logger(__name__)

ASSISTANT_PREFIX = "assistant_prefix_mask"
"""The keyword under which an assistant model is handed the prefix of the first prompt."""


class MiniLLMGenerationMixin(PreTrainedModel, GenerationMixin):
    """Hooks of transformers' `GenerationMixin` for prefix attention and for masks in fixed-size caches.

    Methods of `GenerationMixin` are typed for transformers' own models only, so that a type checker finds some of them
    in no other class.
    """

    config: MiniLLMConfig

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Runs where the caller gave no positions: those of GLM, with its prefix, if the prompt holds a blank and a
        start token, and the config names both."""
        config = self.config
        blanks = [
            name for name in (config.gmask_token_id, config.smask_token_id, config.mask_token_id) if name is not None
        ]
        taken = any(model_kwargs.get(name) is not None for name in ("prefix_mask", "block_position_ids", CACHE_NAME))
        wanted = config.attention_type == "prefix" and config.prompt_is_prefix and not taken
        if not wanted or not blanks or config.sop_token_id is None or inputs_tensor.is_floating_point():
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        if not bool((inputs_tensor == config.sop_token_id).any()):
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        # With one axis the text after [gMASK] simply goes on (GLM-130B); with two it has the second to itself.
        counting = () if has_two_axes(config) else (config.gmask_token_id,)
        padding = model_kwargs.get("attention_mask")
        inputs = glm_inputs(inputs_tensor, blanks, config.sop_token_id, padding, counting)
        model_kwargs |= {"prefix_mask": inputs.prefix_mask, "block_position_ids": inputs.block_position_ids}
        return inputs.position_ids

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Runs once per `generate()`, before beams, caches and candidates: puts the prompt's prefix in the kwargs."""
        embeds = model_kwargs.get("inputs_embeds")
        prompt: Any = embeds if input_ids is None or (input_ids.shape[-1] == 0 and embeds is not None) else input_ids
        self._check_per_token(prompt, model_kwargs)
        mask = model_kwargs.get("prefix_mask")
        first_prompt = model_kwargs.pop(ASSISTANT_PREFIX, None)
        if first_prompt is not None:
            mask = torch.nn.functional.pad(first_prompt, (0, prompt.shape[1] - first_prompt.shape[1]))
        elif mask is None and self.config.attention_type == "prefix" and self.config.prompt_is_prefix:
            mask = self._default_prefix(prompt, model_kwargs.get("attention_mask"))
            cache = model_kwargs.get(CACHE_NAME)
            if isinstance(cache, Cache):
                mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= cache.get_seq_length())
        if mask is not None:
            padding = model_kwargs.get("attention_mask")
            padding = padding if padding is not None and padding.shape == mask.shape else None
            model_kwargs["prefix_mask"] = self._numbered(mask, padding)
        return super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _default_prefix(self, prompt: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """What is read as prompts [batch, length]: all of `prompt` (ids [batch, length] or embeddings), less the
        answers that a chat's tokens tell of."""
        config = self.config
        if config.answer_start_token_id is None or prompt.is_floating_point():
            return torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        # The fields may have been assigned one after the other.
        config.validate_architecture()
        ends = {
            token
            for found in (config.eos_token_id, self.generation_config.eos_token_id)
            for token in (found if isinstance(found, list) else [found])
            if token is not None
        }
        padding = attention_mask if attention_mask is not None and attention_mask.shape == prompt.shape else None
        return find_prompts(prompt, config.answer_start_token_id, config.turn_token_ids or (), sorted(ends), padding)

    @staticmethod
    def _numbered(mask: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """A prefix mask [batch, length] with a number for each prompt: those it has, or one for each run of ones."""
        if mask.dtype == torch.bool or int(mask.max()) <= 1:
            return number_prompts(mask, padding)
        check_prompts(mask, None if padding is None else padding != 0, None)
        return mask.long()

    def _check_per_token(self, prompt: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Checks the per-token inputs of a whole prompt [batch, length, ...]."""
        if model_kwargs.get("document_ids") is not None:
            raise ValueError("`document_ids` in generate(): each row continues one document; give one document a row")
        if model_kwargs.get("prefix_mask") is not None and self.config.attention_type != "prefix":
            raise ValueError(
                f"`prefix_mask` was given, but `attention_type={self.config.attention_type!r}` has no prefix"
            )
        for name in ("prefix_mask", "block_position_ids"):
            values = model_kwargs.get(name)
            if values is None:
                continue
            if values.shape != prompt.shape[:2]:
                raise ValueError(
                    f"`{name}` has shape {list(values.shape)}; generate() expects {list(prompt.shape[:2])}, "
                    "one entry per token of the whole prompt"
                )
            require_integers(name, values, allow_bool=name == "prefix_mask")
            require(values >= 0, f"`{name}` holds a negative value")

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """An assistant gets the first prompt's prefix if it has one itself: it is called with ever longer prompts."""
        assistant = self if kwargs.get("assistant_model") is None else kwargs["assistant_model"]
        own = dict(model_kwargs)
        mask = own.pop("prefix_mask", None)
        if own.pop("block_position_ids", None) is not None and kwargs.get("assistant_model") is not None:
            raise ValueError(
                "`block_position_ids` in generate() with an assistant model, which counts on the first position axis "
                "only: leave the assistant out"
            )
        same_tokens = kwargs.get("assistant_tokenizer") is None
        if mask is not None and same_tokens and getattr(assistant.config, "attention_type", None) == "prefix":
            own[ASSISTANT_PREFIX] = mask
        return super()._get_candidate_generator(  # pyright: ignore[reportAttributeAccessIssue]
            *args, model_kwargs=own, **kwargs
        )

    # transformers hands down all but the ids by keyword.
    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        block_position_ids: torch.Tensor | None = None,
        assistant_prefix_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cuts the prefix to the tokens that go in, and leaves it out beyond the prompt. Python integers only, so that
        a compiled decoding step neither synchronises nor recompiles."""
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        going_in = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        count = going_in.shape[1]
        total = self._total_length(kwargs, count)
        if prefix_mask is not None:
            prompt_length = prefix_mask.shape[-1]
            total = max(total, prompt_length)
            if total - count < prompt_length:
                padded = torch.nn.functional.pad(prefix_mask, (0, total - prompt_length))
                inputs["prefix_mask"] = padded[:, -count:]
        if block_position_ids is not None:
            prompt = kwargs["position_ids"][:, : block_position_ids.shape[1]].expand_as(block_position_ids)
            first, second = continue_positions(prompt, block_position_ids, total, kwargs.get("attention_mask"))
            # Where the bias asks for the distance to cached tokens, their positions go along.
            shown = total if self.config.position_embedding_type in POSITION_BIASES else count
            inputs |= {"position_ids": first[:, -shown:], "block_position_ids": second[:, -count:]}
        if self._learns_prompts():
            # PEFT looks for the cache under its older name.
            inputs["past_key_values"] = inputs.pop(CACHE_NAME, None)
        return inputs

    def _learns_prompts(self) -> bool:
        """Whether PEFT's prompt learning generates, which puts a method of its own in the place of that above."""
        adapted = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        return getattr(getattr(adapted, "active_peft_config", None), "is_prompt_learning", False)

    @staticmethod
    def _total_length(kwargs: dict[str, Any], count: int) -> int:
        """Cached and new tokens: generate() keeps `position_ids` of all of them."""
        positions = kwargs.get("position_ids")
        return count if positions is None else positions.shape[-1]

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """For fixed-size caches: the 2D mask at the cache's full length, from which forward builds mask and bias
        inside the graph, by the same code as for every other cache."""
        if attention_mask is None or attention_mask.ndim != 2:
            return attention_mask
        missing = kwargs[CACHE_NAME].get_max_length() - attention_mask.shape[1]
        return torch.nn.functional.pad(attention_mask, (0, max(0, missing)))

    @property
    def init_continuous_batching(  # pyright: ignore[reportIncompatibleMethodOverride]: a property can be absent
        self,
    ) -> Callable[..., Any]:
        """transformers' own, absent where a paged cache cannot serve the variant: `transformers serve` looks for it,
        and answers request by request without it."""
        reason = refusal(self.config, "paged")
        if reason is not None:
            logger.warning_once(f"continuous batching is off for this model: {reason}")
            raise AttributeError(reason)
        return super().init_continuous_batching

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses, before a batch is made, the variants that a paged cache cannot serve."""
        check(self.config, "paged")
        return super().generate_batch(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses as `generate_batch` does."""
        check(self.config, "paged")
        return super().continuous_batching_context_manager(*args, **kwargs)

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Refuses, before any work is done, what would come out wrong."""
        super()._validate_generation_mode(  # pyright: ignore[reportAttributeAccessIssue]
            generation_mode, generation_config, generation_mode_kwargs
        )
        check(self.config, self.config._attn_implementation, self.device.type, "generate")
        if self.config.attention_type == "bidirectional":
            raise ValueError(
                "generate() with `attention_type='bidirectional'`: an encoder has no left-to-right order to continue; "
                "use a model with `attention_type='causal'` or 'prefix'"
            )
        guided = generation_config.guidance_scale not in (None, 1) and self.config.prompt_is_prefix
        if self.config.attention_type == "prefix" and guided:
            raise ValueError(
                f"`guidance_scale={generation_config.guidance_scale}` with `attention_type='prefix'`: the negative "
                "prompt would be read without its prefix; leave it out, or set `prompt_is_prefix=False` in the config"
            )
        if self.config.attention_type == "prefix" and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"`prefill_chunk_size={generation_config.prefill_chunk_size}` with `attention_type='prefix'`: a chunk "
                "cannot see the later tokens of its prefix; leave it out"
            )
