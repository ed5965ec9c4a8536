"""Items from files, and the prompts that they become, written out."""

import json
import random

import pytest
from cli_cases import small_tokenizer
from evaluation_cases import OPEN_ITEM, item_records, items

from minillm.evaluation.items import ItemSettings, Prompter, cyclic_orders, parse_item, read_items

SKY = {"question": "What is blue?", "options": ["grass", "the sky", "天空"], "answer": 1, "group": "nature"}


def prompter(records, **settings):
    asked = [parse_item(record, number, "item") for number, record in enumerate(records, 1)]
    return Prompter(small_tokenizer(), asked, ItemSettings(**settings))


def test_items_are_read_from_lines(tmp_path):
    path = tmp_path / "items.jsonl"
    records = [SKY, {**OPEN_ITEM, "id": 7}, {**SKY, "question": "a\u2028b", "answers": ["sky", "the sky"]}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n\n".join(lines), "utf-8-sig")
    first, second, third = read_items(path)
    assert first == (1, "What is blue?", ("grass", "the sky", "天空"), 1, ("the sky",), "nature")
    assert second == (3, "What is 2 plus 2?", (), None, ("4", "four"), "a")
    assert third.question == "a\u2028b" and third.answers == ("the sky", "sky") and third.number == 5
    assert first.answer_text == "the sky" and second.answer_text == "4"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("[1]", r"line 2 holds \[1\]"),
        ("{", "line 2 is no JSON"),
        ({"prompt": "a"}, r"line 2: `question` must be a text, not None \(keys: prompt\)"),
        ({**SKY, "question": " "}, "line 2: `question` must be a text"),
        ({"question": "a"}, "line 2 has neither `options` with `answer` nor `answers`"),
        ({"question": "a", "answer": 0}, "there are no `options`"),
        ({**SKY, "options": "ab"}, "line 2: `options` must be a list"),
        ({**SKY, "options": ["a", ""]}, "line 2: `options` holds ''"),
        ({**SKY, "options": []}, "`options` holds 0; at least 2"),
        ({**SKY, "options": ["a"]}, "`options` holds 1; at least 2"),
        ({**SKY, "answer": 3}, "`answer` is 3; it must be the index of an option, 0 to 2"),
        ({**SKY, "answer": -1}, "`answer` is -1"),
        ({**SKY, "answer": True}, "`answer` is True"),
        ({**SKY, "answer": "B"}, "`answer` is 'B'"),
        ({key: value for key, value in SKY.items() if key != "answer"}, "`answer` is None"),
        ({**SKY, "answers": [1]}, "`answers` holds 1"),
        ({**SKY, "group": 1}, "`group` must be a text"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(record, words, tmp_path):
    path = tmp_path / "items.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{json.dumps(SKY)}\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=words):
        read_items(path)


def test_a_file_without_items_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no items"):
        read_items(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 2\)"):
        read_items(tmp_path / "binary.jsonl")


def test_prompts_are_those_of_the_definition():
    made = prompter([SKY])
    assert made.cloze(0) == "Question: What is blue?\nAnswer:"
    assert [made.answer(option) for option in SKY["options"]] == [" grass", " the sky", "天空"]
    assert made.letters(0, [2, 0, 1]) == "Question: What is blue?\n A. 天空\n B. grass\n C. the sky\nAnswer:"
    assert made.answer("A") == " A"
    assert made.bare() == "Answer:"
    assert list(cyclic_orders(3, True)) == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert list(cyclic_orders(3, False)) == [[0, 1, 2]]


def test_shots_stand_before_a_prompt_with_their_answers():
    other = {"question": "最高的山？", "options": ["珠穆朗玛", "泰山"], "answer": 0}
    made = prompter([SKY, other], shots=1)
    assert made.cloze(0) == "Question: 最高的山？\nAnswer:珠穆朗玛\n\nQuestion: What is blue?\nAnswer:"
    assert made.letters(1, [0, 1]) == (
        "Question: What is blue?\n A. grass\n B. the sky\n C. 天空\nAnswer: B\n\n"
        "Question: 最高的山？\n A. 珠穆朗玛\n B. 泰山\nAnswer:"
    )


@pytest.mark.parametrize("seed", [0, 8])
def test_shots_are_drawn_by_seed_and_index_and_never_the_item_itself(seed):
    asked = items()
    made = Prompter(small_tokenizer(), asked, ItemSettings(shots=3, seed=seed))
    for index, item in enumerate(asked):
        others = [other for other in asked if other is not item]
        assert made.shots[index] == random.Random(f"{seed}:{index}").sample(others, 3)


def test_shots_come_from_a_file_of_their_own_but_not_the_item_itself():
    shown = [parse_item(record, number, "item") for number, record in enumerate([SKY, *item_records()[:2]])]
    made = prompter([SKY, OPEN_ITEM], shots=2, shot_items=shown)
    assert {shot.question for shot in made.shots[0]} == {record["question"] for record in item_records()[:2]}
    assert len(made.shots[1]) == 2
    with pytest.raises(ValueError, match="item 1: 3 shots are asked for, but 2 others are there"):
        prompter([SKY], shots=3, shot_items=shown)
    # Letters cannot be shown with an item that has no options.
    with pytest.raises(ValueError, match="item 1: 1 shots are asked for, but 0 others are there"):
        prompter([SKY, OPEN_ITEM], shots=1)


def test_a_template_gets_shots_as_turns():
    made = prompter([SKY, {**SKY, "question": "And green?", "answer": 0}], shots=1, chat_template=True)
    assert made.cloze(0) == (
        "<|user|>Question: And green?\nAnswer:<|assistant|>grass<|endoftext|>"
        "<|user|>Question: What is blue?\nAnswer:<|assistant|>"
    )
    assert made.answer("the sky") == "the sky"
    assert made.letters(1, [1, 0, 2]).endswith(
        "<|user|>Question: And green?\n A. the sky\n B. grass\n C. 天空\nAnswer:<|assistant|>"
    )


def test_no_template_is_refused():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Prompter(tokenizer, items(), ItemSettings(chat_template=True))


@pytest.mark.parametrize("template", [False, True])
def test_strings_of_special_tokens_in_items_are_text(template):
    record = {**SKY, "question": "What is <|endoftext|>?", "options": ["[MASK]", "an end"]}
    made = prompter([record], chat_template=template)
    tokenizer = small_tokenizer()
    ids = made.tokenizer(made.cloze(0) + made.answer("[MASK]"))["input_ids"]
    written = tokenizer.decode(ids)
    assert "What is <|endoftext|>?" in written and written.endswith("[MASK]")
    assert not {tokenizer.eos_token_id, tokenizer.mask_token_id} & set(ids)
    assert template == (tokenizer.convert_tokens_to_ids("<|assistant|>") in ids)


def test_a_slow_tokenizer_would_read_them_and_is_refused():
    class Slow:
        chat_template, all_special_tokens = None, ["<|endoftext|>"]

    asked = [parse_item({**SKY, "question": "What is <|endoftext|>?"}, 1, "item")]
    with pytest.raises(
        ValueError, match=r"an item holds '<\|endoftext\|>', which Slow, no fast tokenizer, would read"
    ):
        Prompter(Slow(), asked, ItemSettings())
    assert Prompter(Slow(), items(count=1), ItemSettings()).cloze(0).startswith("Question: ")
