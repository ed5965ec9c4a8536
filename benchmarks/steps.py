"""What is timed: a training step, decoding with a cache, and one attention layer by itself."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.models import DTYPES, Contender, Shape, build, extra_inputs
from benchmarks.timing import Stopwatch

LARGEST_CACHE = 2**29
"""Bytes that no processor's or device's cache holds."""

MANY_LOGITS = 2**26
"""From so many logits on, MiniLLM is asked for its loss without them, as `minillm train` always asks."""

ATTENTION_NAMES = ("self_attn", "self_attention", "attn")


def adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    """In its fused form, so that no contender's time is mostly the optimiser's."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def batches_of(name: str, ids: Iterator[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """What the model of a name trains with: ids [batch, length], which are also the labels, and what it needs beside
    them."""
    return ({"input_ids": batch, "labels": batch, **extra_inputs(name, batch)} for batch in ids)


def training_step(
    model: PreTrainedModel, batches: Iterator[dict[str, Any]], optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """Forward, backward and an update; MiniLLM holds no logits where they would be many.

    Args:
        optimizer: a new AdamW if left out.
    """
    optimizer = adamw(model) if optimizer is None else optimizer

    def run() -> None:
        model.train()
        batch = next(batches)
        many = batch["labels"].numel() * model.config.vocab_size >= MANY_LOGITS
        skip = {"skip_logits": True} if many and model.config.model_type == "minillm" else {}
        model(**batch, **skip, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def start_after_prompt(model: PreTrainedModel, stopwatch: Stopwatch) -> None:
    """Has `generate()` start a stopwatch anew when the logits of the prompt are there.

    A logits processor could do so too, but one that is not transformers' own is called after each single step, and
    MiniLLM may not run ahead of it.
    """
    prefill = model._prefill

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = prefill(*args, **kwargs)
        stopwatch.start()
        return outputs

    model._prefill = run


def decoding(
    model: PreTrainedModel, prompts: Iterator[torch.Tensor], new: int, cache: str | None, stopwatch: Stopwatch
) -> Callable[[], None]:
    """Greedy `generate()` of `new` tokens. All but the first are timed; with a single one, that and the prompt.

    Args:
        cache: transformers' `cache_implementation`; on CUDA a static one has the step compiled.
    """
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if cache is not None:
        options["cache_implementation"] = cache
    if new > 1:
        start_after_prompt(model, stopwatch)

    def run() -> None:
        model.eval()
        prompt = next(prompts)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    return run


def copying(contender: Contender, shape: Shape, device: str, times: int) -> Callable[[], None]:
    """Copies that read and write together as many bytes as the weights which a contender reads for a token have.

    They go through memory of `LARGEST_CACHE` bytes or more in turn, so that none finds its bytes in a cache.
    """
    model = build(contender, shape, "meta", DTYPES[device])
    unread = 0 if shape.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    count = (sum(weight.numel() for weight in model.parameters()) - unread) // 2
    pairs = -(-LARGEST_CACHE // (2 * count * DTYPES[device].itemsize))
    memory = torch.ones(pairs, 2, count, dtype=DTYPES[device], device=device)
    turns = cycle([pair.unbind() for pair in memory])

    def run() -> None:
        for _ in range(times):
            source, target = next(turns)
            target.copy_(source)

    return run


def attention_layer(
    contender: Contender, shape: Shape, ids: Iterator[torch.Tensor], device: str, buffers: int = 4
) -> Callable[[], None]:
    """Forward and backward of one attention layer, projections included, with the inputs that its model gives it.

    The hidden states rotate through `buffers` tensors; masks, biases and cosines are made once, beforehand.
    """
    model = build(contender._replace(compiled=False), shape._replace(num_hidden_layers=1), device)
    model.train().requires_grad_(False)
    layer = next(layer for name, layer in model.named_modules() if name.rpartition(".")[2] in ATTENTION_NAMES)
    seen: dict[str, Any] = {}
    batch = next(ids)
    hook = layer.register_forward_pre_hook(
        lambda module, positional, named: seen.update(positional=positional, named=named), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(input_ids=batch, use_cache=False, **extra_inputs(contender.model, batch))
    positional, named = seen["positional"], dict(seen["named"])
    example = named.pop("hidden_states") if "hidden_states" in named else positional[0]
    states = cycle([torch.randn_like(example).requires_grad_() for _ in range(buffers)])
    gradient = torch.randn_like(example)

    def run() -> None:
        hidden = next(states)
        hidden.grad = None
        layer(hidden, *positional[1:], **named)[0].backward(gradient)

    return run
