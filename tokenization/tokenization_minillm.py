"""MiniLLM's tokenizer: four subword models on the `tokenizers` back end, GLM's special tokens by name, training.

Beside the files that travel with it, it imports the standard library, `tokenizers` and transformers only, since it
travels with a checkpoint.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging
from transformers.utils.hub import cached_file

from minillm.tokenization.added_tokens import AddedTokensMixin, require_decodable, require_told_apart, token_strings
from minillm.tokenization.glm_layout import GLMInputsMixin
from minillm.tokenization.literal_text import apply_template_literally
from minillm.tokenization.training_text import CHUNK_BYTES, Corpus, check_text_files, read_text_files
from minillm.tokenization.turn_tokens import TurnTokensMixin

logger = logging.get_logger(__name__)

# Ids follow this order from 0 on, so pad, bos and eos are 0, 1 and 2 (`MiniLLMConfig` has bos 1 and eos 2).
NAMED_TOKENS = {
    "pad_token": "<|pad|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
    "smask_token": "[sMASK]",
    "sop_token": "<|startofpiece|>",
    "eop_token": "<|endofpiece|>",
}
UNK_TOKEN = "<|unk|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

# No text stands between a role's token and the content: special tokens are cut out before the subword model runs, so
# no token straddles the border of a turn, earlier turns keep their tokens, and the assistant mask is exact.
CHAT_TEMPLATE = """\
{%- if tools -%}{{- raise_exception("this chat template has no place for tools") -}}{%- endif -%}
{%- for message in messages -%}
{%- if message["role"] not in ["system", "user", "assistant"] -%}
{{- raise_exception("unknown role '" ~ message["role"] ~ "': use system, user or assistant") -}}
{%- endif -%}
{%- if message["tool_calls"] -%}{{- raise_exception("this chat template has no place for tool calls") -}}{%- endif -%}
{%- set content = message["content"] -%}
{%- if content is not string -%}
{%- if not content or content | rejectattr("type", "equalto", "text") | list -%}
{{- raise_exception("the content of a message must be a string or a list of text parts") -}}
{%- endif -%}
{%- set content = content | map(attribute="text") | join -%}
{%- endif -%}
{{- "<|" ~ message["role"] ~ "|>" -}}
{%- if message["role"] == "assistant" -%}
{%- generation -%}{{- content -}}{{- eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""
# Word-piece drops leading blanks; the mask's first character must belong to a token.
TRIMMING_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{{- content -}}", "{{- content | trim -}}")

# A word with the blank before it, one digit, a run of signs, a run of blanks that leaves one to the next word. As
# letters, digits and signs never share a piece, none can look like a special token or a byte piece such as <0x41>.
WORDS = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
SPACE = "\u2581"
# SPACE stands for a blank inside the vocabulary, so a SPACE that is really in the text is written ESCAPE + "1", and
# ESCAPE itself (a code point that Unicode reserves as a non-character) ESCAPE + "0": every text comes back exactly.
ESCAPE = "\ufdd0"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))

# What `train_from_iterator` hands on to the tokenizer's constructor, which itself swallows every unknown name.
CONSTRUCTOR_OPTIONS = {
    "add_bos_token",
    "add_eos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
}


@dataclass(frozen=True)
class SubwordModel:
    """How one kind of subword model is cut, trained and joined again."""

    create: Callable[[], Tokenizer]
    trainer: Callable[..., trainers.Trainer]
    options: frozenset[str] = frozenset()
    alphabet_size: int = 1
    byte_fallback: bool = False
    needs_unk: bool = False
    chat_template: str = CHAT_TEMPLATE


def create_byte_bpe() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def create_sentencepiece(model: models.Model) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(ESCAPE, ESCAPE + "0"), normalizers.Replace(SPACE, ESCAPE + "1")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(ESCAPE + "1", SPACE),
            decoders.Replace(ESCAPE + "0", ESCAPE),
        ]
    )
    return backend


