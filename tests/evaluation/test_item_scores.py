"""Every way of scoring items against the definitions, written as loops of single forwards in float64."""

import pytest
import torch
from evaluation_cases import (
    GLM,
    OPEN_ITEM,
    evaluated_model,
    items,
    naive_answer,
    naive_log_likelihood,
    naive_option_scores,
    split_at,
)

from minillm.evaluation.item_scores import LIKELIHOODS, WRITTEN, score_items
from minillm.evaluation.items import LETTERS, ItemSettings, Prompter, parse_item
from minillm.evaluation.written_answers import judge_answer

ONLY = {way: {"ways": (way,)} for way in ("likelihood", "letters", "generation")}


def close(found, expected):
    assert set(found) == set(expected)
    for way in expected:
        assert found[way] == pytest.approx(expected[way], rel=1e-9), way


@pytest.mark.parametrize("variant", ["causal", "prefix", "prefix-alibi"])
def test_likelihoods_equal_single_forwards(variant):
    model, tokenizer = evaluated_model(variant)
    asked = [*items(count=4), parse_item(OPEN_ITEM, 6, "item")]
    scores = score_items(model, tokenizer, asked, ItemSettings(**ONLY["likelihood"]), batch_size=5)
    for index, item in enumerate(asked[:-1]):
        expected = naive_option_scores(model, tokenizer, f"Question: {item.question}\nAnswer:", item.options)
        close({way: scores.options[way][index] for way in LIKELIHOODS}, expected)
        for way, own in expected.items():
            assert scores.chosen(way)[index] == max(range(len(own)), key=own.__getitem__)
            assert scores.correct(way)[index] == (scores.chosen(way)[index] == item.answer)
        assert scores.gold_nats[index] == pytest.approx(-expected["sum"][item.answer])
    assert {scores.correct(way)[-1] for way in LIKELIHOODS} == {None} and scores.gold_nats[-1] is None
    assert scores.ways == list(LIKELIHOODS)


@pytest.mark.parametrize("template", [False, True], ids=["plain", "template"])
@pytest.mark.parametrize("variant", ["causal", "prefix"])
def test_shots_and_templates_change_the_prompt_alone(variant, template):
    model, tokenizer = evaluated_model(variant)
    asked = items(count=3)
    settings = ItemSettings(shots=2, seed=1, chat_template=template, **ONLY["likelihood"])
    scores = score_items(model, tokenizer, asked, settings)
    made = Prompter(tokenizer, asked, settings)
    for index, item in enumerate(asked):
        for option, score in zip(item.options, scores.options["sum"][index], strict=True):
            context, ids = split_at(tokenizer, made.cloze(index), made.answer(option))
            assert score == pytest.approx(naive_log_likelihood(model, context, ids), rel=1e-9)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("variant", ["causal", "prefix"])
def test_letters_equal_single_forwards(variant, rotate):
    model, tokenizer = evaluated_model(variant)
    asked = items(count=3)
    scores = score_items(model, tokenizer, asked, ItemSettings(rotate=rotate, **ONLY["letters"]))
    for index, item in enumerate(asked):
        count = len(item.options)
        totals, chosen = [0.0] * count, []
        for turn in range(count if rotate else 1):
            order = [*range(turn, count), *range(turn)]
            lines = "".join(f" {LETTERS[place]}. {item.options[order[place]]}\n" for place in range(count))
            prompt = f"Question: {item.question}\n{lines}Answer:"
            own = [
                naive_log_likelihood(model, *split_at(tokenizer, prompt, f" {LETTERS[place]}"))
                for place in range(count)
            ]
            chosen.append(own.index(max(own)))
            for place in range(count):
                totals[order[place]] += own[place] / (count if rotate else 1)
        assert scores.options["letters"][index] == pytest.approx(totals, rel=1e-9)
        assert scores.letters[index] == chosen


@pytest.mark.parametrize("variant", ["causal", "prefix", "alibi"])
def test_generated_answers_equal_a_loop(variant):
    model, tokenizer = evaluated_model(variant)
    asked = [*items(count=3), parse_item(OPEN_ITEM, 9, "item")]
    scores = score_items(model, tokenizer, asked, ItemSettings(max_new_tokens=8, **ONLY["generation"]), batch_size=3)
    for item, verdict in zip(asked, scores.verdicts, strict=True):
        text = naive_answer(model, tokenizer, f"Question: {item.question}\nAnswer:", new_tokens=8)
        assert verdict == judge_answer(item, text)
    assert scores.ways == list(WRITTEN) and scores.gold_nats is None


