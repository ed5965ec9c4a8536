"""Text to train on: the user's own files, or what every machine with Python has."""

import ast
import hashlib
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from minillm.data.containers import CorpusError
from minillm.data.records import Example, Text, read_examples

logger = logging.get_logger(__name__)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# A lone file is cut in parts of about this many characters, so that some can be held out.
PART_LENGTH = 8192
# Where a line that is longer may be cut: after a blank, or a mark that needs none behind it.
BREAK = re.compile(r"\s|[。！？；，、]")


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


def load_corpus(
    path: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    encoding: str = "utf-8",
) -> list[TextDocument]:
    """The documents of a file, of all files below a folder, or of a data set by name; None: the standard library.

    A text file is a document; a lone one is cut into parts at line ends. Of files of records (JSON lines, CSV,
    Parquet, ...) each `text` is one. `read_records` says what is read in which way, and what is skipped.

    Args:
        path, columns, format, encoding: as `read_examples` takes them.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CorpusError: a file that cannot be read, a lone file that is empty or no text, a folder without any text,
            records without a text, or something else than a file or folder.
        ImportError: a library is missing that the kind of file needs.
    """
    if path is None:
        return standard_library()
    examples = cut_lone_file(read_examples(path, columns=columns, format=format, encoding=encoding), path)
    documents = [TextDocument(example.name, require_text(example)) for example in without_empty(examples)]
    if not documents:
        raise CorpusError(f"{path} holds nothing but white space")
    return documents


def require_text(example: Example) -> str:
    """The text of an example. CorpusError if it is something else."""
    if isinstance(example.content, Text):
        return example.content.text
    raise CorpusError(
        f"{example.place} holds no text but a prompt, a conversation or token ids: name the column of a text by "
        "`columns` (--columns), as text=COLUMN"
    )


def cut_lone_file(examples: Iterable[Example], source: str | Path) -> Iterator[Example]:
    """The examples of a source; those of a text file that is all of it are its parts, so that some can be held out."""
    is_lone = Path(source).is_file()
    for example in examples:
        if not (is_lone and example.is_file):
            yield example
            continue
        for part in cut_document(TextDocument(example.name, require_text(example))):
            yield example._replace(name=part.name, content=Text(part.text))


def without_empty(examples: Iterable[Example]) -> Iterator[Example]:
    """Examples but for empty texts, whose number a warning tells at the end."""
    empty, first = 0, ""
    for example in examples:
        if isinstance(example.content, Text) and not example.content.text.strip():
            empty, first = empty + 1, first or example.place
        else:
            yield example
    if empty:
        logger.warning(f"{empty} texts are empty and are left out, the first at {first}")


def cut_document(document: TextDocument, part_length: int = PART_LENGTH) -> list[TextDocument]:
    """Cuts a document at line ends into parts of at least `part_length` characters, the last one excepted.

    A line that is longer is cut too: after the first blank or Chinese mark behind `part_length` characters, or where
    twice as many are reached.
    """
    parts, part, length = [], [], 0
    for line in document.text.splitlines(keepends=True):
        for piece in _cut_line(line, part_length):
            part.append(piece)
            length += len(piece)
            if length >= part_length:
                parts.append("".join(part))
                part, length = [], 0
    if part:
        parts.append("".join(part))
    return [TextDocument(f"{document.name}#{number}", part) for number, part in enumerate(parts)]


def _cut_line(line: str, part_length: int) -> Iterator[str]:
    start = 0
    while len(line) - start > 2 * part_length:
        found = BREAK.search(line, start + part_length - 1, start + 2 * part_length)
        stop = found.end() if found else start + 2 * part_length
        yield line[start:stop]
        start = stop
    yield line[start:]


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
    chosen = held_out_numbers([document.name for document in documents], held_out)
    train = [document for number, document in enumerate(documents) if number not in chosen]
    return train, [documents[number] for number in sorted(chosen)]


def held_out_numbers(names: Sequence[str], held_out: float = 0.05) -> set[int]:
    """Which documents of these names `split_corpus` holds out, by their numbers.

    Raises:
        ValueError, CorpusError: as `split_corpus`.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"`held_out` is {held_out}; needed: 0 < held_out < 1")
    if len(names) < 2:
        raise CorpusError(
            f"a corpus of {len(names)} document(s) cannot be split into training and held-out text: it needs two "
            f"files or records, or one text file of more than {PART_LENGTH} characters"
        )
    hashes = [name_hash(name) for name in names]
    count = sum(number < held_out for number in hashes)
    ordered = sorted(range(len(names)), key=hashes.__getitem__)
    return set(ordered[: min(max(count, 1), len(names) - 1)])


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
