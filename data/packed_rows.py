"""Rows of packed documents in a folder: Arrow files that are mapped into memory and decoded row by row.

`rows-00000.arrow`, `rows-00001.arrow`, ... hold a record batch each, with a list for each row and column: `input_ids`
(int32), `scored` (a bit for each token), `document_lengths` (int32) and, where prefixes are fixed, `prefix_mask` (the
smallest integers that do). `packed_rows.json` says which files are complete and what they were made from.
"""

import importlib
import json
import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsIndex, overload

import numpy as np
from torch.utils.data import Dataset

from minillm.data.documents import IGNORE_INDEX, Piece
from minillm.publishing.folders import new_file, write_atomically

MANIFEST = "packed_rows.json"
FORMAT = 1
LARGEST_ID = 2**31 - 1

Row = dict[str, list[int]]


class PackedRows(Dataset):
    """The rows that `pack_dataset(..., folder=...)` wrote, read from disk as they are asked for.

    `rows[3]` is the mapping that `pack_dataset` makes without a folder: lists of ints `input_ids`, `document_ids`,
    `labels` and, with fixed prefixes, `prefix_mask`, of at most `max_length` tokens each. A slice or a list of numbers
    gives a list of them. Files are opened when a row of theirs is first asked for, in each worker process anew.

    Attributes:
        folder: where the files are.
        num_tokens: tokens of all rows.

    Raises:
        ValueError: the folder holds no packed rows, packing is not complete, or a file is missing or was changed.
    """

    def __init__(self, folder: str | Path) -> None:
        arrow()
        self.folder = Path(folder).absolute()
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise ValueError(f"{self.folder} holds no packed rows: `pack_dataset(..., folder=...)` makes them")
        if not manifest.complete:
            raise ValueError(
                f"packing into {self.folder} is not complete: `pack_dataset` with the same arguments goes on with it"
            )
        for shard in manifest.shards:
            shard.check(self.folder)
        self._files = [shard.file for shard in manifest.shards]
        self._ends = list(accumulate(shard.rows for shard in manifest.shards))
        self._batches: dict[int, Any] = {}
        self.num_tokens = sum(shard.tokens for shard in manifest.shards)

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, key: SupportsIndex) -> Row: ...

    @overload
    def __getitem__(self, key: slice | Sequence[SupportsIndex]) -> list[Row]: ...

    def __getitem__(self, key: Any) -> Row | list[Row]:
        if isinstance(key, slice):
            key = range(*key.indices(len(self)))
        if np.ndim(key):
            return [self[index] for index in key]
        index = operator.index(key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        return decode(self._batch(number), index - (self._ends[number - 1] if number else 0))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"PackedRows({str(self.folder)!r}): {len(self):,} rows, {self.num_tokens:,} tokens"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}

    def _batch(self, number: int) -> Any:
        if number not in self._batches:
            # The mapping outlives its file, so that any number of files takes no descriptors.
            with arrow().memory_map(str(self.folder / self._files[number])) as file:
                self._batches[number] = arrow("ipc").open_file(file).get_batch(0)
        return self._batches[number]


@dataclass(frozen=True)
class Shard:
    """What one file holds: the rows of a window of the source.

    Attributes:
        file: its name.
        bytes: its size.
        rows, tokens: how many it holds.
        samples: of the source, that were read for it.
        first: a hash of the first of these.
    """

    file: str
    bytes: int
    rows: int
    tokens: int
    samples: int
    first: str

    @classmethod
    def write(cls, path: Path, rows: Sequence[list[Piece]], samples: int, first: str) -> "Shard":
        """Writes a file in one step."""
        batch = encode(rows)
        with new_file(path) as partial:
            with arrow().OSFile(str(partial), "wb") as file, arrow("ipc").new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            size = partial.stat().st_size
        return cls(path.name, size, len(rows), len(batch["input_ids"].values), samples, first)

    def check(self, folder: Path) -> None:
        """ValueError if the file is not as it was written, judged by its size."""
        path = folder / self.file
        size = path.stat().st_size if path.is_file() else None
        if size != self.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes in place of {self.bytes:,}"
            raise ValueError(f"{path} {found}: remove the folder, and pack again")


