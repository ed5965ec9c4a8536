"""Perplexity and the n-gram baselines: against hand-worked numbers and a loop over single documents."""

import math
import random

import numpy as np
import pytest
import torch

from minillm import MiniLLMConfig, MiniLLMForCausalLM
from minillm.evaluation.ngram import BigramModel, UnigramModel, ngram_perplexity
from minillm.evaluation.perplexity import PerplexityResult, perplexity
from minillm.training.collators import DataCollatorForCausalLM, DataCollatorForPrefixLM, DataCollatorForSFT
from minillm.training.put_back import evaluating

VOCABULARY = 40


def tiny_model(**fields):
    torch.manual_seed(0)
    config = MiniLLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
        **fields,
    )
    return MiniLLMForCausalLM(config).eval()


def random_documents(seed, count=13):
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 30))] for _ in range(count)]


def nll_alone(model, ids, first, prefix_length=None):
    """Summed negative log likelihood of tokens `first`, ... of one document by a forward of its own."""
    extra = {}
    if prefix_length is not None:
        extra["prefix_mask"] = (torch.arange(len(ids)) < prefix_length).long()[None]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids]), **extra).logits[0].log_softmax(-1)
    return -sum(log_probs[at - 1, ids[at]].item() for at in range(first, len(ids)))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_perplexity_equals_documents_alone(packing, batch_size, position):
    model = tiny_model(position_embedding_type=position)
    documents = random_documents(0)
    collator = DataCollatorForCausalLM(max_length=64, pad_token_id=0, packing=packing)
    result = perplexity(model, documents, collator, batch_size=batch_size)
    total = sum(nll_alone(model, ids, first=1) for ids in documents)
    count = sum(len(ids) - 1 for ids in documents)
    assert result.num_tokens == count
    assert result.nll == pytest.approx(total / count, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_prefix_model_counts_only_what_follows_the_prefix():
    model = tiny_model(attention_type="prefix")
    documents = random_documents(1)
    collator = DataCollatorForPrefixLM(max_length=64, pad_token_id=0)
    total = count = 0
    for ids in documents:
        length = int(collator([ids])["prefix_mask"].sum())
        total += nll_alone(model, ids, first=length, prefix_length=length)
        count += len(ids) - length
    result = perplexity(model, documents, collator, batch_size=5)
    assert result.num_tokens == count
    assert result.nll == pytest.approx(total / count, abs=1e-5)


def test_answer_only_counts_the_answer():
    model = tiny_model(attention_type="prefix")
    samples = [{"prompt_ids": ids[:2], "completion_ids": ids[2:]} for ids in random_documents(2) if len(ids) > 2]
    collator = DataCollatorForSFT(max_length=64, pad_token_id=0, prompt_is_prefix=True)
    total = sum(
        nll_alone(model, sample["prompt_ids"] + sample["completion_ids"], first=2, prefix_length=2)
        for sample in samples
    )
    result = perplexity(model, samples, collator)
    assert result.num_tokens == sum(len(sample["completion_ids"]) for sample in samples)
    assert result.nll == pytest.approx(total / result.num_tokens, abs=1e-5)


def test_evaluation_is_without_dropout_and_restores_training_mode():
    model = tiny_model(hidden_dropout=0.5).train()
    collator = DataCollatorForCausalLM(max_length=64, pad_token_id=0)
    assert perplexity(model, random_documents(3), collator) == perplexity(model, random_documents(3), collator)
    assert model.training


@pytest.mark.parametrize("fails", [False, True], ids=["well", "by-an-error"])
def test_each_module_goes_on_in_the_mode_that_it_was_in(fails):
    model = tiny_model(hidden_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.train()
    before = [module.training for module in model.modules()]
    collator = DataCollatorForCausalLM(max_length=64, pad_token_id=0)
    if fails:
        with pytest.raises(ZeroDivisionError):
            perplexity(model, [[1, 2, 3]], lambda samples: 1 / 0)
    else:
        perplexity(model, [[1, 2, 3]], collator)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


class Doubling(torch.nn.Module):
    """A module that has to be told of each change of its mode, as one that merges an adapter while it evaluates."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def train(self, mode=True):
        if self.training != mode:
            self.weight.data *= 0.5 if mode else 2.0
        return super().train(mode)


def test_a_module_is_told_of_its_mode():
    model = torch.nn.ModuleDict({"first": Doubling(), "second": Doubling().eval()})
    for mode in (True, False):
        model.training = mode
        with evaluating(model):
            assert [parameter.item() for parameter in model.parameters()] == [2.0, 2.0]
        assert [parameter.item() for parameter in model.parameters()] == [1.0, 2.0]
        assert [module.training for module in model.modules()] == [mode, True, False]


def test_a_prefix_model_is_not_scored_causally_by_accident():
    collator = DataCollatorForCausalLM(max_length=64, pad_token_id=0)
    with pytest.raises(ValueError, match="the collator marks no prefix: use DataCollatorForPrefixLM"):
        perplexity(tiny_model(attention_type="prefix"), [[1, 2]], collator)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_with_nothing_to_score_are_skipped(batch_size):
    model = tiny_model()
    collator = DataCollatorForCausalLM(max_length=64, pad_token_id=0)
    documents = random_documents(6, count=4)
    with_lone_tokens = [[3], [4], *documents[:2], [5], [6], *documents[2:]]
    result = perplexity(model, with_lone_tokens, collator, batch_size=batch_size)
    expected = perplexity(model, documents, collator)
    assert (result.nll, result.num_tokens) == (pytest.approx(expected.nll, abs=1e-6), expected.num_tokens)
    unigram = UnigramModel(documents, VOCABULARY)
    skipped = ngram_perplexity(unigram, with_lone_tokens, collator, batch_size=batch_size)
    assert skipped.nll == pytest.approx(ngram_perplexity(unigram, documents, collator).nll, abs=1e-12)
    for score in (perplexity, ngram_perplexity):
        with pytest.raises(ValueError, match="there is no token to score"):
            score(model if score is perplexity else unigram, [[1], [2], [3]], collator, batch_size=batch_size)


def test_nothing_to_score_is_refused():
    collator = DataCollatorForCausalLM(max_length=64, pad_token_id=0)
    with pytest.raises(ValueError, match="the data set to evaluate is empty"):
        perplexity(tiny_model(), [], collator)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        perplexity(tiny_model(), [[1, 2]], collator, batch_size=0)
    with pytest.raises(ValueError, match=r"made no `labels`, only \['input_ids'\]"):
        perplexity(tiny_model(), [[1, 2]], lambda samples: {"input_ids": torch.tensor(samples)})
    with pytest.raises(ValueError, match="every label is -100"):
        PerplexityResult.from_sum(0.0, 0)
    assert PerplexityResult.from_sum(1e6, 1) == (math.inf, 1e6, 1)


def test_unigram_by_hand():
    model = UnigramModel([[0, 1, 1], [2]], vocab_size=4)
    assert model.probabilities.tolist() == [2 / 8, 3 / 8, 2 / 8, 1 / 8]


def test_kneser_ney_bigram_by_hand():
    # Pairs: 01 twice, 10, 12 and 02 once: D = 3 / (3 + 2). Distinct predecessors of 0, 1, 2, 3: 1, 1, 2, 0.
    model = BigramModel([[0, 1, 0, 1, 2], [0, 2]], vocab_size=4)
    continuation = [0.85 / 4, 0.85 / 4, 1.85 / 4, 0.45 / 4]
    after_0 = [0.4 * continuation[0], 1.4 / 3 + 0.4 * continuation[1], 0.4 / 3 + 0.4 * continuation[2], 0.4 * 0.1125]
    after_1 = [0.4 / 2 + 0.6 * continuation[0], 0.6 * continuation[1], 0.4 / 2 + 0.6 * continuation[2], 0.6 * 0.1125]
    expected = [after_0, after_1, continuation, continuation]
    previous, tokens = np.divmod(np.arange(16), 4)
    assert np.exp(model.log_prob(previous, tokens)).reshape(4, 4) == pytest.approx(np.array(expected), abs=1e-12)


@pytest.mark.parametrize("kind", [UnigramModel, BigramModel])
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_are_positive_and_sum_to_one(kind, seed):
    model = kind(random_documents(seed, count=6), VOCABULARY + 5)
    size = model.vocab_size
    previous, tokens = np.divmod(np.arange(size * size), size)
    table = np.exp(model.log_prob(previous, tokens)).reshape(size, size)
    assert table.min() > 0
    assert table.sum(1) == pytest.approx(np.ones(size), abs=1e-12)


def test_discount_without_pairs_seen_twice():
    table = np.exp(BigramModel([[0, 1, 2]], vocab_size=3).log_prob(np.zeros(3, int), np.arange(3)))
    # D = 0.75; two pairs; one successor of 0, seen once.
    continuation = np.array([0.5, 0.25 + 0.5, 0.25 + 0.5]) / 2
    assert table == pytest.approx(np.array([0, 0.25, 0]) + 0.75 * continuation, abs=1e-12)


def test_baselines_score_the_tokens_that_the_model_scores():
    train, held_out = random_documents(4), random_documents(5)
    collator = DataCollatorForPrefixLM(max_length=32, pad_token_id=0)
    result = perplexity(tiny_model(attention_type="prefix"), held_out, collator)
    bigram = BigramModel(train, VOCABULARY)
    baseline = ngram_perplexity(bigram, held_out, collator, batch_size=3)
    total = 0.0
    for ids in held_out:
        length = int(collator([ids])["prefix_mask"].sum())
        total -= bigram.log_prob(np.array(ids[length - 1 : -1]), np.array(ids[length:])).sum()
    assert baseline.num_tokens == result.num_tokens
    assert baseline.nll == pytest.approx(total / baseline.num_tokens, abs=1e-9)


def test_bigram_beats_unigram_where_neighbours_matter():
    # Each token is followed by itself plus one: a bigram model is certain, a unigram model knows nothing.
    documents = [[(start + step) % VOCABULARY for step in range(30)] for start in range(VOCABULARY)]
    collator = DataCollatorForCausalLM(max_length=32, pad_token_id=0)
    unigram = ngram_perplexity(UnigramModel(documents, VOCABULARY), documents, collator)
    bigram = ngram_perplexity(BigramModel(documents, VOCABULARY), documents, collator)
    assert unigram.perplexity == pytest.approx(VOCABULARY, rel=1e-3)
    assert bigram.perplexity < 1.1


@pytest.mark.parametrize("kind", [UnigramModel, BigramModel])
def test_bad_ids_are_refused(kind):
    with pytest.raises(ValueError, match="token ids run from 1 to 9; the vocabulary has 0 to 8"):
        kind([[1, 9]], vocab_size=9)
    with pytest.raises(ValueError, match="there are no"):
        kind([], vocab_size=9)
    collator = DataCollatorForCausalLM(max_length=32, pad_token_id=0)
    with pytest.raises(ValueError, match="token ids run from 9 to 9; the vocabulary has 0 to 8"):
        ngram_perplexity(kind([[1, 2]], vocab_size=9), [[1, 9]], collator)


def test_a_prefix_model_that_was_trained_as_a_causal_one_is_scored_as_one():
    model, twin = tiny_model(attention_type="prefix", prompt_is_prefix=False), tiny_model()
    twin.load_state_dict(model.state_dict())
    samples = [{"input_ids": list(range(1, 12))}, {"input_ids": list(range(3, 9))}]
    collator = DataCollatorForCausalLM(max_length=16, pad_token_id=0)
    assert perplexity(model, samples, collator).perplexity == pytest.approx(
        perplexity(twin, samples, collator).perplexity, rel=1e-6
    )