def create_wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token=UNK_TOKEN))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return backend


def byte_bpe_trainer(**options: Any) -> trainers.Trainer:
    return trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)


def sentencepiece_bpe_trainer(**options: Any) -> trainers.Trainer:
    # Byte pieces would spell the blanks of a corpus without any as SPACE, which decoding takes for one in the text.
    return trainers.BpeTrainer(initial_alphabet=[SPACE], **options)


def unigram_trainer(**options: Any) -> trainers.Trainer:
    return trainers.UnigramTrainer(unk_token=UNK_TOKEN, initial_alphabet=[SPACE], **options)


SUBWORD_MODELS = {
    "byte_bpe": SubwordModel(
        create=create_byte_bpe,
        trainer=byte_bpe_trainer,
        options=frozenset({"min_frequency"}),
        alphabet_size=256,
    ),
    "sentencepiece_bpe": SubwordModel(
        create=lambda: create_sentencepiece(models.BPE()),
        trainer=sentencepiece_bpe_trainer,
        options=frozenset({"min_frequency", "limit_alphabet"}),
        byte_fallback=True,
    ),
    "unigram": SubwordModel(
        create=lambda: create_sentencepiece(models.Unigram()),
        trainer=unigram_trainer,
        byte_fallback=True,
        needs_unk=True,
    ),
    "wordpiece": SubwordModel(
        create=create_wordpiece,
        trainer=trainers.WordPieceTrainer,
        options=frozenset({"min_frequency", "limit_alphabet"}),
        needs_unk=True,
        chat_template=TRIMMING_CHAT_TEMPLATE,
    ),
}


def add_byte_pieces(backend: Tokenizer) -> Tokenizer:
    """Gives a trained BPE or Unigram model the 256 byte pieces, after its own, and turns byte fallback on."""
    state = json.loads(backend.to_str())
    model = state["model"]
    model["byte_fallback"] = True
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        # NaN, in JSON: a corpus of zero bytes alone, between which the trainer learns, leaves it nothing to count.
        if None in scores:
            raise ValueError("the corpus holds nothing that model='unigram' could learn from: give it other text")
        lowest = min(scores)
        model["vocab"] += [[piece, lowest] for piece in BYTE_PIECES]
    else:
        model["vocab"].update({piece: len(model["vocab"]) + byte for byte, piece in enumerate(BYTE_PIECES)})
    return Tokenizer.from_str(json.dumps(state))