def test_an_answer_ends_with_its_line():
    """Weights that write one token over and over, but an end of line where a full stop was."""
    model, tokenizer = evaluated_model()
    stop, line, word = (tokenizer(text)["input_ids"][-1] for text in (".", "\n", "x"))
    follows = {word: stop, stop: line, line: word}
    counted = []

    def written(module, arguments, inputs, output):
        counted.append(inputs["input_ids"].shape)
        output.logits = torch.full_like(output.logits, -9.0)
        for row, token in enumerate(inputs["input_ids"][:, -1].tolist()):
            output.logits[row, -1, follows.get(token, word)] = 9.0

    model.register_forward_hook(written, with_kwargs=True)
    asked = items(count=2)
    scores = score_items(model, tokenizer, asked, ItemSettings(**ONLY["generation"]))
    assert [verdict.text for verdict in scores.verdicts] == ["x."] * len(asked)
    assert len(counted) == 3


@pytest.mark.parametrize("variant", GLM)
def test_with_blanks_answers_are_what_fills_them(variant):
    model, tokenizer = evaluated_model(variant)
    asked = items(count=3)
    scores = score_items(model, tokenizer, asked, ItemSettings(max_new_tokens=6), batch_size=4)
    for index, item in enumerate(asked):
        prompt = f"Question: {item.question}\nAnswer:"
        for option, *found in zip(item.options, *(scores.options[way][index] for way in LIKELIHOODS), strict=True):
            total, bare, alone = (
                glm_log_likelihood(model, tokenizer, text, option) for text in (f"{prompt} ", "Answer: ", "")
            )
            count = len(tokenizer(option)["input_ids"]) + 1
            sizes = (count, len(option), len(option.encode()))
            expected = [total, *(total / size for size in sizes), total - bare, total - alone]
            # `score_fills` sums in float32.
            assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)
        fills = model.fill(f"{prompt} [MASK]", tokenizer, max_new_tokens=6, do_sample=False).fills[0][0]
        assert scores.verdicts[index] == judge_answer(item, fills.split("\n")[0])
    letters = scores.options["letters"][0]
    lines = "".join(f" {LETTERS[place]}. {option}\n" for place, option in enumerate(asked[0].options))
    prompt = f"Question: {asked[0].question}\n{lines}Answer: "
    assert letters == pytest.approx(
        [glm_log_likelihood(model, tokenizer, prompt, LETTERS[place]) for place in range(len(letters))], rel=2e-5
    )


def glm_log_likelihood(model, tokenizer, before, fill):
    """A forward for each token of a fill and the one that ends it; the blank stands last."""
    context = [*tokenizer(before)["input_ids"], tokenizer.mask_token_id]
    row, total = [*context, tokenizer.sop_token_id], 0.0
    for token in [*tokenizer(fill)["input_ids"], tokenizer.eop_token_id]:
        steps = len(row) - len(context)
        inputs = {
            "position_ids": [*range(len(context)), *[len(context) - 1] * steps],
            "block_position_ids": [0] * len(context) + [*range(1, steps + 1)],
            "prefix_mask": [1] * len(context) + [0] * steps,
        }
        inputs = {name: torch.tensor([values]) for name, values in inputs.items()}
        with torch.no_grad():
            total += model(torch.tensor([row]), **inputs).logits[0, -1].log_softmax(-1)[token].item()
        row.append(token)
    return total


def test_with_one_axis_blanks_are_asked_for():
    model, tokenizer = evaluated_model("prefix")
    asked = items(count=2)
    plain = score_items(model, tokenizer, asked, ItemSettings(**ONLY["likelihood"]))
    filled = score_items(model, tokenizer, asked, ItemSettings(glm=True, **ONLY["likelihood"]))
    text = f"Question: {asked[0].question}\nAnswer: [MASK]"
    expected = model.score_fills(text, list(asked[0].options), tokenizer)[0].tolist()
    assert filled.options["sum"][0] == pytest.approx(expected)
    assert plain.options["sum"][0] != pytest.approx(expected)


