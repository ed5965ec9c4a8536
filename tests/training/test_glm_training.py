"""GLM batches in the model: packed like alone, like the naive twin, scored and trained on all of their end tokens."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from glm_cases import EOP, IDS, SOP, documents_of, glm, random_texts
from matrix_cases import double_weights, loud_model, tiny_config
from reference import reference_logits
from torch.nn import functional as F
from training_cases import VOCABULARY, counting_documents, losses, make_trainer, tiny_model
from variants import variants

from minillm import MiniLLMConfig
from minillm.data import corrupt
from minillm.evaluation import BigramModel, UnigramModel, ngram_perplexity, perplexity
from minillm.evaluation.perplexity import token_nll
from minillm.publishing.description import draw_mask
from minillm.training import DataCollatorForGLM, pack_dataset

SCHEMES = variants("glm_2d-table65 rope_2d rope alibi")


def model_for(scheme):
    config = tiny_config(
        attention_type="prefix", vocab_size=52, max_position_embeddings=64, pad_token_id=0, **SCHEMES[scheme]
    )
    return loud_model(config)


def gradients(model, batches):
    """Gradients of the mean over the scored tokens of all batches together."""
    model.zero_grad()
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_worked_example_has_the_mask_of_the_paper():
    """Figure 2 (d) of the GLM paper: Part A sees itself, Part B sees Part A and what stands before it in Part B."""
    tokens = {"mask_token_id": 1, "sop_token_id": 2, "eop_token_id": 3}
    sample = corrupt([11, 12, 13, 14, 15, 16], [[2, 3], [4, 6]], [1, 0], **tokens)
    prefix = torch.tensor([[1] * sample.context_length + [0] * 5])
    assert draw_mask(MiniLLMConfig(attention_type="prefix"), 10, prefix_mask=prefix).splitlines() == [
        *["■ ■ ■ ■ ■ · · · · ·"] * 5,
        "■ ■ ■ ■ ■ ■ · · · ·",
        "■ ■ ■ ■ ■ ■ ■ · · ·",
        "■ ■ ■ ■ ■ ■ ■ ■ · ·",
        "■ ■ ■ ■ ■ ■ ■ ■ ■ ·",
        "■ ■ ■ ■ ■ ■ ■ ■ ■ ■",
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_packed_batch_equals_its_documents_alone(scheme, seed):
    model, texts = model_for(scheme), random_texts(seed, 12, shortest=1, longest=30)
    packed = glm()(texts)
    assert len(packed["input_ids"]) < 10
    # Documents of special tokens alone hold nothing to score.
    alone = [glm(packing=False)([text]) for text in texts if max(text) > 7]
    found, expected = gradients(model, [packed]), gradients(model, alone)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text
        )
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in packed.items() if name != "labels"}
        logits = model(**inputs).logits
    own = {tuple(document["input_ids"]): document for document in documents_of(packed)}
    places = {ids: (row, slot) for ids, row, slot in starts(packed)}
    for batch in alone:
        (document,) = documents_of(batch)
        ids = tuple(document["input_ids"])
        assert own[ids]["labels"] == document["labels"]
        row, slot = places[ids]
        with torch.no_grad():
            lone = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        torch.testing.assert_close(logits[row, slot : slot + len(ids)], lone[0, : len(ids)], atol=1e-5, rtol=1e-5)


def starts(batch):
    """(ids, row, first slot) of each document."""
    for row, numbers in enumerate(batch["document_ids"].tolist()):
        for number in range(1, max(numbers) + 1):
            slot, count = numbers.index(number), numbers.count(number)
            yield tuple(batch["input_ids"][row, slot : slot + count].tolist()), row, slot


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_naive_twin_in_logits_and_gradients(scheme):
    model = model_for(scheme)
    batch = glm(max_length=40)(random_texts(7, 5, shortest=3, longest=14))
    weights = double_weights(model)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    expected = reference_logits(model.config, weights, **inputs)
    real = batch["attention_mask"].bool()
    output = model(**batch)
    torch.testing.assert_close(output.logits[real].double(), expected[real], atol=1e-5, rtol=1e-5)
    # Every slot with a label, the one behind the row's last token too, is predicted by the slot before it.
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, atol=1e-5, rtol=1e-4)


def trainable(scheme):
    return tiny_model("prefix", vocab_size=VOCABULARY + 8, max_position_embeddings=64, **SCHEMES[scheme])


def learnable(count, seed=0):
    """Documents that count upwards, away from the special tokens."""
    documents = counting_documents(count, seed=seed, shortest=8)
    return [{"input_ids": [token + 7 for token in document["input_ids"]]} for document in documents]


@pytest.mark.mostly_thorough("glm_2d-table65-None")
@pytest.mark.parametrize("kind", [None, "document"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loss_falls_in_the_stock_trainer(scheme, kind, tmp_path):
    collator = glm(kind)
    rows = Dataset.from_list(pack_dataset(learnable(400), collator))
    trainer = make_trainer(trainable(scheme), rows, collator, tmp_path, max_steps=60)
    trainer.train()
    assert losses(trainer)[0] > 0.9 * math.log(VOCABULARY + 8)
    assert sum(losses(trainer)[-5:]) / 5 < 0.7 * losses(trainer)[0]


def test_evaluation_equals_perplexity_in_every_epoch(tmp_path):
    collator = glm()
    model = trainable("glm_2d-table65")
    rows, held_out = (pack_dataset(learnable(60, seed), collator, fixed_prefixes=seed == 1) for seed in (0, 1))
    options = {"num_train_epochs": 3, "per_device_eval_batch_size": 100, "learning_rate": 0.0}
    trainer = make_trainer(model, rows, collator, tmp_path, eval_dataset=held_out, eval_strategy="epoch", **options)
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations == [evaluations[0]] * 3 and collator.epoch == 2
    assert len({round(loss, 4) for loss in losses(trainer)}) > 1
    result = perplexity(model, held_out, collator, batch_size=3)
    assert result.nll == pytest.approx(evaluations[0], abs=1e-5)


def test_perplexity_scores_the_tokens_of_all_spans_and_their_ends():
    texts = [text for text in random_texts(2, 40, longest=40) if max(text) > 7]
    result = perplexity(model_for("glm_2d-table65"), texts, glm(), batch_size=6)
    documents = documents_of(glm(max_length=256)(texts))
    # As many as there are tokens in Part B: each start token stands for an end token.
    assert result.num_tokens == sum(
        sum(block > 0 for block in document["block_position_ids"]) for document in documents
    )
    batch = glm(packing=False)(texts[:1])
    assert len(token_nll(model_for("glm_2d-table65"), batch)) == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("kind", [UnigramModel, BigramModel])
def test_ngrams_score_the_same_labels(kind):
    text = [21, 22, 21, 22, 21, 23]
    ngram = kind([text, [EOP, EOP]], vocab_size=30)
    collator = glm("document", document_fraction=(1.0, 1.0))
    result = ngram_perplexity(ngram, [text, [22, 21]], collator)
    expected = [(SOP, 21), (21, 22), (22, 21), (21, 22), (22, 21), (21, 23), (23, EOP), (SOP, 22), (22, 21), (21, EOP)]
    previous, tokens = torch.tensor(expected).T.numpy()
    assert result.num_tokens == 10
    assert result.nll == pytest.approx(-ngram.log_prob(previous, tokens).mean(), abs=1e-12)


def test_a_causal_model_refuses_the_prefix():
    with pytest.raises(ValueError, match="prefix_mask"):
        tiny_model("causal", vocab_size=60)(**glm()([[21, 22, 23]]))


def test_a_collator_can_be_made_from_ids_alone():
    assert DataCollatorForGLM(max_length=16, mixture={"token": 1}, **IDS)([[21, 22, 23]])["labels"].shape[0] == 1


@pytest.mark.slow
def test_benchmark_of_the_collators_runs(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.collators",
            "--documents",
            "60",
            "--rounds",
            "1",
            "--json",
            str(tmp_path / "a"),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads((tmp_path / "a").read_text())["rows"]
    assert [row["collator"] for row in rows] == [
        "causal",
        "prefix",
        "GLM",
        "GLM, token",
        "GLM, sentence",
        "GLM, document",
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0 and 0 <= row["padding"] < 0.5
        assert row["collator"] in done.stdout
