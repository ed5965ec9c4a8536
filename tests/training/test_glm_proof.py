"""The training proof of GLM's objective: its script runs, and its measures are what they say."""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import small_tokenizer, write_corpus
from fill_cases import EOP, GMASK, MASK, WordTokenizer, fill_model, next_log_probabilities
from matrix_cases import VOCAB, loud_model, tiny_config

from minillm import MiniLLMTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "glm_proof.py"
FIRST_WORD = 7


def load_script():
    # As for a script that is run, its neighbours are importable.
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("glm_proof", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


proof = load_script()


def some_ids(seed, count):
    return np.random.default_rng(seed).integers(FIRST_WORD, VOCAB, count).tolist()


def words(ids):
    return " ".join(WordTokenizer().words[token] for token in ids)


def one_blank(start, stop):
    return proof.Blank(np.array([[start, stop]]), np.array([0]), start, stop)


def naive_blank(model, ids, start, stop, mask, others=()):
    """Log probabilities [stop - start + 1, vocabulary] of a blank's tokens and end, a forward for each.

    `others` are spans cut out behind the blank, and filled before it.
    """
    context, done = [*ids[:start], mask], []
    for (_, end), (begin, after) in zip([(start, stop), *others], [*others, (len(ids), None)], strict=True):
        context += ids[end:begin]
        if after:
            done.append((len(context), ids[begin:after]))
            context.append(mask)
    spans = [ids[start : start + step] for step in range(stop - start + 1)]
    return torch.stack([next_log_probabilities(model, context, [*done, (start, span)]) for span in spans])


def negated(table, targets):
    return [-row[target].item() for row, target in zip(table, targets, strict=True)]


def test_causal_scores_are_log_softmax_of_the_left_context():
    model = loud_model(tiny_config())
    rows, spans = [some_ids(seed, 12) for seed in range(5)], [(1, 12), (4, 6), (7, 8), (3, 9), (11, 12)]
    scores = proof.score_rows(
        model, [proof.causal_row(ids, *span) for ids, span in zip(rows, spans, strict=True)], batch_size=3
    )
    for ids, (start, stop), nll, hit in zip(rows, spans, *scores, strict=True):
        table = [model(torch.tensor([ids[:at]])).logits[0, -1].log_softmax(-1) for at in range(start, stop)]
        assert nll.tolist() == pytest.approx(negated(table, ids[start:stop]), abs=1e-4)
        assert hit.tolist() == [
            row.argmax().item() == token for row, token in zip(table, ids[start:stop], strict=True)
        ]
    flat = np.concatenate(scores.nll)
    assert len(flat) == 21 and scores.perplexity == pytest.approx(math.exp(flat.sum() / 21), rel=1e-5)


@pytest.mark.parametrize(("scheme", "mask"), [("rope_2d", MASK), ("rope", GMASK)])
def test_scores_of_blanks_are_those_of_token_after_token(scheme, mask):
    model, tokenizer = fill_model(scheme), WordTokenizer()
    rows, spans = [some_ids(seed, 11) for seed in range(4)], [(4, 7), (0, 11), (10, 11), (5, 11)]
    inputs = [proof.glm_row(ids, one_blank(*span), mask, tokenizer) for ids, span in zip(rows, spans, strict=True)]
    scores = proof.score_rows(model, inputs, batch_size=3)
    known = proof.score_rows(model, inputs, never=EOP)
    for number, (ids, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
        table, targets = naive_blank(model, ids, start, stop, mask), [*ids[start:stop], EOP]
        assert scores.nll[number].tolist() == pytest.approx(negated(table, targets), abs=1e-4)
        table[:-1, EOP] = -torch.inf
        table = table.log_softmax(-1)
        assert known.nll[number].tolist() == pytest.approx(negated(table, targets), abs=1e-4)
        assert known.hit[number].tolist() == (table.argmax(-1) == torch.tensor(targets)).tolist()
        # The library's own scores: positions and prefix as a user's call has them.
        if stop < len(ids) or mask == GMASK:
            text = f"{words(ids[:start])} {tokenizer.words[mask]} {words(ids[stop:])}".strip()
            score = model.score_fills(text, [words(ids[start:stop])], tokenizer)[0, 0].item()
            assert -scores.nll[number].sum() == pytest.approx(score, abs=1e-3)


def test_a_blank_sees_those_that_were_filled_before_it():
    model, ids, others = fill_model("rope_2d"), some_ids(0, 14), [(6, 8), (11, 12)]
    blank = proof.Blank(np.array([[2, 4], *others]), np.array([1, 2, 0]), 2, 4)
    nll = proof.score_rows(model, [proof.glm_row(ids, blank, MASK, WordTokenizer())]).nll[0]
    expected = negated(naive_blank(model, ids, 2, 4, MASK, others), [*ids[2:4], EOP])
    assert nll.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_rest_of_a_text_is_scored_behind_gmask():
    model, ids = fill_model("rope"), some_ids(0, 9)
    for start in (0, 5):
        nll = proof.score_rows(model, [proof.rest_row(ids, start, WordTokenizer())]).nll[0]
        table = naive_blank(model, ids, start, 9, GMASK)
        assert nll.tolist() == pytest.approx(negated(table, [*ids[start:], EOP]), abs=1e-4)


def test_a_text_read_one_way_has_other_scores_those_of_a_causal_mask():
    model, ids = fill_model("rope_2d"), some_ids(0, 11)
    both, one = (proof.glm_row(ids, one_blank(4, 7), MASK, WordTokenizer(), way) for way in (True, False))
    assert sum(both["prefix_mask"]) == 9 and sum(one["prefix_mask"]) == 0
    names = ("input_ids", "position_ids", "block_position_ids")
    causal = type(model.config)(**{**model.config.to_dict(), "attention_type": "causal"})
    twin = type(model)(causal).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = twin(**{name: torch.tensor([one[name][:-1]]) for name in names}).logits[0, -4:]
    expected = negated(logits.log_softmax(-1), [*ids[4:7], EOP])
    assert proof.score_rows(model, [one]).nll[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert proof.score_rows(model, [both]).nll[0].tolist() != pytest.approx(expected, abs=1e-2)


def test_an_exact_match_is_what_fill_writes():
    model, tokenizer = fill_model("rope_2d"), WordTokenizer()
    matched = 0
    for seed in range(30):
        ids = some_ids(seed, 10)
        text = f"{words(ids[:4])} [MASK] {words(ids[4:])}"
        (fill,) = model.fill(text, tokenizer, max_new_tokens=6).fill_ids[0]
        if not 0 < len(fill) < 6 or min(fill) < FIRST_WORD:
            continue
        matched += 1
        stop = 4 + len(fill)
        other = [*fill[:-1], FIRST_WORD + (fill[-1] - FIRST_WORD + 1) % (VOCAB - FIRST_WORD)]
        inputs = [
            proof.glm_row([*ids[:4], *span, *ids[4:]], one_blank(4, 4 + len(span)), MASK, tokenizer)
            for span in (fill, other, [*fill, fill[-1]], fill[:-1] or other)
        ]
        scores = proof.score_rows(model, inputs)
        assert [bool(row.all()) for row in scores.hit] == [True, False, False, False] and scores.exact == 0.25
        assert scores.hit[0].shape == (stop - 4 + 1,) and scores.part(slice(-1)).hit[3].all() == (len(fill) > 1)
    assert matched >= 3


def test_causal_exact_matches_are_what_generate_writes():
    model, ids = loud_model(tiny_config()), some_ids(0, 8)
    written = model.generate(torch.tensor([ids]), max_new_tokens=3, min_new_tokens=3, do_sample=False)[0].tolist()
    other = [*written[:-1], FIRST_WORD + (written[-1] == FIRST_WORD)]
    scores = proof.score_rows(model, [proof.causal_row(row, 8, 11) for row in (written, other)])
    assert len(written) == 11 and scores.exact == 0.5 and scores.hit[0].all()


def test_blanks_stand_in_the_middle_half_among_others_as_in_training():
    rows = [list(range(64))] * 3000
    blanks = proof.draw_blanks(rows, 0.3, seed=0)
    places = np.array([(blank.start, blank.stop) for blank in blanks])
    assert places.min() == 16 and places.max() == 48
    lengths = np.concatenate([blank.spans[:, 1] - blank.spans[:, 0] for blank in blanks])
    assert lengths.min() == 1 and lengths.mean() == pytest.approx(3 / (1 - math.exp(-3)), rel=0.05)
    covered = [int((blank.spans[:, 1] - blank.spans[:, 0]).sum()) for blank in blanks]
    # Spans are drawn until they cover so much; the last one goes beyond.
    assert 0.3 * 64 <= statistics.mean(covered) < 0.3 * 64 + 3.2
    for blank in blanks[:50]:
        assert sorted(blank.order) == list(range(len(blank.spans)))
        assert blank.spans[blank.order[-1]].tolist() == [blank.start, blank.stop]
    again, other = proof.draw_blanks(rows[:9], 0.3, seed=0), proof.draw_blanks(rows[:9], 0.3, seed=1)
    assert [blank[2:] for blank in again] == [blank[2:] for blank in blanks[:9]] != [blank[2:] for blank in other]


def test_last_words_are_whole_words_of_the_second_quarter():
    tokenizer = small_tokenizer()
    text = (
        'x = 1\nfor line in reader: # the value of each file\n    print("returns")\n    write(number, holds, "abc")\n'
    )
    ids = tokenizer(text)["input_ids"]
    (passage, start), *others = proof.last_words([ids, [ids[0]] * 16], tokenizer)
    assert others == [] and len(ids) // 4 <= start < len(ids) // 2
    assert ids[: len(passage)] == passage
    word, rest = tokenizer.decode(passage[start:]), text[len(tokenizer.decode(passage)) :]
    assert word.strip() in text.replace('"', " ").replace("(", " ").split() and not rest[0].isalpha()
    assert len(word.strip()) >= 4 and not (tokenizer.decode(passage[:start])[-1:].isalpha() and word[0].isalpha())


def test_rows_are_of_one_length_and_nothing_is_read_twice():
    tokenizer = small_tokenizer()
    texts = ["the reader returns value of each file line and writes number to name\n" * 3, "the"]
    rows = proof.cut_rows(texts, tokenizer, 16)
    ids = tokenizer(texts[0])["input_ids"]
    assert len(rows) == len(ids) // 16 > 1 and [token for row in rows for token in row] == ids[: 16 * len(rows)]


@pytest.mark.slow
def test_models_start_from_the_same_weights_and_see_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    tokenizer = small_tokenizer()
    rows = [some_ids(seed, 16) for seed in range(12)]
    seen, weights = {}, {}
    original = proof.Counted.__call__
    for name in proof.MODELS:
        recipe = proof.Recipe(4, 32, 1, 16, 0.3, 10.0, {"output_dir": str(tmp_path), "per_device_train_batch_size": 2})
        seen[name] = []

        def call(self, samples, name=name):
            seen[name].append([sample["input_ids"] for sample in samples])
            return original(self, samples)

        monkeypatch.setattr(proof.Counted, "__call__", call)
        proof.set_seed(3)
        model = proof.build_model(name, tokenizer, recipe)
        weights[name] = {key: value.clone() for key, value in model.state_dict().items()}
        cost = proof.train(model, proof.build_collator(name, tokenizer, 3, 0.3), rows, 3, recipe)
        assert cost["steps"] == 4 and len(seen[name]) >= 4
        assert any(not torch.equal(weights[name][key], value) for key, value in model.state_dict().items())
        if name == "causal":
            assert cost["scored_tokens"] == 4 * 2 * 15
    assert all(batches[:4] == seen["causal"][:4] for batches in seen.values()) and seen["causal"][0] != rows[:2]
    for own in weights.values():
        assert own.keys() == weights["causal"].keys()
        assert all(torch.equal(own[key], value) for key, value in weights["causal"].items())


def test_all_models_have_as_many_parameters_as_the_page_says():
    texts = ["def abc(x):\n    return x + ghi[0]\n" * 40]
    tokenizer = MiniLLMTokenizer.train_from_iterator(texts, vocab_size=272, show_progress=False)
    page = (SCRIPT.parents[1] / "docs" / "infilling.md").read_text("utf-8")
    recipe = proof.Recipe(6000, 64, 2, 64, 0.3, 10.0, {})
    counts = {proof.build_model(name, tokenizer, recipe).num_parameters() for name in proof.MODELS}
    assert [f"{count:,} parameters" in " ".join(page.split()) for count in counts] == [True]


@pytest.mark.slow
def test_the_script_runs_and_leaves_figures_and_a_picture(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=12)
    options = "--steps 3 --seeds 2 --hidden-size 32 --layers 1 --length 32 --vocab-size 300 --batch-size 4".split()
    command = [sys.executable, SCRIPT, "--out", "out", "--corpus", corpus, *options, "--held-out", "24"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*") if "corpus" not in str(path)) == [
        "glm-proof.png",
        "out",
        "results.json",
    ]
    assert (tmp_path / "out" / "glm-proof.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["settings"]["steps"] == 3 and results["settings"]["corpus"] == str(corpus)
    assert results["rows"]["held_out"] == 24 and results["environment"]["threads"] >= 1
    assert list(results["seeds"]) == ["0", "1"]
    for run in results["seeds"].values():
        assert set(run) == set(proof.MODELS) == set(results["summary"])
        assert len({figures["parameters"] for figures in run.values()}) == 1
        assert run["causal"]["scored_tokens"] == 3 * 4 * 31 > run["glm_blanks"]["scored_tokens"] > 0
        assert run["glm_document"]["scored_tokens"] >= 3 * 4 * 17
        for figures in run.values():
            for name, value in figures.items():
                if "perplexity" in name:
                    assert 1 < value < 10_000, name
                elif "exact" in name:
                    count = results["rows"]["with_last_word" if "word" in name else "held_out"]
                    assert 0 <= value <= 1, name
                    assert name.startswith("single") or value * count == pytest.approx(round(value * count))
    for name, figures in results["summary"].items():
        for figure, summary in figures.items():
            values = [run[name][figure] for run in results["seeds"].values()]
            assert summary["mean"] == pytest.approx(sum(values) / 2)
            assert summary["std"] == pytest.approx(statistics.stdev(values))
    varied = [summary["std"] for figures in results["summary"].values() for summary in figures.values()]
    assert sum(deviation > 0 for deviation in varied) > 10


def test_a_corpus_that_leaves_nothing_to_measure_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=3)
    with pytest.raises(proof.typer.BadParameter, match="0 last words and 0 blanks of one token: a larger --corpus"):
        proof.main(out=tmp_path / "out", corpus=corpus, length=4096)
    assert not (tmp_path / "out").exists()
