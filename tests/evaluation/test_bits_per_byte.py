"""Losses of documents against a forward for each token, in float64."""

import json
import math

import pytest
import torch
from evaluation_cases import GLM, VARIANTS, documents, evaluated_model, naive_log_likelihood
from largest_tensor import LargestTensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from minillm.data.corpus import TextDocument
from minillm.evaluation.bits_per_byte import (
    DocumentLoss,
    document_losses,
    loss_difference,
    rolling_windows,
    summarize_losses,
)
from minillm.evaluation.bootstrap import bootstrap_interval
from minillm.evaluation.likelihood import pair_row, score_rows

LENGTH = 24


def naive_causal_loss(model, tokenizer, text, length):
    """Each token after what its window holds before it, causally: the last window is as long as the others."""
    known = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    last, total = len(known) - 1, 0.0
    for at in range(1, len(known)):
        first = (at - 1) // length * length
        if first + length > last:
            first = max(0, last - length)
        ids = torch.tensor([known[first:at]])
        extra = {}
        if model.config.attention_type == "prefix":
            extra["prefix_mask"] = torch.zeros_like(ids)
        with torch.no_grad():
            total -= model(ids, **extra).logits[0, -1].log_softmax(-1)[known[at]].item()
    return total


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in GLM])
def test_losses_equal_a_forward_for_each_token(variant):
    model, tokenizer = evaluated_model(variant)
    texts = documents(3)
    found = document_losses(model, tokenizer, texts, max_length=LENGTH, batch_size=3)
    for document, loss in zip(texts, found, strict=True):
        assert loss.loss == pytest.approx(naive_causal_loss(model, tokenizer, document.text, LENGTH), rel=1e-9)
        assert loss.name == document.name and loss.num_bytes == len(document.text.encode())
        assert loss.num_tokens == len(tokenizer(document.text)["input_ids"])


def test_windows_predict_each_token_once_and_the_last_is_filled_up():
    windows = list(rolling_windows(range(1, 11), 0, 4))
    assert [(list(context), list(targets)) for context, targets in windows] == [
        ([0], [1, 2, 3, 4]),
        ([4], [5, 6, 7, 8]),
        ([6, 7, 8], [9, 10]),
    ]
    assert [(list(context), list(targets)) for context, targets in rolling_windows([1, 2], 0, 4)] == [([0], [1, 2])]


def test_neither_batches_nor_the_other_documents_matter():
    model, tokenizer = evaluated_model("alibi")
    texts = documents()
    alone = [document_losses(model, tokenizer, [text], max_length=LENGTH)[0] for text in texts]
    told = []
    together = document_losses(
        model, tokenizer, texts, max_length=LENGTH, batch_size=5, progress=lambda *what: told.append(what)
    )
    assert [each.loss for each in together] == pytest.approx([each.loss for each in alone], rel=1e-10)
    assert [what for what, _, _ in told] == ["windows"] * len(told) and told[-1][1] == told[-1][2] > 5


@pytest.mark.parametrize("variant", GLM)
def test_with_glm_a_text_is_what_fills_a_blank(variant):
    model, tokenizer = evaluated_model(variant)
    text = documents()[0].text
    (found,) = document_losses(model, tokenizer, [TextDocument("", text)], glm=True)
    score = model.score_fills("<|startoftext|>[gMASK]", [text], tokenizer, include_end=False)
    assert found.loss == pytest.approx(-score.item(), rel=1e-5)
    # In windows of 8 tokens, 5 of the text each: a context, a blank and a start token come before them.
    (cut,) = document_losses(model, tokenizer, [TextDocument("", text)], glm=True, max_length=8)
    known = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    assert cut.num_tokens == len(known) - 1
    total = 0.0
    for context, targets in rolling_windows(known[1:], known[0], 6):
        row = [*context, tokenizer.gmask_token_id, tokenizer.sop_token_id]
        for target in targets:
            length = len(context) + 1
            inputs = {
                "position_ids": [*range(length), *[len(context)] * (len(row) - length)],
                "block_position_ids": [0] * length + [*range(1, len(row) - length + 1)],
                "prefix_mask": [1] * length + [0] * (len(row) - length),
            }
            inputs = {name: torch.tensor([values]) for name, values in inputs.items()}
            with torch.no_grad():
                total -= model(torch.tensor([row]), **inputs).logits[0, -1].log_softmax(-1)[target].item()
            row.append(target)
        assert len(row) - 1 <= 8
    assert cut.loss == pytest.approx(total, rel=1e-9)


def test_few_logits_are_alive_at_once():
    model, tokenizer = evaluated_model(intermediate_size=48)
    rows = [pair_row([1], list(range(3 + number, 60 + number))) for number in range(8)]
    model.tuning.chunk_logits = {**(before := model.tuning.chunk_logits), "cpu": 5 * len(tokenizer)}
    try:
        with LargestTensor() as watched:
            found = score_rows(model, rows)
    finally:
        model.tuning.chunk_logits = before
    # Attention makes more; the first row, alone, tells whether the head is plain.
    assert watched.largest <= 8 * 57 * 4 * 57 < 8 * 57 * len(tokenizer)
    assert found[0].log_likelihood == pytest.approx(naive_log_likelihood(model, [1], range(3, 60)), rel=1e-9)


