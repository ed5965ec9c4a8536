"""Text in which the strings of special tokens are text: user content in chats, and prompts.

A tokenizer looks for special tokens before anything else happens to a text. Here the first character of each such
string in the text becomes a stand-in, a character that the text lacks, and a copy of the tokenizer, with the same
model, puts it back once special tokens have been looked for. So everything else, what a template writes included, is
read as ever, and each character keeps its place. Beside the standard library it imports `tokenizers` and transformers
only, since it travels with a checkpoint.
"""

import copy
import dataclasses
import inspect
import io
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import get_json_schema

# From the last code points of Unicode, which no text needs, down to the end of the surrogates.
STAND_INS = range(0x10FFFF, 0xDFFF, -1)

# Options of `apply_chat_template` that are refused where nothing is tokenized.
TOKENS_ONLY = ("return_assistant_tokens_mask", "sanitize_control_tokens")


class LiteralReading(NamedTuple):
    """How to read a text in which some special tokens are text.

    Attributes:
        tokenizer: encodes what `hide` returns; ids and decoding are those of the original.
        hidden: strings of the special tokens that are text.
        stand_ins: their first characters, and what stands for them.
    """

    tokenizer: PreTrainedTokenizerFast
    hidden: tuple[str, ...]
    stand_ins: dict[str, str]

    def hide(self, text: str) -> str:
        """The text with no special token to be found in it; as long as before."""
        for token in self.hidden:
            # Again, since occurrences may overlap.
            while token in text:
                text = text.replace(token, self.stand_ins[token[0]] + token[1:])
        return text

    def reveal(self, text: str) -> str:
        """The text that `hide` was given, or one made from it."""
        return text.translate({ord(stand_in): character for character, stand_in in self.stand_ins.items()})


