"""Records out of files: what kind of file it is, its name tells; what a record means is told in `records.py`.

| name ends in | a record is |
|---|---|
| `.jsonl`, `.ndjson` | a line |
| `.json` | an entry of the list, the object, or a line |
| `.csv`, `.tsv` | a row, all of whose cells are strings |
| `.parquet`, `.arrow`, `.feather` | a row |
| anything else | the whole text, `{"text": ...}` |

Each may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`), but for those of Arrow, which compress themselves.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from transformers.utils import logging

logger = logging.get_logger(__name__)

ROWS_AT_ONCE = 1024
LONGEST_CELL = 2**31 - 1
# What `datasets` writes with `save_to_disk`.
SAVED_DATASETS = ("dataset_dict.json", "state.json")
# Of a data set, beside its files: a description.
CARD = re.compile(r"(readme|license|licence)(\.\w+)?", re.IGNORECASE)
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names the path and the reason."""


class NotText(CorpusError):
    """Something that is no file, or a file that is empty or no text."""


class Record(NamedTuple):
    """What stands at one place of a source.

    Attributes:
        place: the file, and in it the line or row (from 1 on), as an error names it.
        name: the same relative to the source, with "/" between folders; it is no other's.
        fields: keys and values; of a text file `{"text": all of it}`.
        is_file: the record is a whole text file.
    """

    place: str
    name: str
    fields: Mapping[str, Any]
    is_file: bool = False


def read_records(source: str | Path, encoding: str = "utf-8") -> Iterator[Record]:
    """The records of a file, of all files below a folder, or of a data set of the library `datasets`, one by one.

    In a folder hidden files are left out. What is no text there (also broken links, pipes and sockets) is skipped with
    a warning, as is a `.json` that holds no records, and the description of a data set (`README.md`, `LICENSE`) beside
    files of records.

    Args:
        source: a file or folder; a folder that `datasets` saved (its split `train`); or, where nothing stands at this
            path, the name of a data set, `NAME`, `NAME:CONFIGURATION` or `NAME:CONFIGURATION:SPLIT` (the split is
            `train` if none is given), for `datasets.load_dataset`.
        encoding: of text, JSON and CSV, as Python names it; a byte order mark of UTF-8 is left out.

    Raises:
        FileNotFoundError: there is nothing at `source`, and it cannot be the name of a data set.
        CorpusError: anything else that keeps it from being read; the message names file, line and reason.
        ImportError: a library is missing that the kind of file needs; the message has the line that installs it.
    """
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise CorpusError(
            f"the encoding {encoding!r} is unknown: name one of Python's, such as utf-8 or gbk"
        ) from error
    path = Path(source)
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED_DATASETS):
            yield from _saved_dataset(path)
        else:
            yield from _folder(path, encoding)
    elif path.is_file():
        yield from _file(path, path.name, encoding)
    elif path.exists():
        raise CorpusError(f"the corpus {path} is neither a file nor a folder")
    elif NAME.fullmatch(str(source)) and _container(Path(str(source)))[0] is None:
        yield from _named_dataset(str(source))
    else:
        raise FileNotFoundError(f"the corpus {path} does not exist")