def test_the_first_of_equal_options_is_chosen_and_counted():
    model, tokenizer = evaluated_model()
    asked = [parse_item({"question": "a", "options": ["list", "name", "list"], "answer": 2}, 1, "item")]
    asked += [parse_item({"question": "a", "options": ["list", "list"], "answer": 0}, 2, "item")]
    scores = score_items(model, tokenizer, asked, ItemSettings(**ONLY["likelihood"]))
    assert scores.chosen("sum")[1] == 0 and scores.correct("sum")[1]
    assert scores.ties("sum") == 1 + (scores.chosen("sum")[0] == 0)
    assert scores.chosen("sum")[0] in (0, 1)


def test_unparsed_answers_are_wrong_and_counted(monkeypatch):
    model, tokenizer = evaluated_model()
    monkeypatch.setattr("minillm.evaluation.continuations.Reader.write", lambda self, *_: ["", "no idea", "it is 4"])
    asked = [
        parse_item({"question": "a", "options": ["4", "5"], "answer": 0}, 1, "item"),
        parse_item({"question": "b", "options": ["4", "5"], "answer": 0}, 2, "item"),
        parse_item(OPEN_ITEM | {"answers": ["4"]}, 3, "item"),
    ]
    scores = score_items(model, tokenizer, asked, ItemSettings(**ONLY["generation"]))
    assert [scores.unparsed(way) for way in WRITTEN] == [1, 1, 2, 2]
    assert scores.correct("choice") == [False, False, None] and scores.chosen("choice") == [None] * 3
    assert scores.correct("number") == [False, False, True]
    assert scores.correct("exact") == [False] * 3 and scores.correct("contains") == [False, False, True]


@pytest.mark.parametrize("way", ["likelihood", "letters", "generation"])
@pytest.mark.parametrize("variant", ["causal", "glm_2d-prefix"])
def test_items_that_do_not_fit_are_refused_by_number_before_any_forward(way, variant, monkeypatch):
    model, tokenizer = evaluated_model(variant)
    monkeypatch.setattr(type(model), "forward", None)
    asked = items(count=4)
    long = parse_item({"question": "word " * 300, "options": ["a", "b"], "answer": 0}, 77, "item")
    with pytest.raises(
        ValueError, match=r"longer than the model's 400 tokens \(up to \d+\): items 77; nothing is cut"
    ):
        score_items(model, tokenizer, [*asked, long], ItemSettings(**ONLY[way]))
    with pytest.raises(ValueError, match=r"longer than the model's 9 tokens .*: items 1, 2, 3, 4"):
        score_items(model, tokenizer, asked, ItemSettings(**ONLY[way]), max_length=9)


def test_an_item_of_just_the_length_is_scored():
    model, tokenizer = evaluated_model()
    (item,) = items(count=1)[:1]
    longest = max(
        sum(map(len, split_at(tokenizer, f"Question: {item.question}\nAnswer:", f" {option}")))
        for option in item.options
    )
    settings = ItemSettings(**ONLY["likelihood"])
    score_items(model, tokenizer, [item], settings, max_length=longest - 1)
    with pytest.raises(ValueError, match="items 1;"):
        score_items(model, tokenizer, [item], settings, max_length=longest - 2)


def test_what_cannot_be_scored_is_refused():
    model, tokenizer = evaluated_model()
    asked = items(count=2)
    with pytest.raises(ValueError, match="there are no items"):
        score_items(model, tokenizer, [])
    with pytest.raises(ValueError, match="unknown way 'guess'"):
        score_items(model, tokenizer, asked, ItemSettings(ways=("guess",)))
    with pytest.raises(ValueError, match="by generation only"):
        score_items(model, tokenizer, [parse_item(OPEN_ITEM, 1, "item")], ItemSettings(**ONLY["letters"]))
    many = parse_item({"question": "a", "options": [*"abcdefghijklmnopqrstuvwxyz0"], "answer": 0}, 4, "item")
    with pytest.raises(ValueError, match="item 4 has 27 options, more than there are letters"):
        score_items(model, tokenizer, [many])
    with pytest.raises(ValueError, match="only a MiniLLM"):
        score_items(model, tokenizer, asked, ItemSettings(glm=True))
    with pytest.raises(ValueError, match="both must be at least 1"):
        score_items(model, tokenizer, asked, batch_size=0)
    with pytest.raises(ValueError, match='attention_type="bidirectional"'):
        score_items(evaluated_model(attention_type="bidirectional")[0], tokenizer, asked)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"the model's loss is nan in item [1-3]"):
        score_items(model, tokenizer, asked)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        score_items(model, tokenizer, asked)
