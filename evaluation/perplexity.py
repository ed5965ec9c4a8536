"""Perplexity over exactly the tokens that the labels score."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from minillm.data.documents import NothingToScoreError
from minillm.training.put_back import evaluating

IGNORE_INDEX = -100

Collator = Callable[[Sequence[Any]], dict[str, torch.Tensor]]


class PerplexityResult(NamedTuple):
    """The exponential of the mean negative log likelihood.

    Attributes:
        perplexity: exp(nll); inf beyond the range of a float.
        nll: mean negative log likelihood of a scored token, in nats.
        num_tokens: number of scored tokens.
    """

    perplexity: float
    nll: float
    num_tokens: int

    @classmethod
    def from_sum(cls, total_nll: float, num_tokens: int) -> "PerplexityResult":
        """From the summed negative log likelihood. ValueError without tokens."""
        if num_tokens == 0:
            raise ValueError("there is no token to score: every label is -100")
        nll = total_nll / num_tokens
        return cls(math.exp(nll) if nll < 709.0 else math.inf, nll, num_tokens)


def batches(dataset: Sequence[Any], collator: Collator, batch_size: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a data set, in order, without those in which a collator finds nothing to score.

    Raises:
        ValueError: `batch_size` below 1 or an empty data set.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1")
    if len(dataset) == 0:
        raise ValueError("the data set to evaluate is empty")
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        try:
            batch = collator(samples)
        except NothingToScoreError:
            continue
        yield batch


def perplexity(
    model: PreTrainedModel, dataset: Sequence[Any], collator: Collator, batch_size: int = 8
) -> PerplexityResult:
    """The perplexity of a causal or prefix language model.

    Every token whose label is not -100 is scored once, and all count the same, whatever the batches are (the mean of
    `Trainer.evaluate()` gives each batch the same weight). In a prefix model a token of the prefix sees its successor,
    so only tokens after the prefix may be scored: the collators of `minillm.training` label so.

    Args:
        model: any model whose forward takes the collator's tensors and returns logits [batch, tokens, vocabulary]. It
            is put into evaluation mode, and each of its modules back into the mode that it was in.
        dataset: samples as the collator takes them.
        collator: makes tensors with `labels` [batch, tokens]; position t-1 predicts labels[t].
        batch_size: samples per call of the collator.

    Raises:
        ValueError: nothing to score, no labels, or a prefix model and a collator that marks no prefix.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches(dataset, collator, batch_size):
            losses = token_nll(model, batch)
            total += losses.sum(dtype=torch.float64).item()
            count += losses.numel()
    return PerplexityResult.from_sum(total, count)


def token_nll(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log likelihood (float32, nats) of each scored token of a batch, flat, in the order of the tokens."""
    if "labels" not in batch:
        raise ValueError(f"the collator made no `labels`, only {sorted(batch)}")
    wants_prefix = getattr(model.config, "attention_type", None) == "prefix" and model.config.prompt_is_prefix
    if wants_prefix and "prefix_mask" not in batch:
        raise ValueError(
            'the model has attention_type="prefix" but the collator marks no prefix: use DataCollatorForPrefixLM, or '
            "DataCollatorForSFT with prompt_is_prefix=True; or, if the model was trained as a causal one, set "
            "`prompt_is_prefix=False` in its config"
        )
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:].to(model.device)
    scored = targets != IGNORE_INDEX
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