def _container(path: Path) -> tuple[Callable[..., Iterator[Record]] | None, str]:
    """What reads a file of records (None: it is text), and the ending that tells of compression ("" without)."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings.pop() if endings and endings[-1] in OPENERS else ""
    return READERS.get(endings[-1] if endings else ""), packed


def _file(path: Path, name: str, encoding: str) -> Iterator[Record]:
    reader, packed = _container(path)
    try:
        if reader is not None and reader in (_parquet, _arrow_file):
            if packed:
                raise CorpusError(f"{path}: files of Arrow and Parquet compress themselves; unpack it first")
            yield from reader(path, name)
        else:
            with OPENERS[packed](path, "rb") if packed else path.open("rb") as file:
                yield from (reader or _text)(path, name, file, encoding)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is damaged, or is not what its name says: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
    except CorpusError:
        raise
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise CorpusError(f"{path} is damaged, or is not what its name says: {error}") from error


def _folder(root: Path, encoding: str) -> Iterator[Record]:
    paths = [path for path in sorted(root.rglob("*")) if not path.is_dir()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    has_records = any(_container(path)[0] is not None for path in paths)
    found, refused = False, []
    for path in paths:
        try:
            if not path.is_file():
                raise NotText(f"{path} is no file but a broken link or a special one")
            if has_records and CARD.fullmatch(path.name):
                raise NotText(f"{path} describes the files of records beside it")
            for record in _file(path, path.relative_to(root).as_posix(), encoding):
                found = True
                yield record
        except NotText as error:
            refused.append(error)
    if not found:
        reason = f"; {len(refused)} files were skipped, the first because {refused[0]}" if refused else ""
        raise CorpusError(f"the corpus folder {root} holds no text{reason}")
    if refused:
        logger.warning(f"{len(refused)} files of the corpus {root} were skipped, the first because {refused[0]}")


def decode(data: bytes, encoding: str, place: str, offset: int = 0) -> str:
    """Bytes as text. NotText if they are none."""
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" and not offset else encoding
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        raise NotText(
            f"{place} is not {_shown(encoding)} text (byte {offset + error.start}): name its own encoding "
            "(`encoding`, --encoding), such as gbk"
        ) from error
    if "\0" in text:
        at = data.find(0)
        raise NotText(f"{place} is binary (a zero byte at {offset + at})")
    return text


def _shown(encoding: str) -> str:
    return "UTF-8" if codecs.lookup(encoding).name == "utf-8" else encoding


def _text(path: Path, name: str, file: IO[bytes], encoding: str) -> Iterator[Record]:
    data = file.read()
    if not data.strip():
        raise NotText(f"{path} is empty")
    yield Record(str(path), name, {"text": decode(data, encoding, str(path)).replace("\r\n", "\n")}, is_file=True)


def _lines(path: Path, file: IO[bytes], encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers. Only `\\n` ends one: JSON allows U+2028 and its like inside a string."""
    if "\n".encode(encoding) == b"\n":
        offset = 0
        for number, line in enumerate(file, 1):
            yield number, decode(line, encoding, f"{path} line {number}", offset)
            offset += len(line)
        return
    # A line break has two bytes or more there (UTF-16), so lines are known only when all is decoded.
    text = decode(file.read(), encoding, str(path))
    yield from enumerate(io.StringIO(text, newline="\n"), 1)


