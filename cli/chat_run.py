"""`minillm chat`: a conversation with a model, answered as the tokens come."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from transformers import Cache, set_seed
from transformers.generation.streamers import BaseStreamer

from minillm.cache import CACHE_NAME
from minillm.cli.console import say, warn
from minillm.cli.loading import best_device, load_model, load_tokenizer
from minillm.publishing.folders import write_atomically
from minillm.tokenization.literal_text import apply_template_literally
from minillm.training.put_back import random_states_kept

HELP = """\
/reset           forget the conversation, keep the system prompt
/system [TEXT]   set the system prompt and forget the conversation; without a text: none
/undo            take the last question and its answer back
/retry           answer the last question again
/history         show the conversation
/save FILE       write it as a line of JSON, {"messages": [...]}, which `minillm train` reads
/help            show this
/exit            end (so does the end of the input)
A line that ends with \\ goes on in the next one. Ctrl-C ends an answer."""


class ChatOptions(NamedTuple):
    """How answers are chosen; what is None is as the model's generation config says.

    Attributes:
        system: system prompt.
        chat_template: a file with a Jinja template; None for the tokenizer's own.
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy; above it, tokens are drawn.
        top_p, top_k, repetition_penalty: as in `generate()`.
        seed: of the draws.
        special_tokens: read the strings of special tokens in messages as tokens.
    """

    system: str | None = None
    chat_template: Path | None = None
    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    special_tokens: bool = False

    def generation(self) -> dict[str, Any]:
        """The keywords of `generate()`.

        Raises:
            ValueError: `top_p` or `top_k` beside a temperature of 0.
        """
        names = ("top_p", "top_k", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.temperature == 0.0:
            for name in ("top_p", "top_k"):
                if name in given:
                    flag = name.replace("_", "-")
                    raise ValueError(f"--{flag} {given[name]} needs sampling: set --temperature above 0")
            # What only sampling reads is put aside, or generate() would warn of it.
            return {**given, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        if self.temperature is not None:
            given |= {"do_sample": True, "temperature": self.temperature}
        elif "top_p" in given or "top_k" in given:
            given |= {"do_sample": True}
        return given


class NewText(BaseStreamer):
    """Hands on the text of an answer piece by piece; all pieces together are the decoded answer.

    Args:
        decode: ids to text.
        write: takes each piece.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], None]) -> None:
        self.decode, self.write = decode, write
        self.ids: list[int] = []
        self.text, self.prompt_is_next = "", True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        self.ids += value.flatten().tolist()
        text = self.decode(self.ids)
        # Half a character is one of these until its other bytes are there.
        if not text.endswith("\ufffd"):
            self.hand_on(text)

    def end(self) -> None:
        text = self.decode(self.ids)
        if not text.startswith(self.text):
            self.write("\n")
            self.text = ""
        self.hand_on(text)

    def hand_on(self, text: str) -> None:
        # Some decoders take a blank back when the next token comes: it is waited for.
        if text.startswith(self.text):
            new, self.text = text[len(self.text) :], text
            self.write(new)