@dataclass
class Manifest:
    """What a folder of packed rows is made from, and how far it is.

    Attributes:
        settings: all that decides the rows, as JSON holds it.
        source_length: samples of the source; None of a stream.
        shards: the files that are complete.
        complete: the source was read to its end.
    """

    settings: dict[str, Any]
    source_length: int | None
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """That of a folder; None if it has none. ValueError if it cannot be read."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text("utf-8"))
            if values.pop("format") == FORMAT:
                return cls(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: remove the folder, and pack again") from error
        raise ValueError(f"{path} is of another version of MiniLLM: choose another folder")

    def write(self, folder: Path) -> None:
        write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @property
    def samples(self) -> int:
        """Of the source, that are in complete files."""
        return sum(shard.samples for shard in self.shards)

    def next_file(self) -> str:
        return f"rows-{len(self.shards):05d}.arrow"


def encode(rows: Sequence[list[Piece]]) -> Any:
    """Rows as an Arrow record batch. ValueError if an id does not fit into int32."""
    pa = arrow()
    ids = [np.concatenate([piece.input_ids for piece in row]) for row in rows]
    largest = max((int(row.max()) for row in ids), default=0)
    if largest > LARGEST_ID:
        raise ValueError(f"`input_ids` hold {largest}; rows on disk hold ids up to {LARGEST_ID}")
    scored = [np.concatenate([piece.labels for piece in row]) != IGNORE_INDEX for row in rows]
    lengths = [np.array([len(piece.input_ids) for piece in row], np.int32) for row in rows]
    columns = {
        "input_ids": pa.array([row.astype(np.int32) for row in ids], pa.list_(pa.int32())),
        "scored": pa.array(scored, pa.list_(pa.bool_())),
        "document_lengths": pa.array(lengths, pa.list_(pa.int32())),
    }
    # Some rows may have been packed before, with prefixes of their own.
    masks: list[list[Any]] = [[piece.prefix_mask for piece in row] for row in rows]
    prompts = [None if of_row[0] is None else np.concatenate(of_row) for of_row in masks]
    fixed = [row for row in prompts if row is not None]
    if fixed:
        least, most = min(int(row.min()) for row in fixed), max(int(row.max()) for row in fixed)
        kind = np.promote_types(np.min_scalar_type(least), np.min_scalar_type(most))
        small = [row if row is None else row.astype(kind) for row in prompts]
        columns["prefix_mask"] = pa.array(small, pa.list_(pa.from_numpy_dtype(kind)))
    return pa.record_batch(columns)


def decode(batch: Any, row: int) -> Row:
    """A row of a record batch, in the form of a packed row."""
    found = {name: batch[name][row].values for name in batch.schema.names}
    stored = {name: values.to_numpy(zero_copy_only=False) for name, values in found.items() if values is not None}
    ids, lengths = stored["input_ids"], stored["document_lengths"]
    columns = {
        "input_ids": ids,
        "document_ids": np.repeat(np.arange(1, len(lengths) + 1), lengths),
        "labels": np.where(stored["scored"], ids, IGNORE_INDEX),
    }
    if "prefix_mask" in stored:
        columns["prefix_mask"] = stored["prefix_mask"]
    return {name: values.tolist() for name, values in columns.items()}


def arrow(part: str = "") -> ModuleType:
    """pyarrow, or a module of it. ImportError with the line that installs it if it is missing."""
    try:
        return importlib.import_module(f"pyarrow.{part}".rstrip("."))
    except ImportError as error:
        raise ImportError("rows on disk need pyarrow: pip install 'minillm-hf[train]'") from error