def choose_special_tokens(
    model: SubwordModel, overrides: Mapping[str, str] | None, extra: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    named = NAMED_TOKENS | ({"unk_token": UNK_TOKEN} if model.needs_unk else {})
    overrides = dict(overrides or {})
    if unknown := sorted(set(overrides) - set(NAMED_TOKENS)):
        raise ValueError(f"special_tokens has no token called {unknown}; it may set {sorted(NAMED_TOKENS)}")
    named |= overrides
    if isinstance(extra, str):
        raise TypeError(f"extra_special_tokens must be a list of strings, not the string {extra!r}")
    extra = [*ROLE_TOKENS, *extra]
    tokens = [*named.values(), *extra]
    if wrong := [token for token in tokens if not isinstance(token, str) or not token or token in BYTE_PIECES]:
        raise ValueError(f"special tokens must be non-empty strings other than byte pieces, not {wrong}")
    if repeated := sorted({token for token in tokens if tokens.count(token) > 1}):
        raise ValueError(f"every special token needs a string of its own, but {repeated} stand for more than one")
    require_decodable(model.create(), tokens)
    require_told_apart(model.create(), tokens)
    return named, extra


def train_backend(
    kind: str,
    texts: Iterable[str | Sequence[str]],
    vocab_size: int,
    special_tokens: Sequence[str],
    length: int | None,
    options: Mapping[str, Any],
) -> Tokenizer:
    model = SUBWORD_MODELS[kind]
    byte_pieces = len(BYTE_PIECES) if model.byte_fallback else 0
    reserved = len(special_tokens) + byte_pieces
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an integer, not {vocab_size!r}")
    if vocab_size < reserved + model.alphabet_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for model='{kind}': {len(special_tokens)} special tokens, "
            f"{byte_pieces} byte pieces and an alphabet need at least {reserved + model.alphabet_size}"
        )
    corpus = Corpus(texts)
    backend = model.create()
    added = [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    trainer = model.trainer(vocab_size=vocab_size - byte_pieces, special_tokens=added, **options)
    too_many = (
        f"vocab_size={vocab_size} is too small for model='{kind}': the corpus has {{characters}} different characters "
        f"beside {len(special_tokens)} special tokens and {byte_pieces} byte pieces; raise vocab_size"
        + (" or set limit_alphabet" if "limit_alphabet" in model.options else "")
    )
    try:
        backend.train_from_iterator(corpus, trainer, length=length)
    except Exception as error:
        if "not large enough" not in str(error):
            raise
        raise ValueError(too_many.format(characters=len(corpus.characters))) from error
    if not any(not character.isspace() for character in corpus.characters):
        raise ValueError("the corpus is empty: texts yielded no text, or nothing but white space")
    if backend.get_vocab_size() > vocab_size - byte_pieces:
        raise ValueError(too_many.format(characters=len(corpus.characters)))
    if model.byte_fallback:
        backend = add_byte_pieces(backend)
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            f"The corpus yields only {backend.get_vocab_size()} tokens of the {vocab_size} that vocab_size asks for."
        )
    return backend