class Conversation:
    """A conversation with a model, with the cache of what was read so far.

    Attributes:
        messages: `{"role": ..., "content": ...}` each.
        dropped: how many messages were left out of the last prompt, since all were longer than the model reads.
    """

    def __init__(self, model: Any, tokenizer: Any, options: ChatOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.generation = {"pad_token_id": tokenizer.pad_token_id or 0, **options.generation()}
        template = options.chat_template
        self.template = None if template is None else template.read_text("utf-8")
        if self.template is None and tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template: give one with --chat-template FILE, or continue a text with "
                "`minillm generate`"
            )
        self.system = options.system
        self.messages: list[dict[str, str]] = []
        self.dropped = 0
        self.forget_cache()
        self.reset()

    def reset(self) -> None:
        """Forgets all messages but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.forget_cache()

    def forget_cache(self) -> None:
        self.cache: Cache | None = None
        self.cached: list[int] = []

    def take_back(self) -> str | None:
        """Removes the last question and its answer; returns the question, or None if there is none."""
        while self.messages and self.messages[-1]["role"] != "user":
            if self.messages[-1]["role"] == "system":
                return None
            self.messages.pop()
        return self.messages.pop()["content"] if self.messages else None

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Asks `text` and returns the answer, which is handed to `write` piece by piece as it comes.

        An answer that is interrupted (Ctrl-C) is kept as far as it came.

        Raises:
            ValueError: the template refuses the messages, or the question alone is longer than the model reads.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.prompt()
        except Exception:
            self.messages.pop()
            raise
        self.keep_common(ids)
        streamer = NewText(lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True), write)
        inputs = torch.tensor([ids], device=self.model.device)  # [1, tokens]
        try:
            found = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.options.max_new_tokens,
                streamer=streamer,
                return_dict_in_generate=True,
                **{CACHE_NAME: self.cache, **self.generation},
            )
            # The last token was not read yet.
            self.cache, self.cached = getattr(found, CACHE_NAME), found.sequences[0, :-1].tolist()
        except KeyboardInterrupt:
            # The cache may have been left in the middle of a step.
            streamer.end()
            self.forget_cache()
        except BaseException:
            self.messages.pop()
            self.forget_cache()
            raise
        self.messages.append({"role": "assistant", "content": streamer.text})
        return streamer.text

    def prompt(self) -> list[int]:
        """The ids of the conversation; its oldest turns are left out where it is longer than the model reads."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        most = getattr(self.model.config, "max_position_embeddings", None)
        self.dropped = 0
        while True:
            messages = [*self.messages[:first], *self.messages[first + self.dropped :]]
            ids = self.read(messages)
            if most is None or len(ids) + min(self.options.max_new_tokens, most // 2) <= most:
                return ids
            if len(messages) - first <= 1:
                raise ValueError(
                    f"the question has {len(ids)} tokens with what the template adds; the model reads {most} "
                    f"(max_position_embeddings), and --max-new-tokens is {self.options.max_new_tokens}"
                )
            # A question and its answer; never the question that is to be answered.
            self.dropped += min(2, len(messages) - first - 1)

    def read(self, messages: list[dict[str, str]]) -> list[int]:
        return apply_template_literally(
            self.tokenizer,
            messages,
            chat_template=self.template,
            add_generation_prompt=True,
            return_dict=False,
            special_tokens_in_content=self.options.special_tokens,
        )

    def keep_common(self, ids: list[int]) -> None:
        """Leaves in the cache what the prompt `ids` begins with, or nothing where more must be read again."""
        if self.cache is None:
            return
        common = 0
        # At least one token must be new.
        for old, new in zip(self.cached, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        if not reads_by_turns(self.model.config, ids) or common < least_kept(self.model.config, self.cached):
            self.forget_cache()
        elif common < len(self.cached):
            self.cache.crop(common - len(self.cached))
            self.cached = self.cached[:common]


def reads_by_turns(config: Any, ids: list[int]) -> bool:
    """Whether the states of earlier turns are those that reading the whole conversation `ids` would give."""
    if getattr(config, "attention_type", "causal") != "prefix" or not config.prompt_is_prefix:
        return True
    # A prompt that goes on is another prefix, unless a token tells where each answer begins; a blank to fill too.
    return config.answer_start_token_id is not None and config.sop_token_id not in ids


def least_kept(config: Any, cached: list[int]) -> int:
    """How many cached tokens must stay for any to: a prefix was read in both directions, so it stays whole or goes,
    and what a window dropped cannot be brought back."""
    is_prefix = getattr(config, "attention_type", "causal") == "prefix"
    return len(cached) if is_prefix or getattr(config, "sliding_window", None) is not None else 0


@random_states_kept()
def run(model_name: str, options: ChatOptions) -> None:
    """Reads questions from the standard input, answers each, and obeys lines that begin with `/`.

    Raises:
        ValueError: no model or tokenizer at the given place, no chat template, contradicting options.
    """
    options.generation()
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, allow_adapter=True).to(best_device()).eval()
    set_seed(options.seed)
    conversation = Conversation(model, tokenizer, options)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        allow_editing()
        say(f"{model_name}: ask, or /help")
    for line in lines(is_terminal):
        if line.startswith("/"):
            line = obey(conversation, line)
            if line is None:
                return
        if line:
            reply(conversation, line)


def lines(is_terminal: bool) -> Iterator[str]:
    """What is asked, one after the other; a line that ends with a backslash goes on in the next."""
    parts: list[str] = []
    while True:
        try:
            part = input(("... " if parts else "> ") if is_terminal else "")
        except EOFError:
            if parts:
                yield "\n".join(parts)
            if is_terminal:
                typer.echo()
            return
        if part.endswith("\\"):
            parts.append(part[:-1])
            continue
        text, parts = "\n".join([*parts, part]), []
        if text.strip():
            yield text


def reply(conversation: Conversation, text: str) -> None:
    """Prints the answer to a question as it comes; what is wrong with a question ends no conversation."""

    def write(piece: str) -> None:
        # Not through rich, which would expand tabs and drop control characters.
        typer.echo(piece, nl=False)
        sys.stdout.flush()

    try:
        conversation.answer(text, write)
    except ValueError as error:
        warn(error)
        return
    typer.echo()
    if conversation.dropped:
        warn(f"the oldest {conversation.dropped} messages were left out: all are longer than the model reads")


def obey(conversation: Conversation, line: str) -> str | None:
    """Does what a line that begins with `/` asks for; returns a question to answer, an empty text, or None to end."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/exit", "/quit"):
        return None
    if command == "/help":
        typer.echo(HELP)
    elif command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest or None
        conversation.reset()
    elif command in ("/undo", "/retry"):
        question = conversation.take_back()
        if question is None:
            warn("there is no question yet")
        return question or "" if command == "/retry" else ""
    elif command == "/history":
        for message in conversation.messages:
            typer.echo(f"{message['role']}: {message['content']}")
    elif command == "/save":
        save(conversation, rest)
    else:
        warn(f"{command} is no command; /help lists them (a question that begins with / needs a blank before it)")
    return ""


def save(conversation: Conversation, name: str) -> None:
    if not name:
        warn("/save needs the name of a file")
    elif Path(name).exists():
        warn(f"{name} exists: choose another name")
    else:
        try:
            write_atomically(Path(name), json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            warn(error)


def allow_editing() -> None:
    """Arrow keys move in the line and bring earlier ones back, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
