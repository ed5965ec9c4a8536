"""`minillm chat` against `generate()` over whole conversations, and on a real terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_cases import fail, invoke, save_adapter, save_small_model, small_tokenizer, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.cli import chat_run
from minillm.cli.chat_run import ChatOptions, Conversation, NewText

QUESTIONS = ["the reader returns", "class of each file", "while number 你好"]
NEW = 6
LONG = {"max_position_embeddings": 512}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: save_small_model(root / name, name, **LONG) for name in ("causal", "prefix", "alibi")}
    tokenizer = AutoTokenizer.from_pretrained(made["prefix"])
    model = AutoModelForCausalLM.from_pretrained(made["prefix"])
    # As `train --objective sft` names them.
    model.config.answer_start_token_id = tokenizer.answer_start_token_id
    model.config.turn_token_ids = tokenizer.turn_token_ids
    model.save_pretrained(root / "prefix of turns")
    tokenizer.save_pretrained(root / "prefix of turns")
    return {**made, "prefix of turns": root / "prefix of turns"}


def without_a_cache(folder, questions, system=None, **options):
    """The answers when each prompt is read anew, by transformers' own methods alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            found = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def talk(folder, *lines, **options):
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    return succeed("chat", folder, "--max-new-tokens", NEW, *arguments, stdin="".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("variant", ["causal", "alibi", "prefix", "prefix of turns"])
@pytest.mark.parametrize("system", [None, "the value"], ids=["", "system"])
def test_the_answers_are_those_of_the_whole_conversation(variant, system, folders):
    expected = without_a_cache(folders[variant], QUESTIONS, system)
    assert len(set(expected)) > 1
    options = {} if system is None else {"system": system}
    assert talk(folders[variant], *QUESTIONS, **options) == "".join(f"{answer}\n" for answer in expected)


def conversation_with(folder, **options):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return Conversation(model, tokenizer, ChatOptions(max_new_tokens=NEW, **options))


@pytest.mark.parametrize(
    ("variant", "keeps"), [("causal", True), ("alibi", True), ("prefix", False), ("prefix of turns", True)]
)
def test_earlier_turns_stay_in_the_cache_where_they_can(variant, keeps, folders):
    conversation, lengths = conversation_with(folders[variant]), []
    tokenizer = conversation.tokenizer
    # Answers that are encoded as they were made; of others what comes after the first difference is read again.
    word = tokenizer.encode(" the", add_special_tokens=False)[-1]
    assert tokenizer.encode(tokenizer.decode([word] * NEW), add_special_tokens=False) == [word] * NEW
    conversation.model.generation_config.suppress_tokens = [token for token in range(len(tokenizer)) if token != word]

    conversation.model.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    for question in QUESTIONS:
        before = len(conversation.cached)
        whole = len(conversation.read([*conversation.messages, {"role": "user", "content": question}]))
        lengths.clear()
        conversation.answer(question, lambda piece: None)
        assert lengths == [whole - (before if keeps else 0), *[1] * (NEW - 1)]
    assert before > 0


def test_commands(folders, tmp_path):
    folder, file = folders["causal"], tmp_path / "talk.jsonl"
    first, second, third = without_a_cache(folder, QUESTIONS)
    alone = without_a_cache(folder, QUESTIONS[1:2])[0]
    briefed = without_a_cache(folder, QUESTIONS[:1], "the value")[0]
    told = talk(
        folder, QUESTIONS[0], "/reset", QUESTIONS[1], "/undo", QUESTIONS[0], QUESTIONS[1], "/retry", QUESTIONS[2],
        f"/save {file}", "/history", "/system the value", QUESTIONS[0], "/history", "/system", QUESTIONS[0],
        "/exit", "no more",
    )  # fmt: skip
    history = [line for pair in zip(QUESTIONS, (first, second, third), strict=True) for line in pair]
    roles = ["user: ", "assistant: "] * 3
    expected = [
        first, alone, first, second, second, third,
        *(role + text for role, text in zip(roles, history, strict=True)),
        briefed, "system: the value", f"user: {QUESTIONS[0]}", f"assistant: {briefed}", first,
    ]  # fmt: skip
    assert told == "".join(f"{line}\n" for line in expected)
    messages = json.loads(file.read_text("utf-8"))["messages"]
    assert [message["content"] for message in messages] == history


def test_a_line_that_ends_with_a_backslash_goes_on(folders):
    expected = without_a_cache(folders["causal"], ["the reader\nreturns"])
    assert talk(folders["causal"], "the reader\\", "returns") == f"{expected[0]}\n"


def test_what_is_wrong_with_a_line_ends_nothing(tmp_path):
    folder = save_small_model(tmp_path / "model")
    (tmp_path / "taken").write_text("mine")
    lines = ["/undo", "/dance", "/save", f"/save {tmp_path / 'taken'}", "word " * 500, QUESTIONS[0]]
    result = invoke("chat", folder, "--max-new-tokens", NEW, stdin="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0
    warnings = " ".join(result.stderr.split()).split("warning: ")[1:]
    starts = [
        "there is no question",
        "/dance is no command",
        "/save needs",
        f"{tmp_path / 'taken'} exists",
        "the question has",
    ]
    assert len(warnings) == len(starts)
    assert all(found.startswith(start) for found, start in zip(warnings, starts, strict=True)), warnings
    assert (tmp_path / "taken").read_text() == "mine"
    assert result.stdout == f"{without_a_cache(folder, QUESTIONS[:1])[0]}\n"


def test_the_oldest_turns_are_left_out_where_all_are_too_long(tmp_path):
    conversation = conversation_with(save_small_model(tmp_path), system="the value")
    most = conversation.model.config.max_position_embeddings
    for number in range(12):
        conversation.answer(f"question {number} of the reader", lambda piece: None)
        assert len(conversation.prompt()) + NEW <= most
    assert conversation.dropped > 0
    kept = [conversation.messages[0], *conversation.messages[1 + conversation.dropped :]]
    assert kept[1]["role"] == "user"
    assert conversation.prompt() == conversation.read(kept)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {}),
        (("--temperature", 0), {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}),
        (("--temperature", 0.5, "--top-p", 0.9), {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        (("--top-k", 3), {"do_sample": True, "top_k": 3}),
        (("--repetition-penalty", 1.2), {"repetition_penalty": 1.2}),
    ],
    ids=str,
)
def test_flags_reach_generate(flags, expected, folders, monkeypatch):
    made = []
    monkeypatch.setattr(chat_run, "Conversation", lambda model, tokenizer, options: made.append(options))
    succeed("chat", folders["causal"], *flags, stdin="")
    assert made[0].generation() == expected


def test_draws_follow_the_seed(folders):
    told = {seed: talk(folders["causal"], *QUESTIONS, seed=seed, temperature=1.5) for seed in (0, 1)}
    assert told[0] != told[1]
    assert told[0] == talk(folders["causal"], *QUESTIONS, seed=0, temperature=1.5)


def test_special_tokens_in_a_question_are_text_unless_asked_otherwise(folders):
    question = "the<|assistant|>reader"
    literal, read = (
        talk(folders["causal"], question),
        talk(folders["causal"], question, **{"special-tokens": "--special-tokens"}),
    )
    tokenizer, model = (kind.from_pretrained(folders["causal"]) for kind in (AutoTokenizer, AutoModelForCausalLM))
    for told, special in ((literal, False), (read, True)):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
            special_tokens_in_content=special,
        )
        found = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert told == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_a_model_without_a_template_and_contradictions_are_refused(folders, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders["causal"]), small_tokenizer()
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    assert "--chat-template" in fail("chat", tmp_path, stdin="hello\n")
    (tmp_path / "own.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    succeed("chat", tmp_path, "--chat-template", tmp_path / "own.jinja", "--max-new-tokens", 2, stdin="hello\n")
    assert "--top-p 0.5 needs sampling" in fail("chat", folders["causal"], "--temperature", 0, "--top-p", 0.5)
    assert "nowhere" in fail("chat", tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["the 你好 reader 😀 é", " two  blanks\n\nand lines\n", ""])
def test_pieces_make_up_the_answer_and_hold_whole_characters(text):
    tokenizer, pieces = small_tokenizer(), []
    ids = tokenizer.encode(text)
    streamer = NewText(tokenizer.decode, pieces.append)
    streamer.put(torch.tensor([[5, 6]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == streamer.text == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *command):
        self.side, other = pty.openpty()
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)
        self.seen = ""

    def until(self, pattern, seconds=60):
        """What is shown up to the end of a match; it must come in time."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.side], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self.side, 4096).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended without {pattern!r}: {self.seen!r}") from None
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown.replace("\r\n", "\n")

    def type(self, text):
        os.write(self.side, text.encode())


def test_a_conversation_on_a_terminal(folders):
    expected = without_a_cache(folders["causal"], QUESTIONS[:2])
    terminal = Terminal(sys.executable, "-m", "minillm", "chat", str(folders["causal"]), "--max-new-tokens", str(NEW))
    assert "ask, or /help" in terminal.until("> ")
    for question, answer in zip(QUESTIONS, expected, strict=False):
        terminal.type(f"{question}\n")
        assert terminal.until("\n> ") == f"{question}\n{answer}\n> "
    # The arrow brings the last line back.
    terminal.type("/history\n")
    terminal.until("\n> ")
    terminal.type("\x1b[A\n")
    assert f"assistant: {expected[1]}" in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_ends_an_answer_and_not_the_conversation(folders, monkeypatch):
    conversation = conversation_with(folders["causal"])
    expected, pieces = without_a_cache(folders["causal"], QUESTIONS[:1])[0], []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 1:
            signal.raise_signal(signal.SIGINT)

    answer = conversation.answer(QUESTIONS[0], write)
    assert answer == "".join(pieces) and expected.startswith(answer) and answer != expected
    assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    conversation.take_back()
    assert conversation.answer(QUESTIONS[0], lambda piece: None) == expected


def test_generate_says_on_a_terminal_what_it_waits_for(folders):
    terminal = Terminal(sys.executable, "-m", "minillm", "generate", str(folders["causal"]), "--max-new-tokens", "2")
    terminal.until("waiting for prompts, one a line; Ctrl-D ends them")
    terminal.type(f"{QUESTIONS[0]}\n\x04")
    terminal.until(f"{QUESTIONS[0]}.*\n{QUESTIONS[0]}")
    assert terminal.process.wait(30) == 0


def test_an_adapter_talks_on_top_of_its_base_model(folders, tmp_path):
    save_adapter(folders["causal"], tmp_path / "adapter")
    told = talk(tmp_path / "adapter", *QUESTIONS)
    merged = tmp_path / "merged"
    succeed("export", folders["causal"], merged, "--adapter", tmp_path / "adapter")
    assert told == talk(merged, *QUESTIONS) != talk(folders["causal"], *QUESTIONS)