class MiniLLMTokenizer(AddedTokensMixin, TurnTokensMixin, GLMInputsMixin, PreTrainedTokenizerFast):
    """Tokenizer of MiniLLM models.

    Subword models: byte-level BPE (Radford et al. 2019, section 2.2), BPE with U+2581 for blanks and byte fallback as
    SentencePiece writes it (Kudo and Richardson 2018), Unigram (Kudo 2018, section 3.2) with byte fallback, and
    WordPiece (Devlin et al. 2019). For the first three `decode(encode(text)) == text` holds for every text that can be
    written in UTF-8. WordPiece is lossy: runs of white space (line breaks too) become one blank, control characters
    go, blanks appear around punctuation and each Chinese character, and a word with a character that the training
    corpus lacks becomes `unk_token`. Case, accents and the characters themselves stay.

    Beside the usual special tokens it knows GLM's (Du et al. 2022, section 2.1; Zeng et al. 2022, section 2.2) by
    name, each with an `_id`: `mask_token`, `gmask_token`, `smask_token`, `sop_token` (a span begins), `eop_token` (a
    span ends). A token that a checkpoint lacks is None. `build_glm_inputs` makes a model's inputs from texts with
    blanks. `answer_start_token_id` and `turn_token_ids` are those of the chat template's roles, as `MiniLLMConfig`
    takes them.

    Encoding adds no special token: collators set the end token themselves, and chats come with theirs from the chat
    template. As in all of transformers, `tokenizer(text)` reads the strings of special tokens in a text as these
    tokens; `tokenizer(text, split_special_tokens=True)` takes them for text, and so does `apply_chat_template` with
    what stands in messages.

    Padding is on the right, as training wants it; set `padding_side="left"` to generate from a batch.
    """

    SPECIAL_TOKENS_ATTRIBUTES = [
        *PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES,
        "gmask_token",
        "smask_token",
        "sop_token",
        "eop_token",
    ]
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *init_inputs: Any, **kwargs: Any
    ) -> "MiniLLMTokenizer":
        """Loads a tokenizer as `PreTrainedTokenizerFast.from_pretrained` does.

        Raises:
            ValueError: a file of the tokenizer is damaged (the message names it).
            FileNotFoundError: the folder has no `tokenizer.json`.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        except Exception as error:
            explain_broken_files(pretrained_model_name_or_path, kwargs, error)
            raise

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[str | Sequence[str]],
        *,
        vocab_size: int,
        model: str = "byte_bpe",
        min_frequency: int | None = None,
        limit_alphabet: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
        extra_special_tokens: Sequence[str] = (),
        length: int | None = None,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> "MiniLLMTokenizer":
        """Trains a tokenizer that has pad, bos, eos, GLM's tokens and a chat template.

        The two BPE models come out the same each time; the trainers of the others break ties in any order.

        Args:
            texts: strings or lists of strings; read once.
            vocab_size: number of tokens, special tokens and byte pieces included. A small corpus may yield fewer (a
                warning says so).
            model: "byte_bpe", "sentencepiece_bpe", "unigram" or "wordpiece".
            min_frequency: how often a pair must occur to be merged; no bound if not given. Not for "unigram".
            limit_alphabet: most characters to keep; the rest become byte pieces ("sentencepiece_bpe") or unknown
                ("wordpiece").
            special_tokens: other strings for the named tokens, e.g. `{"eos_token": "</s>"}`.
            extra_special_tokens: further special tokens, after the named ones and the roles of a chat.
            length: number of items in `texts`, for the progress bar alone.
            show_progress: whether the trainer draws its progress bar on a terminal.
            kwargs: for the tokenizer itself: `model_max_length`, `padding_side`, `chat_template` and the like.

        Raises:
            ValueError: unknown model, an option that the model does not have, vocab_size too small for the special
                tokens and the alphabet, two special tokens with the same string or one that `decode()` would change or
                that plain text could spell, or an empty corpus.
            TypeError: `texts` is one string, or yields something else than strings; an unknown argument.
        """
        if model not in SUBWORD_MODELS:
            raise ValueError(f"model={model!r} is unknown; choose one of {list(SUBWORD_MODELS)}")
        given = {"min_frequency": min_frequency, "limit_alphabet": limit_alphabet}
        options = {name: value for name, value in given.items() if value is not None}
        if refused := sorted(set(options) - SUBWORD_MODELS[model].options):
            raise ValueError(f"model='{model}' has no option {refused}; leave it out")
        if wrong := {name: value for name, value in options.items() if not isinstance(value, int) or value < 1}:
            raise ValueError(f"options must be whole numbers from 1 on, not {wrong}")
        if unknown := sorted(set(kwargs) - CONSTRUCTOR_OPTIONS):
            raise TypeError(f"unknown arguments {unknown}; the tokenizer takes {sorted(CONSTRUCTOR_OPTIONS)}")
        named, extra = choose_special_tokens(SUBWORD_MODELS[model], special_tokens, extra_special_tokens)
        backend = train_backend(
            model, texts, vocab_size, [*named.values(), *extra], length, options | {"show_progress": show_progress}
        )
        defaults = {"chat_template": SUBWORD_MODELS[model].chat_template, "clean_up_tokenization_spaces": False}
        return cls(tokenizer_object=backend, **named, extra_special_tokens=extra, **(defaults | kwargs))

    @classmethod
    def train_from_files(cls, paths: Iterable[str | Path], *, vocab_size: int, **kwargs: Any) -> "MiniLLMTokenizer":
        """Trains on text files in UTF-8; arguments as in `train_from_iterator`, without `texts` and `length`.

        Raises:
            FileNotFoundError, PermissionError: a file is missing or may not be read.
            ValueError: no file, a folder among them, only empty files, a file that is binary or not UTF-8 (the message
                names the file), and what `train_from_iterator` raises. All but wrong UTF-8 is seen before work starts.
        """
        files = check_text_files(paths)
        chunks = sum(math.ceil(path.stat().st_size / CHUNK_BYTES) for path in files)
        return cls.train_from_iterator(read_text_files(files), vocab_size=vocab_size, length=chunks, **kwargs)

    def apply_chat_template(
        self, conversation: Any, *args: Any, special_tokens_in_content: bool = False, **kwargs: Any
    ) -> Any:
        """`PreTrainedTokenizerFast.apply_chat_template`, in which content is literal: it cannot forge a turn.

        Strings of special tokens in messages, documents and tools are encoded as text, as `split_special_tokens=True`
        encodes them; those that the template writes are control tokens. With `tokenize=False` the text is what it
        always was, and whoever encodes it reads the special tokens in it.

        Args:
            conversation: a chat (a list of messages) or several.
            args: `tools`, `documents`, `chat_template`, `add_generation_prompt`, `continue_final_message` and
                `tokenize`, as in transformers.
            special_tokens_in_content: read special tokens in content as control tokens too, as transformers does.
            kwargs: these and the other arguments of transformers' method; what is left goes to the template.

        Returns:
            What transformers' method returns: ids with their masks, or text.

        Raises:
            ValueError: the template looks for special tokens in a message that holds one, or escapes it, so that they
                cannot be told from its own; besides what transformers' method raises.
        """
        return apply_template_literally(
            self, conversation, *args, special_tokens_in_content=special_tokens_in_content, **kwargs
        )

    def train_new_from_iterator(
        self,
        text_iterator: Any,
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Any = None,
        special_tokens_map: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "MiniLLMTokenizer":
        """Trains a tokenizer with this one's rules on a new corpus; byte fallback, which trainers drop, is kept.

        Arguments as in `PreTrainedTokenizerFast.train_new_from_iterator`.

        Raises:
            ValueError: a new special token that `decode()` would change or that plain text could spell.
        """
        new = [*token_strings(new_special_tokens), *token_strings(special_tokens_map)]
        require_decodable(self.backend_tokenizer, new)
        require_told_apart(self.backend_tokenizer, new)
        byte_pieces = 0
        if json.loads(self.backend_tokenizer.to_str())["model"].get("byte_fallback"):
            byte_pieces = len(BYTE_PIECES)
            kwargs["initial_alphabet"] = [SPACE, *kwargs.get("initial_alphabet", ())]
        trained = super().train_new_from_iterator(
            text_iterator, vocab_size - byte_pieces, length, new_special_tokens, special_tokens_map, **kwargs
        )
        if not byte_pieces:
            return trained
        return type(self)(**trained.init_kwargs | {"tokenizer_object": add_byte_pieces(trained.backend_tokenizer)})


def explain_broken_files(name_or_path: str | os.PathLike[str], kwargs: Mapping[str, Any], error: Exception) -> None:
    """Raises a readable error if a file of the tokenizer is what made loading fail; returns if it is not."""
    place = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder") if kwargs.get(name)}
    if kwargs.get("gguf_file"):
        return
    readers = {"tokenizer_config.json": read_mapping, "tokenizer.json": Tokenizer.from_str, "chat_template.jinja": str}
    for name, load in readers.items():
        here = Path(name_or_path, place.get("subfolder", ""), name)
        if os.path.lexists(here) and not here.is_file():
            what = "a folder" if here.is_dir() else "no file" if here.exists() else "a link to nowhere"
            raise ValueError(f"{here} is {what}: save the tokenizer again or fetch the file anew") from error
        try:
            path: Any = cached_file(name_or_path, name, local_files_only=True, **place)
        except OSError:
            if name == "tokenizer.json" and Path(name_or_path).is_dir():
                raise FileNotFoundError(f"{name_or_path} holds no tokenizer: {name} is missing") from error
            continue
        try:
            load(Path(path).read_text("utf-8"))
        except Exception as cause:
            raise ValueError(
                f"{path} is damaged ({cause}): save the tokenizer again or fetch the file anew"
            ) from error


def read_mapping(text: str) -> None:
    if not isinstance(json.loads(text), dict):
        raise ValueError("it holds no mapping")
