"""Held-out rows scored document by document and by the frequency of tokens."""

import numpy as np
import pytest
import torch
from cli_cases import small_model, small_tokenizer

from minillm.evaluation import perplexity, token_nll
from minillm.evaluation.bootstrap import bootstrap_interval
from minillm.evaluation.held_out import HeldOutScore, loss_by_frequency, score_held_out
from minillm.training import DataCollatorForCausalLM, DataCollatorForGLM, DataCollatorForPrefixLM, pack_dataset

LENGTHS = (30, 5, 17, 40, 8, 2, 25)
COLLATORS = {"causal": DataCollatorForCausalLM, "prefix": DataCollatorForPrefixLM, "glm": DataCollatorForGLM}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 300, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("kind", COLLATORS)
def test_all_documents_together_have_the_perplexity(kind, tokenizer):
    model = small_model(tokenizer, "causal" if kind == "causal" else "prefix")
    collator = COLLATORS[kind](tokenizer, max_length=64)
    rows = pack_dataset([{"input_ids": ids} for ids in documents()], collator, fixed_prefixes=True)
    told = []
    score = score_held_out(model, rows, collator, 2, told.append)
    expected = perplexity(model, rows, collator)
    assert score.result.nll == pytest.approx(expected.nll, rel=1e-6)
    assert score.result.num_tokens == expected.num_tokens == score.count_of_id.sum()
    assert score.loss_of_id.sum() == pytest.approx(sum(score.losses), rel=1e-9)
    assert sum(told) == len(rows) and not model.training


def test_a_document_has_the_losses_that_it_has_alone(tokenizer):
    model = small_model(tokenizer)
    collator = DataCollatorForCausalLM(tokenizer, max_length=64)
    score = score_held_out(model, pack_dataset([{"input_ids": ids} for ids in documents()], collator), collator)
    alone = [token_nll(model, collator([{"input_ids": ids}])).sum().item() for ids in documents()]
    assert sorted(score.losses) == pytest.approx(sorted(alone), rel=1e-5)
    assert sorted(score.tokens) == sorted(length - 1 for length in LENGTHS)


def test_parts_scored_apart_are_the_whole(tokenizer):
    model = small_model(tokenizer)
    collator = DataCollatorForCausalLM(tokenizer, max_length=64)
    rows = pack_dataset([{"input_ids": ids} for ids in documents()], collator)
    whole, parts = score_held_out(model, rows, collator), HeldOutScore()
    for start in (1, 0):
        parts.add(score_held_out(model, rows[start::2], collator))
    assert parts.result.num_tokens == whole.result.num_tokens
    assert parts.result.nll == pytest.approx(whole.result.nll, rel=1e-6)
    assert parts.interval(3) == pytest.approx(whole.interval(3), rel=1e-5)
    low, high = whole.interval()
    found = bootstrap_interval(*zip(*sorted(zip(whole.losses, whole.tokens, strict=True)), strict=True))
    assert low < whole.result.perplexity < high
    # Other draws of the same documents.
    assert (np.log(low), np.log(high)) == pytest.approx((found.low, found.high), abs=0.05)


def test_losses_by_frequency_by_hand():
    # Id 0 is half of all training tokens, 1 a quarter, 2 and 3 an eighth each; 4 never occurred.
    counts = np.array([40, 20, 10, 10, 0])
    score = HeldOutScore([6.0], [6], np.array([1.0, 0.0, 2.0, 3.0, 5.0]), np.array([2, 0, 1, 1, 2]))
    # The middles of their shares: 0.25, 0.625, 0.8125, 0.9375.
    assert loss_by_frequency(score, counts) == [
        {"group": 3, "ids": 1, "tokens": 2, "loss": 0.5},
        {"group": 9, "ids": 1, "tokens": 1, "loss": 2.0},
        {"group": 10, "ids": 1, "tokens": 1, "loss": 3.0},
        {"group": 0, "ids": 1, "tokens": 2, "loss": 2.5},
    ]
