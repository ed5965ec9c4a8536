"""Packing a source of any length into a folder of rows, window by window, so that a run that was ended goes on."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from minillm.data.documents import NothingToScoreError, Piece
from minillm.data.packed_rows import MANIFEST, Manifest, PackedRows, Shard, arrow
from minillm.publishing.folders import made, reserved

logger = logging.get_logger(__name__)

LARGEST_WINDOW = 2**30
FIRST_SAMPLES = 4
"""How many samples at the start of each window tell a source from another."""

ID_FIELDS = ("input_ids", "prompt_ids", "completion_ids")

PackWindow = Callable[[list[Any]], list[list[Piece]]]


def pack_into(
    folder: str | Path, samples: Iterable[Any], pack: PackWindow, settings: dict[str, Any], window_tokens: int
) -> PackedRows:
    """The rows of a source, read and packed in windows, a file each; goes on where an earlier run was ended.

    Args:
        folder: what others keep in it stays.
        samples: a sequence or a stream, from its beginning in every call. Of a sequence the length and the first
            samples of each window are compared with a complete folder, of a stream its first samples alone.
        pack: makes rows of the samples of a window.
        settings: all that decides the rows beside `window_tokens`, as JSON can hold it.
        window_tokens: a window ends with the sample that completes so many.

    Raises:
        ValueError: the folder holds rows of other settings, of another source or something that is no packed row; no
            samples; a sample that `pack` refuses.
        FolderInUse: another process packs into the folder.
        OSError: the disk is full; another call goes on with what is complete.
        ImportError: pyarrow is missing.
    """
    arrow()
    if not 1 <= window_tokens <= LARGEST_WINDOW:
        raise ValueError(f"`window_tokens` is {window_tokens}; needed: 1 to {LARGEST_WINDOW:,}")
    if isinstance(samples, Mapping):
        raise ValueError(f"`samples` is a mapping with {', '.join(map(repr, list(samples)[:5]))}: give one of these")
    folder = Path(folder).absolute()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: choose another folder")
    source = Source(samples, folder)
    # Compared with what JSON gives back, which has no tuples.
    settings = json.loads(json.dumps({**settings, "window_tokens": window_tokens}))
    if not is_complete(folder, source, settings):
        with reserved(folder), made(folder):
            # Another process may have just finished.
            if not is_complete(folder, source, settings):
                manifest = begun(folder) or Manifest(settings, source.length)
                require_own(folder, manifest)
                write_windows(folder, source, pack, manifest)
    return PackedRows(folder)


def begun(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if no file of rows is complete, so that nothing binds."""
    manifest = Manifest.read(folder)
    return manifest if manifest is not None and manifest.shards else None


def is_complete(folder: Path, source: "Source", settings: dict[str, Any]) -> bool:
    """Whether nothing is left to pack. ValueError if the folder holds rows of other settings or of another source."""
    manifest = begun(folder)
    if manifest is None:
        return False
    if manifest.settings != settings:
        then, now = manifest.settings, settings
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        told = ", ".join(f"`{name}` was {then.get(name)!r:.80}, now {now.get(name)!r:.80}" for name in names)
        raise ValueError(f"{folder} holds rows of other settings ({told}): repeat them, or choose another folder")
    source.check_length(manifest)
    if manifest.complete:
        source.check_starts(manifest)
    return manifest.complete


def require_own(folder: Path, manifest: Manifest) -> None:
    """Checks that no file is overwritten that is not known to be ours, and that none of ours is lost."""
    for shard in manifest.shards:
        shard.check(folder)
    known = {shard.file for shard in manifest.shards}
    if (folder / MANIFEST).exists():
        # A process that was killed may have left it before it said so.
        known.add(manifest.next_file())
    foreign = sorted(path.name for path in folder.glob("rows-*.arrow") if path.name not in known)
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]}, which is not of this run: choose another folder")


