"""The loop of greedy decoding and of sampling, on tensors that are laid out once for the whole text.

transformers' own loop makes ids, mask and positions anew for each token and asks the device after each whether all
texts have ended. Here a step reads views of what is there already, and the device is asked less often where asking
costs; tokens, their order and the use of random numbers are the same.
"""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers.generation.stopping_criteria import MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from minillm.cache import CACHE_NAME, with_room
from minillm.infilling import continue_positions
from minillm.positions import POSITION_BIASES

logger = logging.get_logger(__name__)

STEPS_PER_READ = {"cpu": 1}
"""Steps between two questions whether all texts have ended, by device type; 16 where a question stalls the device."""

ASKED_EACH_STEP = (PrefixConstrainedLogitsProcessor, MaxTimeCriteria, StoppingCriteriaList)
"""What calls somebody's own function, or may, and what reads the clock."""

KNOWN = frozenset(
    ("attention_mask", "position_ids", "prefix_mask", "block_position_ids", "logits_to_keep", "use_cache", CACHE_NAME)
)
RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def why_stock_loop(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> str | None:
    """Why transformers' own loop has to decode, or None if the one of this file can."""
    recorded = [
        name for name in RECORDS if generation_config.return_dict_in_generate and getattr(generation_config, name)
    ]
    others = [name for name, value in model_kwargs.items() if value is not None and name not in KNOWN]
    inputs = type(model).prepare_inputs_for_generation
    own = all(name not in vars(model) for name in ("prepare_inputs_for_generation", "_sample"))
    reasons = {
        "processes wait for one another": synced_gpus,
        "it drafts for another model": generation_config.is_assistant,
        "there is no cache": not model_kwargs.get("use_cache") or model_kwargs.get(CACHE_NAME) is None,
        f"{', '.join(recorded)} is kept for each token": bool(recorded),
        f"the model is also given {', '.join(others)}": bool(others),
        "there is no longest length": stopping_criteria.max_length is None,
        "the prompt has no tokens": input_ids.shape[1] == 0 or model_kwargs.get("position_ids") is None,
        "`prepare_inputs_for_generation` was replaced": not own or inputs.__module__ != own_module(model),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def own_module(model: PreTrainedModel) -> str:
    """Where this model's hooks of `generate()` come from; a copy that travels with a checkpoint has its own."""
    return next(kind.__module__ for kind in type(model).__mro__ if kind.__name__ == "MiniLLMGenerationMixin")


class StepInputs:
    """What each step of a text of up to `limit` tokens gets, in whole, to be cut.

    Args:
        cache: the key/value cache; one of fixed size gets a mask over all its slots in each step.
        model_kwargs: as `generate()` prepared them for the prompt [batch, length].
        limit: tokens of the longest text.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, model_kwargs: dict[str, Any], limit: int) -> None:
        positions, mask = model_kwargs["position_ids"], model_kwargs.get("attention_mask")
        self.fixed_size = cache.is_compileable
        self.mask, self.second = None, None
        if mask is not None:
            length = max(limit - 1, cache.get_max_length()) if self.fixed_size else limit
            # What lies beyond the step's own slot is hidden by the order of the slots.
            self.mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
        self.shows_all = False
        second = model_kwargs.get("block_position_ids")
        if second is None:
            more = torch.arange(1, limit - positions.shape[1] + 1, device=positions.device)
            self.first = torch.cat((positions, positions[:, -1:] + more), dim=-1)
        else:
            # Where the bias asks for the distance to cached tokens, their positions go along.
            self.shows_all = model.config.position_embedding_type in POSITION_BIASES
            prompt = positions[:, : second.shape[1]].expand_as(second)
            self.first, self.second = continue_positions(prompt, second, limit)

    def at(self, length: int) -> dict[str, torch.Tensor]:
        """The inputs of the step that reads the last of `length` tokens."""
        last = slice(length - 1, length)
        inputs = {"position_ids": self.first[:, slice(0, length) if self.shows_all else last]}
        if self.mask is not None:
            inputs["attention_mask"] = self.mask if self.fixed_size else self.mask[:, :length]
        if self.second is not None:
            inputs["block_position_ids"] = self.second[:, last]
        if self.fixed_size:
            # A graph is compiled for the strides too, which in a view are those of the whole.
            inputs = {name: part.contiguous() if part.shape[0] > 1 else part.clone() for name, part in inputs.items()}
        return inputs


def leaves_no_trace(
    device: torch.device,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    cache: Any,
    streamer: BaseStreamer | None,
) -> bool:
    """Whether steps beyond the end of all texts would show nowhere: in no cache that goes on, in no stream, in no
    random numbers, not on the clock, and to no processor or criterion of somebody's own, which may count its calls or
    refuse a text that has ended."""
    called = [*logits_processor, *stopping_criteria]
    own = any(not type(each).__module__.startswith("transformers.") for each in called)
    own = own or any(isinstance(each, ASKED_EACH_STEP) for each in called)
    kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    repeats = device.type == "cpu" or hasattr(torch.get_device_module(device), "set_rng_state")
    return repeats and not (own or kept or streamer is not None)


def random_state(device: torch.device) -> torch.Tensor:
    """The state of a device's default generator."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


class Ends:
    """Which texts have ended. The device is asked only every few steps whether all have, and it may be found that they
    had some steps ago: those steps do not count.

    Args:
        ids: [batch, longest length].
        every: steps between two questions.
        draws: whether a step uses random numbers, which then go back to where they were.
    """

    def __init__(self, ids: torch.Tensor, every: int, draws: bool) -> None:
        self.every, self.device = every, ids.device
        self.unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        self.running = torch.ones(ids.shape[1] + 1, dtype=torch.bool, device=ids.device)
        self.draws = draws and every > 1
        self.random_states: dict[int, torch.Tensor] = {}

    def add(self, ended: torch.Tensor, length: int) -> None:
        """Notes which texts [batch] have ended when they are of a length."""
        if self.draws:
            self.random_states[length] = random_state(self.device)
        self.unfinished = self.unfinished & ~ended
        self.running[length] = self.unfinished.any()

    def known(self, length: int, steps: int) -> bool:
        """Whether it is known after so many steps that all texts have ended."""
        if steps % self.every:
            return False
        if not bool(self.running[length]):
            return True
        self.random_states.clear()
        return False

    def last(self, start: int, length: int) -> int:
        """The length of the longest text, where `length` was reached from `start`."""
        ended = (~self.running[start + 1 : length + 1]).nonzero()
        if not len(ended):
            return length
        length = start + 1 + int(ended[0])
        if length in self.random_states:
            set_random_state(self.device, self.random_states[length])
        return length


def choose(scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """The next token [batch] by scores [batch, vocabulary]: the best one, or one drawn from their softmax."""
    return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1) if do_sample else scores.argmax(-1)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """Greedy decoding or sampling, as `GenerationMixin._sample` does it.

    Args:
        input_ids: [batch, length] the prompt.
        logits_processor, stopping_criteria: called after each step with all tokens so far, [batch, length].
        streamer: gets each token.
        model_kwargs: as `generate()` prepared them.

    Returns:
        Token ids [batch, length with what was generated], or an output that holds them and the cache.
    """
    start, limit, cache = input_ids.shape[1], stopping_criteria.max_length, model_kwargs[CACHE_NAME]
    forward = model.__call__
    if model._valid_auto_compile_criteria(model_kwargs, generation_config):
        forward = model.get_compiled_call(generation_config.compile_config)
    pad = generation_config._pad_token_tensor
    has_end = pad is not None and any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    ids = torch.nn.functional.pad(input_ids, (0, limit - start))
    steps = StepInputs(model, cache, model_kwargs, limit)
    every = 1
    if leaves_no_trace(ids.device, logits_processor, stopping_criteria, generation_config, cache, streamer):
        every = STEPS_PER_READ.get(ids.device.type, 16)
    ends = Ends(ids, every, generation_config.do_sample or model.training)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    length = start
    with model._optimize_model_for_decode():
        while True:
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
            scores = logits_processor(ids[:, :length], logits)
            if every > 1 and generation_config.do_sample:
                # A text that has ended, unknown to the processors, may be left without a token to draw.
                scores = scores.where(ends.unfinished[:, None] > 0, 0.0)
            tokens = choose(scores, generation_config.do_sample)
            if has_end:
                tokens = tokens * ends.unfinished + pad.to(ids.device) * (1 - ends.unfinished)
            ids[:, length] = tokens
            length += 1
            ends.add(stopping_criteria(ids[:, :length], None), length)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if length == limit or ends.known(length, length - start):
                break
            outputs = forward(
                input_ids=tokens[:, None],
                **{CACHE_NAME: cache},
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
                **steps.at(length),
            )
    if streamer is not None:
        streamer.end()
    sequences = ids[:, : ends.last(start, length)].clone()
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache})


class MiniLLMDecodingMixin:
    """Decodes with the loop of this file where it can, and into a cache with room."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get(CACHE_NAME)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None:
            with_room(model_kwargs.get(CACHE_NAME))
        return result

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        reason = why_stock_loop(self, input_ids, stopping_criteria, generation_config, model_kwargs, synced_gpus)
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if reason is None:
            return sample(self, *arguments, streamer=streamer, **model_kwargs)
        logger.debug("transformers' own loop decodes, since %s", reason)
        return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