@pytest.mark.parametrize("variant", ["causal", "prefix"])
def test_rows_of_the_same_inputs_are_one_forward(variant):
    model, _ = evaluated_model(variant)
    calls = []
    model.model.register_forward_hook(lambda module, arguments, inputs, _: calls.append(inputs), with_kwargs=True)
    prefix = variant == "prefix"
    contexts, ends = ([5, 6, 7], [5, 6], [5, 6, 7, 8]), (9, 10, 11)
    pairs = [(context, [end]) for end in ends for context in contexts]
    # The same tokens as one of these, but of another context.
    pairs.append(([5, 6], [7, 9]))
    rows = [pair_row(context, ids, len(context) * prefix) for context, ids in pairs]
    found = score_rows(model, rows, batch_size=100)
    # Twice to see what the head does.
    assert len(calls) == 3 and calls[-1]["input_ids"].shape[0] == 3 + prefix
    expected = [naive_log_likelihood(model, context, ids) for context, ids in pairs]
    assert [score.log_likelihood for score in found] == pytest.approx(expected, rel=1e-9)
    assert [score.num_tokens for score in found] == [1] * 9 + [2]


def test_a_head_that_is_more_than_a_matrix_is_asked_itself():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=1.0,
        final_logit_softcapping=2.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    (score, _) = score_rows(model, [pair_row([1], [5, 6, 7]), pair_row([1, 2], [9])])
    with torch.no_grad():
        found = model(torch.tensor([[1, 5, 6]])).logits[0].log_softmax(-1)
    assert score.log_likelihood == pytest.approx(sum(found[at, token].item() for at, token in enumerate([5, 6, 7])))


def test_whether_tokens_are_the_likeliest_is_told():
    model, _ = evaluated_model()
    known = [1]
    for _ in range(4):
        with torch.no_grad():
            known.append(model(torch.tensor([known])).logits[0, -1].argmax().item())
    greedy, other = score_rows(model, [pair_row([1], known[1:]), pair_row([1], [*known[1:-1], 3 + (known[-1] == 3)])])
    assert greedy.is_greedy and not other.is_greedy and greedy.num_tokens == 4


def test_figures_are_sums_over_documents():
    losses = [DocumentLoss("a", 10, 4, 7.0), DocumentLoss("b", 30, 9, 11.0)]
    result = summarize_losses(losses, seed=3)
    assert result.bits_per_byte.value == pytest.approx(18.0 / 40 / math.log(2))
    assert result.perplexity.value == pytest.approx(math.exp(18.0 / 13))
    assert result.byte_perplexity.value == pytest.approx(2**result.bits_per_byte.value)
    per_byte = bootstrap_interval([7.0, 11.0], [10, 30], seed=3)
    assert result.bits_per_byte.low * math.log(2) == pytest.approx(per_byte.low)
    assert result[3:] == (2, 40, 13)
    base = [DocumentLoss("a", 10, 3, 8.0), DocumentLoss("b", 30, 9, 10.0)]
    difference = loss_difference(losses, base, seed=3)
    assert difference == pytest.approx([each / math.log(2) for each in bootstrap_interval([-1, 1], [10, 30], seed=3)])
    with pytest.raises(ValueError, match="same documents"):
        loss_difference(losses, base[::-1])


def test_special_tokens_in_texts_are_text_unless_asked_otherwise():
    model, tokenizer = evaluated_model()
    text = TextDocument("", "a<|endoftext|>b")
    (literal,) = document_losses(model, tokenizer, [text])
    (read,) = document_losses(model, tokenizer, [text], special_tokens_in_text=True)
    assert (literal.num_tokens, read.num_tokens) == (
        len(tokenizer(text.text, split_special_tokens=True)["input_ids"]),
        3,
    )


def test_what_cannot_be_scored_is_refused():
    model, tokenizer = evaluated_model()
    texts = [TextDocument("one", "some text"), TextDocument("two", "")]
    with pytest.raises(ValueError, match="document two is empty"):
        document_losses(model, tokenizer, texts)
    with pytest.raises(ValueError, match="no documents"):
        document_losses(model, tokenizer, [])
    with pytest.raises(ValueError, match="`max_length` is 2; a window needs at least 3"):
        document_losses(evaluated_model("glm_2d-prefix")[0], tokenizer, texts[:1], max_length=2, glm=True)
    with pytest.raises(ValueError, match="only a MiniLLM"):
        document_losses(model, tokenizer, texts[:1], glm=True)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        document_losses(model, tokenizer, texts[:1], batch_size=0)
    with pytest.raises(ValueError, match='attention_type="bidirectional"'):
        document_losses(evaluated_model(attention_type="bidirectional")[0], tokenizer, texts[:1])
    with pytest.raises(ValueError, match=f"the document one holds a token beyond the model's {len(tokenizer) - 100}"):
        document_losses(
            evaluated_model(vocab_size=len(tokenizer) - 100)[0], tokenizer, [TextDocument("one", "zzz北京")]
        )
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match="the model's loss is nan in the document one"):
        document_losses(model, tokenizer, texts[:1])
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        document_losses(model, tokenizer, texts[:1])


def test_losses_are_plain_json():
    model, tokenizer = evaluated_model()
    for loss in document_losses(model, tokenizer, documents(1)):
        assert json.loads(json.dumps(loss._asdict())) == loss._asdict()
