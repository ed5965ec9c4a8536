"""Text to train on: the user's own files, or what every machine with Python has."""

import ast
import hashlib
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# A lone file is cut in parts of about this many characters, so that some can be held out.
PART_LENGTH = 8192


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names the path and the reason."""


class TextDocument(NamedTuple):
    """A document: `name`, its path relative to the corpus with "/" between folders, and its text."""

    name: str
    text: str


def standard_library() -> list[TextDocument]:
    """Python's own sources: about 740 files and 12 MB of code, without tests and installed packages.

    Raises:
        CorpusError: this Python was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]
    documents = [TextDocument(path.relative_to(root).as_posix(), _read_source(path)) for path in paths]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise CorpusError(f"no Python sources below {root}: give a file or a folder of your own as the corpus")
    return documents


def _read_source(path: Path) -> str:
    """The text of a Python file in the encoding that it declares; empty if it cannot be read so."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def load_corpus(path: str | Path | None = None) -> list[TextDocument]:
    """The documents of a text file or of all text files below a folder (UTF-8); without a path the standard library.

    Hidden files and folders are left out. In a folder, what is no text (also broken links, pipes and sockets) is
    skipped with a warning; a lone file is cut into parts at line ends.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CorpusError: a file that cannot be read, a lone file that is empty or no text, a folder without any text, or
            something else than a file or folder.
    """
    if path is None:
        return standard_library()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the corpus {path} does not exist")
    if path.is_file():
        return cut_document(TextDocument(path.name, _read_text(path)))
    if not path.is_dir():
        raise CorpusError(f"the corpus {path} is neither a file nor a folder")
    return _folder(path)


def _folder(root: Path) -> list[TextDocument]:
    documents, refused = [], []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_dir() or any(part.startswith(".") for part in relative.parts):
            continue
        try:
            documents.append(TextDocument(relative.as_posix(), _read_text(path)))
        except NotText as error:
            refused.append(error)
    if not documents:
        reason = f"; {len(refused)} files were skipped, the first because {refused[0]}" if refused else ""
        raise CorpusError(f"the corpus folder {root} holds no text{reason}")
    if refused:
        logger.warning(f"{len(refused)} files of the corpus {root} were skipped, the first because {refused[0]}")
    return documents


class NotText(CorpusError):
    """Something that is no file, or a file that is empty or not UTF-8 text."""


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise NotText(f"{path} is no file but a broken link or a special one")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
    if not data.strip():
        raise NotText(f"{path} is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(f"{path} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise NotText(f"{path} is binary (a zero byte at {data.index(0)})")
    return text.replace("\r\n", "\n")


def cut_document(document: TextDocument, part_length: int = PART_LENGTH) -> list[TextDocument]:
    """Cuts a document at line ends into parts of at least `part_length` characters, the last one excepted."""
    parts, part, length = [], [], 0
    for line in document.text.splitlines(keepends=True):
        part.append(line)
        length += len(line)
        if length >= part_length:
            parts.append("".join(part))
            part, length = [], 0
    if part:
        parts.append("".join(part))
    return [TextDocument(f"{document.name}#{number}", part) for number, part in enumerate(parts)]


def split_corpus(
    documents: Sequence[TextDocument], held_out: float = 0.05
) -> tuple[list[TextDocument], list[TextDocument]]:
    """Splits documents into (training, held out) by a hash of their names, whatever else the corpus holds.

    Args:
        held_out: expected part of the documents that is held out, between 0 and 1.

    Raises:
        ValueError: `held_out` out of range.
        CorpusError: fewer than two documents.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"`held_out` is {held_out}; needed: 0 < held_out < 1")
    if len(documents) < 2:
        raise CorpusError(
            f"a corpus of {len(documents)} document(s) cannot be split into training and held-out text: it needs two "
            f"files, or one file of more than {PART_LENGTH} characters"
        )
    ordered = sorted(documents, key=lambda document: name_hash(document.name))
    count = sum(name_hash(document.name) < held_out for document in documents)
    chosen = {document.name for document in ordered[: min(max(count, 1), len(documents) - 1)]}
    train = [document for document in documents if document.name not in chosen]
    return train, [document for document in documents if document.name in chosen]


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    # File names need not be UTF-8: Python holds their other bytes as surrogates.
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def docstring_prose(documents: Iterable[TextDocument], shortest: int = 80) -> list[TextDocument]:
    """The docstrings of Python sources, as prose to fine-tune on: one document per file that has any.

    Args:
        shortest: docstrings of fewer characters are left out.

    Raises:
        CorpusError: none of the documents is a Python source with such a docstring.
    """
    prose = []
    for document in documents:
        docstrings = [text for text in _docstrings(document.text) if len(text) >= shortest]
        if docstrings:
            prose.append(TextDocument(document.name, "\n\n".join(docstrings) + "\n"))
    if not prose:
        raise CorpusError("the corpus holds no Python source with docstrings to fine-tune on")
    return prose


def _docstrings(source: str) -> list[str]:
    try:
        with warnings.catch_warnings():
            # Old sources hold escape sequences that newer Pythons frown upon.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def tokenize_documents(
    documents: Iterable[TextDocument | str],
    tokenizer: PreTrainedTokenizerBase,
    add_end: bool = True,
    special_tokens_in_text: bool = False,
) -> list[dict[str, list[int]]]:
    """Samples for the collators: {"input_ids": begin token, the text's tokens, end token} for each document.

    The begin token lets the text's first token be predicted, the end token teaches the model to stop. Either is left
    out if the tokenizer has none.

    Args:
        add_end: False leaves the end token out: for GLM's objective, in which spans have end tokens of their own and
            that of the text would stand in the context, behind `[gMASK]`.
        special_tokens_in_text: read the strings of special tokens in a text as these tokens; otherwise they are text.

    Raises:
        CorpusError: no documents.
    """
    texts = [document if isinstance(document, str) else document.text for document in documents]
    if not texts:
        raise CorpusError("there are no documents to tokenize")
    ends = tokenizer.eos_token_id if add_end else None
    begin, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, ends))
    # `verbose=False`: documents longer than the model are cut by the collators.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not special_tokens_in_text,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return [{"input_ids": begin + ids + end} for ids in encoded]