def read_literally(tokenizer: PreTrainedTokenizerFast, text: str, keep: Collection[str] = ()) -> LiteralReading:
    """How to encode parts of `text` with its special tokens as text.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
        text: all that is to be hidden, joined.
        keep: strings of special tokens that are read all the same.

    Returns:
        A reading; its tokenizer is the one given if `text` holds no special token.

    Raises:
        TypeError: no fast tokenizer.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(
            f"{type(tokenizer).__name__} is no fast tokenizer (one with a tokenizer.json): it cannot tell special "
            "tokens from text that is spelled like them; let it read them (special_tokens_in_content=True, "
            "--special-tokens)"
        )
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    named = set(tokenizer.all_special_tokens)
    special = [token for token in added if token.special or token.content in named]
    special = [token for token in special if token.content not in keep]
    if not holds_any(special, text, backend):
        return LiteralReading(tokenizer, (), {})
    hidden = tuple(token.content for token in special if token.content in text)
    taken = {*text, *"".join(token.content for token in added)}
    unused = (chr(code) for code in STAND_INS if chr(code) not in taken)
    stand_ins = {first: next(unused) for first in sorted({token[0] for token in hidden})}
    return LiteralReading(copy_with_stand_ins(tokenizer, stand_ins), hidden, stand_ins)


def holds_any(tokens: Collection[AddedToken], text: str, backend: Tokenizer) -> bool:
    """Whether the back end would find one of the tokens in the text."""
    if any(token.content in text for token in tokens):
        return True
    loose = [token.content for token in tokens if token.normalized]
    if not loose or backend.normalizer is None:
        return False
    # These are looked for after normalization, in lower case for example.
    text = backend.normalizer.normalize_str(text)
    return any(backend.normalizer.normalize_str(token) in text for token in loose)


def copy_with_stand_ins(tokenizer: PreTrainedTokenizerFast, stand_ins: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A copy that finds special tokens as they are written only, and then reads stand-ins as their characters.

    The copy shares the model. Padding, truncation and the like are its own, so that threads do not disturb each other.
    """
    backend = tokenizer.backend_tokenizer
    literal = Tokenizer(backend.model)
    steps = [normalizers.Replace(stand_in, character) for character, stand_in in stand_ins.items()]
    literal.normalizer = normalizers.Sequence(steps + [backend.normalizer] * (backend.normalizer is not None))
    for name in ("pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(backend, name)) is not None:
            setattr(literal, name, part)
    # In the order of their ids, so that each gets its own again.
    named = set(tokenizer.all_special_tokens)
    added = sorted(backend.get_added_tokens_decoder().items())
    literal.add_tokens([as_written(token, token.special or token.content in named) for _, token in added])
    copied = copy.copy(tokenizer)
    copied._tokenizer = literal
    return copied


def as_written(token: AddedToken, special: bool) -> AddedToken:
    options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
    return AddedToken(token.content, normalized=token.normalized and not special, special=special, **options)


def map_strings(value: Any, change: Callable[[Any, str], str], key: Any = None) -> Any:
    """Messages, documents or tools with each string put through `change(key, string)`.

    The key is that of the innermost mapping; for the keys themselves, and outside of mappings, it is None.
    """
    if isinstance(value, str):
        return change(key, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(dump := getattr(value, "model_dump", None)):
        value = dump()
    value = getattr(value, "messages", value)
    if isinstance(value, Mapping):
        return {map_strings(name, change): map_strings(part, change, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(part, change, key) for part in value]
    return value


def hide_in(tokenizer: PreTrainedTokenizerFast, inputs: Any) -> tuple[LiteralReading, Any]:
    """How to read messages, documents or tools in which special tokens are text, and these with the tokens hidden.

    Raises:
        TypeError: no fast tokenizer.
    """
    strings: defaultdict[Any, list[str]] = defaultdict(list)
    map_strings(inputs, lambda key, text: strings[key].append(text) or text)
    # Joined, since a template may join the parts of a content, and with them the parts of a token's string.
    joined = {key: "".join(parts) for key, parts in strings.items()}
    reading = read_literally(tokenizer, "\n".join(joined.values()))
    if reading.tokenizer is tokenizer:
        return reading, inputs
    streams = {key: io.StringIO(reading.hide(text)) for key, text in joined.items()}
    return reading, map_strings(inputs, lambda key, text: streams[key].read(len(text)))


def require_literal(reading: LiteralReading, plain: Any, hidden: Any) -> None:
    """ValueError if a template rendered inputs otherwise when special tokens in them were hidden."""
    if plain != map_strings(hidden, lambda _, text: reading.reveal(text)):
        raise ValueError(
            f"the chat template treats the special tokens {list(reading.hidden)} inside a message in a way of its own "
            "(it looks for them, or escapes the message), so they cannot be encoded as text: take them out of the "
            "message, or pass special_tokens_in_content=True to have them read as control tokens"
        )


def apply_template_literally(
    tokenizer: PreTrainedTokenizerFast,
    conversation: Any,
    tools: Any = None,
    documents: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    tokenize: bool = True,
    *,
    special_tokens_in_content: bool = False,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """`PreTrainedTokenizerFast.apply_chat_template` of any fast tokenizer, with literal content.

    Arguments, returns and errors as in `MiniLLMTokenizer.apply_chat_template`, after the tokenizer.
    """
    options |= {
        "chat_template": chat_template,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    stock = PreTrainedTokenizerFast.apply_chat_template
    # What the template writes is read, whatever the tokenizer does with other text.
    encoding = {"split_special_tokens": False} | dict(tokenizer_kwargs or {})
    if tools is not None:
        # As transformers does, but before their texts are looked at.
        tools = [get_json_schema(tool) if inspect.isroutine(tool) else tool for tool in tools]
    inputs: tuple[Any, ...] = (conversation, tools, documents)
    if special_tokens_in_content or not tokenize:
        return stock(tokenizer, *inputs, tokenize=tokenize, tokenizer_kwargs=encoding, **options)
    reading, hidden = hide_in(tokenizer, inputs)
    if reading.tokenizer is tokenizer:
        return stock(tokenizer, *inputs, tokenizer_kwargs=encoding, **options)
    plain = {name: value for name, value in options.items() if name not in TOKENS_ONLY}
    rendered = [
        stock(one, *content, tokenize=False, **plain)
        for one, content in ((tokenizer, inputs), (reading.tokenizer, hidden))
    ]
    require_literal(reading, *rendered)
    return stock(reading.tokenizer, *hidden, tokenizer_kwargs=encoding, **options)
