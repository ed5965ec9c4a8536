"""Added tokens that decoding would change: refused where they come in, told of where they are there already.

A back end decodes added tokens with the rest. ByteLevel's decoder takes `é` for a byte, that of U+2581 models writes a
blank for `▁`, WordPiece's drops `##`: `decode(encode(text)) == text` would not hold for a token with such a string.
Beside the standard library it imports `tokenizers` and transformers only, since it travels with a checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# While a saved tokenizer is loading: the strings that the caller names. Others are its own, and stay.
LOADING: ContextVar[frozenset[str] | None] = ContextVar("LOADING", default=None)


def token_strings(value: Any) -> Iterator[str]:
    """The strings of a token, or of all tokens in a mapping or list."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from token_strings(part)
    elif isinstance(value, str) or hasattr(value, "content"):
        yield str(value)


def find_lost(backend: Tokenizer, tokens: Iterable[str]) -> list[str]:
    """Those of the tokens that the back end's decoder changes."""
    if backend.decoder is None:
        return []
    # With neighbors: `##` counts inside a text only, and a digit may complete an escape.
    return [token for token in tokens if token not in backend.decoder.decode(["a", token, "1"])]


def describe_lost(backend: Tokenizer, lost: list[str]) -> str:
    pieces = ["a", lost[0], "1"]
    return (
        f"the added tokens {lost} do not come back from decode(): {pieces} become {backend.decoder.decode(pieces)!r}"
    )


def require_decodable(backend: Tokenizer, tokens: Iterable[str]) -> None:
    """Refuses tokens that the back end's decoder changes.

    Raises:
        ValueError: the message names them, what becomes of the first, and the way out.
    """
    if lost := find_lost(backend, tokens):
        raise ValueError(
            f"{describe_lost(backend, lost)}; write a special token in other characters, such as '<name>' in ASCII, "
            "and make a word a piece of the vocabulary instead (`extend_vocabulary`, `minillm tokenizer extend`)"
        )


def require_told_apart(backend: Tokenizer, tokens: Iterable[str]) -> None:
    """Refuses special tokens that a model with them in its vocabulary would also read out of plain text.

    Unigram and WordPiece take a word that the vocabulary holds, BPE without merges a single character.

    Raises:
        ValueError: the message names them and the way out.
    """
    only_merges = isinstance(backend.model, models.BPE) and not backend.model.ignore_merges
    spelled = [
        token for token in tokens if (len(token) == 1 or not only_merges) and cut_words(backend, token) == [token]
    ]
    if spelled:
        raise ValueError(
            f"the special tokens {spelled} are words that plain text may hold, and the subword model could not tell "
            "one from the other: mix letters and signs, as in '<name>'"
        )


def cut_words(backend: Tokenizer, text: str) -> list[str]:
    """What the subword model sees of a text."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


class AddedTokensMixin(PreTrainedTokenizerFast):
    """Guards the ways in which tokens are added to a tokenizer."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *init_inputs: Any, **kwargs: Any) -> Any:
        """Loads a tokenizer; says once which of its added tokens do not come back from `decode()`.

        Raises:
            ValueError: such a token is new, named by an argument.
        """
        before = LOADING.set(frozenset(token_strings(kwargs)))
        try:
            tokenizer = super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        finally:
            LOADING.reset(before)
        if lost := find_lost(tokenizer.backend_tokenizer, tokenizer.added_tokens_encoder):
            logger.warning_once(f"In {tokenizer.name_or_path} {describe_lost(tokenizer.backend_tokenizer, lost)}.")
        return tokenizer

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens as `PreTrainedTokenizerFast.add_tokens` does.

        Args:
            new_tokens: a string or `AddedToken`, or several.
            special_tokens: whether they are special.

        Returns:
            The number of tokens that are new.

        Raises:
            ValueError: a new token would not come back from `decode()`; then none is added.
        """
        self.check_new_tokens(new_tokens)
        return super().add_tokens(new_tokens, special_tokens=special_tokens)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Adds and names special tokens as `PreTrainedTokenizerFast.add_special_tokens` does.

        Args:
            special_tokens_dict: tokens by name, e.g. `{"eos_token": "</s>"}`; a list for `extra_special_tokens`.
            replace_extra_special_tokens: whether such a list takes the place of the one before.

        Returns:
            The number of tokens that are new.

        Raises:
            ValueError: a new token would not come back from `decode()`; then none is added or named.
        """
        self.check_new_tokens(special_tokens_dict)
        return super().add_special_tokens(dict(special_tokens_dict), replace_extra_special_tokens)

    def check_new_tokens(self, tokens: Any) -> None:
        """Refuses tokens that are not there yet and would not come back from `decode()`.

        A saved tokenizer that is loading brings its own ones all the same.

        Raises:
            ValueError: the message names them.
        """
        known, named = self.added_tokens_encoder, LOADING.get()
        new = [token for token in token_strings(tokens) if token not in known]
        require_decodable(self.backend_tokenizer, [token for token in new if named is None or token in named])
