"""How a prefix travels through `generate()`: small hooks around transformers' own generation."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from minillm.attention import CACHE_NAME
from minillm.capabilities import check

logger = logging.get_logger(__name__)


def number_blocks(prefix_mask: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Numbers the runs of ones of a prefix mask [batch, length], so that each turn's prompt is a block of its own.

    The run at the first real token of a row is 1, later ones are 2, 3, ...; padding (0 in `attention_mask`, of the
    same shape) neither ends a run nor belongs to one.
    """
    mask = (prefix_mask != 0).long()
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    real = torch.ones_like(mask, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    last_real = torch.where(real, index, -1).cummax(-1).values
    carried = torch.where(last_real < 0, 0, mask.gather(1, last_real.clamp(min=0)))
    rises = (carried.diff(dim=-1, prepend=torch.zeros_like(carried[:, :1])) > 0).long()
    starts_outside = 1 - mask.gather(1, real.long().argmax(-1, keepdim=True))
    return (rises.cumsum(-1) + starts_outside) * mask * real


class MiniLLMGenerationMixin:
    """Hooks of transformers' `GenerationMixin` for prefix attention and for masks in fixed-size caches."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Runs once per `generate()`, before beams, caches and candidates: puts the prompt's prefix in the kwargs."""
        self._refuse_unsliced(model_kwargs)
        embeds = model_kwargs.get("inputs_embeds")
        prompt = embeds if input_ids is None or (input_ids.shape[-1] == 0 and embeds is not None) else input_ids
        mask = model_kwargs.get("prefix_mask")
        if mask is not None:
            if self.config.attention_type != "prefix":
                raise ValueError(
                    f"`prefix_mask` was given, but `attention_type={self.config.attention_type!r}` has no prefix"
                )
            missing = prompt.shape[1] - mask.shape[-1]
            if mask.ndim != 2 or mask.shape[0] != prompt.shape[0] or missing < 0:
                raise ValueError(
                    f"`prefix_mask` has shape {list(mask.shape)}; generate() expects {list(prompt.shape[:2])}, "
                    "one entry per token of the whole prompt"
                )
            # An assistant model is called with the first prompt's mask and an ever longer prompt.
            mask = torch.nn.functional.pad(mask, (0, missing))
        elif self.config.attention_type == "prefix" and self.config.prompt_is_prefix:
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            cache = model_kwargs.get(CACHE_NAME)
            if isinstance(cache, Cache):
                mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= cache.get_seq_length())
        if mask is not None:
            padding = model_kwargs.get("attention_mask")
            padding = padding if padding is not None and padding.shape == mask.shape else None
            model_kwargs["prefix_mask"] = number_blocks(mask, padding)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _refuse_unsliced(self, model_kwargs: dict[str, Any]) -> None:
        """`generate()` continues every row as one text on the first position axis."""
        if model_kwargs.get("document_ids") is not None:
            raise ValueError("`document_ids` in generate(): each row continues one document; give one document a row")
        if model_kwargs.pop("block_position_ids", None) is not None and self._has_two_axes():
            raise ValueError(
                "`block_position_ids` in generate(): the text is continued on the first position axis, with 0 on the "
                "second; call the model itself to decode on both"
            )

    def _has_two_axes(self) -> bool:
        return self.config.position_embedding_type == "glm_2d" or self.config.rope_2d

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cuts the prefix to the tokens that go in, and leaves it out beyond the prompt. Python integers only, so that
        a compiled decoding step neither synchronises nor recompiles."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if prefix_mask is not None:
            going_in = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
            count, prompt_length = going_in.shape[1], prefix_mask.shape[-1]
            total = max(self._total_length(inputs, kwargs, count), prompt_length)
            if total - count < prompt_length:
                padded = torch.nn.functional.pad(prefix_mask, (0, total - prompt_length))
                inputs["prefix_mask"] = padded[:, -count:]
        # PEFT's prompt learning looks for the cache under its older name.
        inputs["past_key_values"] = inputs.pop(CACHE_NAME, None)
        return inputs

    @staticmethod
    def _total_length(inputs: dict[str, Any], kwargs: dict[str, Any], count: int) -> int:
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

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses, before a batch is made, the variants that a paged cache cannot serve."""
        check(self.config, "paged")
        return super().init_continuous_batching(*args, **kwargs)

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Refuses, before any work is done, what would come out wrong."""
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        check(self.config, self.config._attn_implementation, self.device.type, "generate")
        if self.config.attention_type == "bidirectional":
            raise ValueError(
                "generate() with `attention_type='bidirectional'`: an encoder has no left-to-right order to continue; "
                "use a model with `attention_type='causal'` or 'prefix'"
            )
        if self.config.attention_type == "prefix" and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"`prefill_chunk_size={generation_config.prefill_chunk_size}` with `attention_type='prefix'`: a chunk "
                "cannot see the later tokens of its prefix; leave it out"
            )
