"""`score_fills` against single forwards, cross-entropy on labels, and sums over token after token."""

import pytest
import torch
from cli_cases import small_model, small_tokenizer
from fill_cases import EOP, SCHEMES, TEXTS, WordTokenizer, context_of, fill_model, next_log_probabilities, row_of
from matrix_cases import VOCAB

ONE_BLANK = [TEXTS[0], "w9 w10 w11 w12 [gMASK]", TEXTS[3]]
CANDIDATES = ["w7", "w8 w9 w10 w11", "", "w18 w7"]

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def naive_score(model, text, candidate, include_end=True, normalize=False):
    """A forward for each token."""
    context, (blank,) = context_of(text)
    span = WordTokenizer()([candidate])["input_ids"][0]
    targets = span + [EOP] * include_end
    total = sum(
        next_log_probabilities(model, context, [(blank, span[:step])])[target].item()
        for step, target in enumerate(targets)
    )
    return total / len(targets) if normalize else total


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@each_scheme
def test_scores_are_those_of_token_after_token(scheme, batch_size):
    model = fill_model(scheme)
    for options in ({}, {"normalize": True}):
        expected = [[naive_score(model, text, candidate, **options) for candidate in CANDIDATES] for text in ONE_BLANK]
        found = model.score_fills(ONE_BLANK, CANDIDATES, WordTokenizer(), batch_size=batch_size, **options)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@each_scheme
def test_scores_without_the_end(scheme):
    model, candidates = fill_model(scheme), [candidate for candidate in CANDIDATES if candidate]
    for normalize in (False, True):
        expected = [[naive_score(model, text, one, False, normalize) for one in candidates] for text in ONE_BLANK]
        found = model.score_fills(ONE_BLANK, candidates, WordTokenizer(), normalize, include_end=False)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@each_scheme
def test_scores_are_a_single_forward_each(scheme):
    model = fill_model(scheme)
    for text in ONE_BLANK:
        context, (blank,) = context_of(text)
        for candidate, score in zip(CANDIDATES, model.score_fills(text, CANDIDATES, WordTokenizer())[0], strict=True):
            span = WordTokenizer()([candidate])["input_ids"][0]
            with torch.no_grad():
                logits = model(**row_of(model, context, [(blank, span)])).logits[0, len(context) :]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([*span, EOP]), reduction="sum")
            assert -score.item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("variant", ["glm_2d-table40", "rope_2d"])
def test_scores_are_the_loss_on_the_labels_of_the_tokenizers_inputs(variant):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, attention_type="prefix", **SCHEMES[variant])
    texts = ["the reader[MASK] each line", "每个文件 [sMASK]\n\nof  lines"]
    for fill in (" returns", "值 of \n"):
        scores = model.score_fills(texts, [fill], tokenizer)[:, 0]
        for text, score in zip(texts, scores, strict=True):
            inputs = tokenizer.build_glm_inputs(text, [fill], return_tensors="pt")
            with torch.no_grad():
                loss = model(**inputs).loss
            assert -score.item() == pytest.approx((loss * (inputs["labels"] != -100).sum()).item(), abs=1e-4)


def test_ends_of_one_token_are_a_distribution():
    """With a single token and without its end, all candidates together have the probability one."""
    tokenizer = WordTokenizer()
    scores = fill_model("glm_2d-table40").score_fills(ONE_BLANK, tokenizer.words, tokenizer, include_end=False)
    assert scores.shape == (3, VOCAB) and scores.dtype == torch.float32
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(3))


def test_candidates_of_each_text():
    model, tokenizer = fill_model("rope"), WordTokenizer()
    lists = [["w7", "w8"], ["w9 w10", "w11", ""], ["w12"]]
    found = model.score_fills(ONE_BLANK, lists, tokenizer)
    for index, (text, own) in enumerate(zip(ONE_BLANK, lists, strict=True)):
        alone = model.score_fills(text, own, tokenizer)[0]
        torch.testing.assert_close(found[index, : len(own)], alone)
        assert torch.isneginf(found[index, len(own) :]).all()


def test_positions_after_gmask_may_be_told():
    text, tokenizer = ONE_BLANK[1], WordTokenizer()
    for scheme, by_itself in (("rope", True), ("glm_2d-table40", False)):
        model = fill_model(scheme)
        scores = {
            told: model.score_fills(text, CANDIDATES, tokenizer, gmask_counts=told) for told in (None, True, False)
        }
        assert torch.equal(scores[None], scores[by_itself]) and not torch.equal(scores[True], scores[False])


REFUSED = {
    "several blanks": ([TEXTS[1]], ["w7"], {}, "text 0 has 2 blanks"),
    "no blank": (["w7"], ["w7"], {}, "text 0 holds no blank"),
    "one string": (TEXTS[0], "w7", {}, "`candidates` must be"),
    "mixed": (ONE_BLANK, ["w7", ["w8"], ["w9"]], {}, "`candidates` must be"),
    "lists missing": (ONE_BLANK, [["w7"]], {}, "those of 1 texts; 3 texts"),
    "no candidates": (ONE_BLANK[:2], [["w7"], []], {}, "text 1 has no candidates"),
    "nothing to score": (TEXTS[0], ["w7", ""], {"include_end": False}, "text 0 has an empty candidate"),
    "too long": (TEXTS[0], ["w7 " * 40], {}, "text 0 needs `block_position_ids` up to 41"),
}


@pytest.mark.parametrize(("texts", "candidates", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(texts, candidates, options, message):
    with pytest.raises(ValueError, match=message):
        fill_model("glm_2d-table40").score_fills(texts, candidates, WordTokenizer(), **options)


def test_scoring_an_end_needs_one():
    class Endless(WordTokenizer):
        eop_token_id = eos_token_id = None

    model = fill_model("glm_2d-table40")
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match="include_end=True"):
        model.score_fills(TEXTS[0], ["w7"], Endless())
    assert model.score_fills(TEXTS[0], ["w7"], Endless(), include_end=False).shape == (1, 1)