def parse_json(text: str, place: str) -> Any:
    """A value of JSON. CorpusError, naming the place, if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a list of records belongs into a .json" if text.lstrip().startswith("[") else ""
        raise CorpusError(
            f"{place} is no JSON: {error.msg} (column {error.colno}); needed: an object on each line{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place} is no JSON: {error or type(error).__name__}") from error


def _json_lines(path: Path, name: str, file: IO[bytes], encoding: str) -> Iterator[Record]:
    empty = True
    for number, line in _lines(path, file, encoding):
        if line.strip():
            empty = False
            yield _record(path, name, "line", number, parse_json(line, f"{path} line {number}"))
    if empty:
        raise NotText(f"{path} is empty")


def _record(path: Path, name: str, unit: str, number: int, value: Any) -> Record:
    place = f"{path} {unit} {number}"
    if not isinstance(value, dict):
        raise CorpusError(f"{place} holds {value!r:.40}; needed: an object with named fields")
    return Record(place, f"{name}#{number}", value)


def _json(path: Path, name: str, file: IO[bytes], encoding: str) -> Iterator[Record]:
    data = file.read()
    if not data.strip():
        raise NotText(f"{path} is empty")
    text = decode(data, encoding, str(path))
    del data
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not _is_json(text.strip().partition("\n")[0]):
            raise CorpusError(f"{path} is no JSON: {error or type(error).__name__}") from error
        # Lines of JSON under a name that promises one value.
        yield from _json_lines(path, name, io.BytesIO(text.encode("utf-8", "surrogatepass")), "utf-8")
        return
    del text
    if isinstance(value, dict):
        if not any(field in value for field in RECORD_FIELDS):
            raise NotText(f"{path} holds one object with the keys {sorted(value)[:8]}; needed: a list of records")
        value = [value]
    if not isinstance(value, list) or not value:
        raise NotText(f"{path} holds {value!r:.40}; needed: a list of records")
    entries, number = deque(value), 0
    del value
    while entries:
        number += 1
        # So each is held no longer than it is needed.
        yield _record(path, name, "record", number, entries.popleft())


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, name: str, file: IO[bytes], encoding: str) -> Iterator[Record]:
    """Rows under the first one, which names the columns. Not by pandas or `datasets`, which read 007 as 7.0."""
    endings = [ending.lower() for ending in path.suffixes]
    # The limit, 128 kB, is the whole process's, and so is what is set here.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    lines = (line for _, line in _lines(path, file, encoding))
    reader = csv.reader(lines, delimiter="\t" if ".tsv" in endings else ",", strict=True)
    columns: list[str] | None = None
    start = 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise CorpusError(f"{path} line {reader.line_num}: {error}") from error
        first, start = start + 1, reader.line_num
        if row is None:
            break
        if columns is None:
            columns = row
            if len(columns) == 1 and ";" in columns[0]:
                raise CorpusError(f"{path} line 1 separates cells by semicolons; needed: commas, or tabs in a .tsv")
            if len(set(columns)) < len(columns):
                raise CorpusError(f"{path} line 1 names a column twice: {columns}")
        elif row:
            if len(row) != len(columns):
                raise CorpusError(f"{path} line {first} has {len(row)} cells under the {len(columns)} of line 1")
            yield _record(path, name, "line", first, dict(zip(columns, row, strict=True)))
    if columns is None:
        raise NotText(f"{path} is empty")


def _parquet(path: Path, name: str) -> Iterator[Record]:
    with _damaged(path):
        batches = library("pyarrow.parquet").ParquetFile(path).iter_batches(ROWS_AT_ONCE)
    yield from _batches(path, name, batches)


def _arrow_file(path: Path, name: str) -> Iterator[Record]:
    ipc = library("pyarrow.ipc")
    invalid = library("pyarrow").ArrowInvalid
    with library("pyarrow").memory_map(str(path)) as file, _damaged(path):
        try:
            opened = ipc.open_file(file)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        except invalid:
            file.seek(0)
            # What `datasets` writes is a stream.
            batches = iter(ipc.open_stream(file))
        yield from _batches(path, name, batches)


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except library("pyarrow").ArrowException as error:
        raise CorpusError(f"{path} is damaged, or is not what its name says: {error}") from error


def _batches(path: Path, name: str, batches: Iterator[Any]) -> Iterator[Record]:
    number = 0
    with _damaged(path):
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield _record(path, name, "row", number, row)
    if not number:
        raise NotText(f"{path} is empty")


def _saved_dataset(path: Path) -> Iterator[Record]:
    datasets = library("datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} holds no data set that `datasets` can load: {error}") from error
    yield from _rows(str(path), found, "train")


def _named_dataset(name: str) -> Iterator[Record]:
    repository, configuration, split = (*name.split(":"), "", "")[:3]
    try:
        datasets = library("datasets")
    except ImportError as error:
        raise ImportError(f"{repository} is no file or folder here; {error}") from error
    try:
        found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        # Hubs, scripts and files in them fail with unrelated classes.
        raise CorpusError(
            f"{repository} is no file or folder here, and no data set that `datasets` can load: {error}"
        ) from error
    yield from _rows(name, found, split or "train")


def _rows(name: str, found: Any, split: str) -> Iterator[Record]:
    if isinstance(found, Mapping):
        if split not in found:
            raise CorpusError(f"{name} has no split {split!r}; it has {sorted(found)}: name one, as NAME::SPLIT")
        found = found[split]
    for number, row in enumerate(found, 1):
        yield Record(f"{name} row {number}", f"{split}#{number}", row)


def library(name: str) -> ModuleType:
    """A library that reading some kinds of files needs, or a module of it. ImportError with the line that installs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"this kind of data needs {package}: pip install 'minillm-hf[train]'") from error


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    return io.BufferedReader(library("zstandard").open(path, mode))


OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
}
READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow_file,
    ".feather": _arrow_file,
}
RECORD_FIELDS = ("text", "prompt", "instruction", "conversations", "messages", "input_ids")
"""By these an object in a `.json` is known as a record."""
