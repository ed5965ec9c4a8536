"""What a record means: text, a prompt with its completion, a conversation, or token ids. Its keys tell."""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from minillm.data.containers import CorpusError, Record, read_records
from minillm.data.documents import MASKS, integers

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "function_call",
}
"""Who speaks in a turn of ShareGPT, in the words of chat templates."""


class Text(NamedTuple):
    """A text, all of which is to be learned."""

    text: str


class PromptWithCompletion(NamedTuple):
    """A prompt and the completion that is to be learned, both as they are: no template is applied."""

    prompt: str
    completion: str


class Conversation(NamedTuple):
    """Messages as chat templates take them, and the tools that they may call.

    Attributes:
        messages: mappings with a `role` and mostly a `content`. The user's of Alpaca's records hold `instruction` and
            `input` as well, for a template that puts them apart.
        tools: JSON schemas, or None.
        format: the name of the record's format.
        begins_late: answers at its start that nothing asks for, as ShareGPT's have them, were left out.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    format: str = "messages"
    begins_late: bool = False


class TokenIds(NamedTuple):
    """A sample for the collators: `input_ids` and perhaps `labels`, masks or `prompt_length`."""

    sample: dict[str, Any]


Content = Text | PromptWithCompletion | Conversation | TokenIds


class Example(NamedTuple):
    """What a record means.

    Attributes:
        place: the file and line, as errors name them.
        name: the same relative to the source.
        content: what is to be learned.
        is_file: it is the whole of a text file.
    """

    place: str
    name: str
    content: Content
    is_file: bool = False


def read_examples(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    encoding: str = "utf-8",
) -> Iterator[Example]:
    """What the records of a source mean, one after the other as they are read.

    Args:
        source: a file, a folder or the name of a data set, as `read_records` takes it.
        columns: under which key a field stands, `{"prompt": "question"}`; only formats that have all these fields are
            considered.
        format: a name in `FORMATS`, for records whose keys fit several.
        encoding: of text, JSON and CSV.

    Raises:
        CorpusError: a record that fits no format or several, or is not as its format wants it; a field of `columns` or
            a `format` that there is not; what `read_records` raises. The message names file and line.
        FileNotFoundError, ImportError: as `read_records`.
    """
    columns = dict(columns or {})
    if format is not None and format not in FORMATS:
        raise CorpusError(f"the format {format!r} is unknown: choose one of {', '.join(FORMATS)}")
    fields = set(chain.from_iterable(one.fields for one in FORMATS.values()))
    if unknown := sorted(set(columns) - fields):
        raise CorpusError(f"columns name the fields {unknown}, which no format has; there are {sorted(fields)}")
    chosen = [format] if format else [name for name, one in FORMATS.items() if columns.keys() <= set(one.fields)]
    if not chosen:
        raise CorpusError(f"no format has all of the fields {sorted(columns)} that columns name")
    if format and (foreign := sorted(columns.keys() - set(FORMATS[format].fields))):
        raise CorpusError(f"the format {format} has no fields {foreign}; it has {sorted(FORMATS[format].fields)}")
    known: dict[frozenset[str], str] = {}
    for record in read_records(source, encoding):
        named = _rename(record, columns)
        keys = frozenset(key for key, value in named.items() if value is not None)
        if keys not in known:
            known[keys] = _choose(record, keys, named, chosen)
        content = FORMATS[known[keys]].read(named, record.place)
        yield Example(record.place, record.name, content, record.is_file)


def parse_columns(text: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as a mapping.

    Raises:
        CorpusError: it is not of this form, or names a field twice.
    """
    columns: dict[str, str] = {}
    for part in text.split(",") if text else []:
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not (field and equals and column) or field in columns:
            raise CorpusError(f"columns are {text!r}; needed: FIELD=COLUMN,FIELD=COLUMN, such as prompt=question")
        columns[field] = column
    return columns


def _rename(record: Record, columns: Mapping[str, str]) -> Mapping[str, Any]:
    if not columns:
        return record.fields
    if missing := sorted(set(columns.values()) - set(record.fields)):
        raise CorpusError(f"{record.place} has no columns {missing}; it has {sorted(record.fields, key=str)}")
    others = {key: value for key, value in record.fields.items() if key not in columns.values()}
    return {**others, **{field: record.fields[column] for field, column in columns.items()}}


def _choose(record: Record, keys: frozenset[str], fields: Mapping[str, Any], chosen: list[str]) -> str:
    fitting = [name for name in chosen if set(FORMATS[name].needed) <= keys]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CorpusError(
            f"{record.place} fits several formats ({', '.join(fitting)}): say which is meant (`format`, --format)"
        )
    nulls = sorted(str(key) for key, value in fields.items() if value is None)
    needed = "; or ".join(" and ".join(FORMATS[name].needed) for name in chosen)
    raise CorpusError(
        f"{record.place} has the keys {sorted(map(str, keys))}{f' (and null in {nulls})' if nulls else ''}; needed: "
        f"{needed}. Name other columns by `columns` (--columns), such as {FORMATS[chosen[0]].needed[0]}=COLUMN"
    )