def write_windows(folder: Path, source: "Source", pack: PackWindow, manifest: Manifest) -> None:
    """Packs what is not in a complete file yet."""
    for window, is_last in windows(source.behind(manifest), manifest.settings["window_tokens"]):
        if not window and not manifest.shards:
            raise ValueError("there are no samples to pack")
        rows = pack_window(window, pack, manifest.samples) if window else []
        if is_last and not rows and not any(shard.rows for shard in manifest.shards):
            raise NothingToScoreError("the data set holds no token to score")
        if window:
            if not manifest.shards:
                # By it a file that is not listed yet is known to be ours.
                manifest.write(folder)
            first = fingerprint(window[:FIRST_SAMPLES])
            manifest.shards.append(Shard.write(folder / manifest.next_file(), rows, len(window), first))
            logger.info(f"{folder}: {manifest.samples:,} samples packed")
        manifest.complete = is_last
        manifest.write(folder)
        # Else they would be kept until the next window is whole.
        window.clear()
        rows = []


def pack_window(window: list[Any], pack: PackWindow, start: int) -> list[list[Piece]]:
    """The rows of samples, the first of which is number `start` of the source; none if they hold nothing to score."""
    try:
        return pack(window)
    except NothingToScoreError:
        logger.warning(f"{len(window)} samples from number {start} on hold no token to score and are left out")
        return []
    except ValueError as error:
        raise ValueError(f"in the window of {len(window)} samples from number {start} on: {error}") from error


def windows(samples: Iterator[Any], window_tokens: int) -> Iterator[tuple[list[Any], bool]]:
    """Samples of at least `window_tokens` tokens, and whether they are the last, which may be fewer or none."""
    window, tokens = [], 0
    for sample in samples:
        window.append(sample)
        tokens += count_tokens(sample)
        if tokens >= window_tokens:
            yield window, False
            window, tokens = [], 0
    yield window, True


class Source:
    """Samples to pack, which are compared with those that a folder was packed from."""

    def __init__(self, samples: Iterable[Any], folder: Path) -> None:
        self.samples: Any = samples
        self.folder = folder
        is_sequence = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
        self.length: int | None = len(self.samples) if is_sequence else None

    def check_length(self, manifest: Manifest) -> None:
        then = manifest.source_length
        if then is None and manifest.complete:
            then = manifest.samples
        if None not in (then, self.length) and then != self.length:
            raise self._other(f"it had {then:,} samples, this one has {self.length:,}")

    def check_starts(self, manifest: Manifest) -> None:
        """ValueError if the samples are others, by the first of each file; of a stream, which would have to be read as
        far, by the first of all."""
        if self.length is not None:
            self.behind(manifest)
        else:
            shard = manifest.shards[0]
            self._compare(list(islice(self.samples, min(FIRST_SAMPLES, shard.samples))), shard, 0)

    def behind(self, manifest: Manifest) -> Iterator[Any]:
        """The samples that are in no complete file. ValueError if those that are differ, by the first of each file."""
        start, stream = 0, None if self.length is not None else iter(self.samples)
        for shard in manifest.shards:
            looked = min(FIRST_SAMPLES, shard.samples)
            if stream is None:
                first = [self.samples[index] for index in range(start, start + looked)]
            else:
                first = list(islice(stream, looked))
            self._compare(first, shard, start)
            if stream is not None:
                deque(islice(stream, shard.samples - looked), maxlen=0)
            start += shard.samples
        return (self.samples[index] for index in range(start, len(self.samples))) if stream is None else stream

    def _compare(self, first: list[Any], shard: Shard, start: int) -> None:
        if fingerprint(first) != shard.first:
            last = start + min(FIRST_SAMPLES, shard.samples) - 1
            raise self._other(f"its samples {start} to {last} are others, or missing")

    def _other(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.folder} was packed from another source ({reason}): give that one, from its beginning, or choose "
            "another folder"
        )


def count_tokens(sample: Any) -> int:
    """About how many tokens a sample has, at least 1; what is no sample is refused later."""
    parts = [sample.get(name) for name in ID_FIELDS] if isinstance(sample, Mapping) else [sample]
    try:
        return max(1, sum(len(part) for part in parts if part is not None))
    except TypeError:
        return 1


def fingerprint(samples: list[Any]) -> str:
    """A hash of the integers in samples, whether they come as lists, arrays or tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        fields = sample if isinstance(sample, Mapping) else {"input_ids": sample}
        for name in sorted(fields):
            try:
                values = np.asarray(fields[name])
            except ValueError:
                # Nested lists of unequal lengths: nothing that a collator reads.
                continue
            if values.dtype.kind in "iub":
                digest.update(f"{name}:{values.size}:".encode())
                digest.update(np.ascontiguousarray(values, "<i8").tobytes())
    return digest.hexdigest()