def _string(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{place}: {name} must be a string, not {value!r:.40}")
    _require_text(value, name, place)
    return value


def _require_text(value: str, name: str, place: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{place}: {name} holds half of a surrogate pair at character {error.start}") from error


def _list(value: Any, name: str, place: str) -> list[Any]:
    """A list, or one that a cell holds as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise CorpusError(f"{place}: {name} must be a list, not {value!r:.40}") from None
    if not isinstance(value, list):
        raise CorpusError(f"{place}: {name} must be a list, not {value!r:.40}")
    return value


def _read_text(fields: Mapping[str, Any], place: str) -> Text:
    return Text(_string(fields["text"], "text", place))


def _read_prompt(fields: Mapping[str, Any], place: str) -> PromptWithCompletion:
    return PromptWithCompletion(*(_string(fields[name], name, place) for name in ("prompt", "completion")))


def _read_alpaca(fields: Mapping[str, Any], place: str) -> Conversation:
    """Stanford Alpaca's records; `system` and `history`, a list of (question, answer), are LLaMA-Factory's."""
    texts = {
        name: _string(fields.get(name) or "", name, place) for name in ("instruction", "input", "output", "system")
    }
    messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for turn in _list(fields.get("history") or [], "history", place):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise CorpusError(f"{place}: history must be a list of pairs of question and answer, not {turn!r:.40}")
        question, answer = (_string(part, "history", place) for part in turn)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = {name: texts[name] for name in ("instruction", "input")}
    content = "\n".join(part for part in asked.values() if part)
    messages += [{"role": "user", "content": content, **asked}, {"role": "assistant", "content": texts["output"]}]
    return Conversation(messages, None, "alpaca")


def _read_sharegpt(fields: Mapping[str, Any], place: str) -> Conversation:
    turns = _list(fields["conversations"], "conversations", place)
    messages: list[dict[str, Any]] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": _string(fields["system"], "system", place)})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise CorpusError(f"{place}: turn {number} of conversations is {turn!r:.40}; needed: from and value")
        speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker not in SHAREGPT_ROLES:
            raise CorpusError(
                f"{place}: turn {number} of conversations is from {speaker!r:.40}; known: {', '.join(SHAREGPT_ROLES)}"
            )
        role = SHAREGPT_ROLES[speaker]
        said = _string(said, f"the value of turn {number}", place)
        if role == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(said, place)})
        else:
            messages.append({"role": role, "content": said})
    # As FastChat does, which cut ShareGPT's long conversations in pieces.
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"][:1]
    early = [message for message in messages[: asked[0] if asked else 0] if message["role"] == "assistant"]
    messages = [message for message in messages if not any(message is one for one in early)]
    return Conversation(_checked(messages, place), _tools(fields, place), "sharegpt", bool(early))


def _calls(said: str, place: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(said)
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise CorpusError(f"{place}: a function_call must be JSON with name and arguments, not {said!r:.40}")
    return [{"type": "function", "function": call} for call in calls]


def _read_messages(fields: Mapping[str, Any], place: str) -> Conversation:
    try:
        messages = _list(fields["messages"], "messages", place)
    except CorpusError as error:
        raise CorpusError(f"{place} holds no messages that can be read: {fields['messages']!r:.40}") from error
    return Conversation(_checked(messages, place), _tools(fields, place), "messages")


def _checked(messages: list[Any], place: str) -> list[dict[str, Any]]:
    """Messages without null fields, as Arrow fills them in, and with the arguments of calls as templates want them."""
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise CorpusError(f"{place} holds no messages that can be read: message {number} is {message!r:.60}")
        message = _pruned(message)
        for call in message.get("tool_calls") or []:
            function = call.get("function", call) if isinstance(call, dict) else {}
            if isinstance(function.get("arguments"), str):
                function["arguments"] = _arguments(function["arguments"], place, number)
        for text in _strings(message):
            _require_text(text, f"message {number}", place)
        checked.append(message)
    if not checked:
        raise CorpusError(f"{place} holds no messages that can be read: there are none")
    return checked


def _arguments(text: str, place: str, number: int) -> Any:
    """OpenAI writes the arguments of a call as a string, chat templates write them out as JSON themselves."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise CorpusError(f"{place}: the arguments of a call in message {number} are no JSON: {error}") from error


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list | tuple) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_strings, value.values()))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_strings, value))


def _tools(fields: Mapping[str, Any], place: str) -> list[Any] | None:
    tools = _list(fields["tools"], "tools", place) if fields.get("tools") else []
    tools = [_pruned(json.loads(tool) if isinstance(tool, str) else tool) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise CorpusError(f"{place}: tools must be JSON schemas, not {tools!r:.60}")
    return tools or None


def _read_ids(fields: Mapping[str, Any], place: str) -> TokenIds:
    sample = {name: fields[name] for name in FORMATS["ids"].fields if fields.get(name) is not None}
    for name, values in sample.items():
        if name != "prompt_length":
            values = _list(values, name, place) if isinstance(values, str) else values
            try:
                sample[name] = integers(name, values, kinds="iub" if name in MASKS else "iu")
            except ValueError as error:
                raise CorpusError(f"{place}: {error}") from error
    return TokenIds(sample)


class Format(NamedTuple):
    """How records of one kind are known and read.

    Attributes:
        needed: the keys that tell it.
        optional: other keys that are read.
        read: makes the content of a record's fields and place.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Content]

    @property
    def fields(self) -> tuple[str, ...]:
        return self.needed + self.optional


FORMATS = {
    "text": Format(("text",), (), _read_text),
    "prompt": Format(("prompt", "completion"), (), _read_prompt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _read_alpaca),
    "sharegpt": Format(("conversations",), ("system", "tools"), _read_sharegpt),
    "messages": Format(("messages",), ("tools",), _read_messages),
    "ids": Format(
        ("input_ids",),
        ("attention_mask", "labels", "assistant_masks", "completion_mask", "prompt_length"),
        _read_ids,
    ),
}
"""The formats of records by name."""
