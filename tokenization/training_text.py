"""What a tokenizer is trained on: streams of texts and text files, checked.

It imports the standard library only, since it travels with a checkpoint.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 16


class Corpus:
    """Checks texts as they stream into a trainer, and remembers which characters came by."""

    def __init__(self, texts: Iterable[str | Sequence[str]]) -> None:
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be an iterable of strings, not one {type(texts).__name__}")
        self.texts = texts
        self.characters: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        for index, item in enumerate(self.texts):
            for text in [item] if isinstance(item, str) else self.check_batch(index, item):
                self.characters.update(text)
                yield text

    def check_batch(self, index: int, batch: Any) -> Sequence[str]:
        if not isinstance(batch, (list, tuple)) or not all(isinstance(text, str) for text in batch):
            raise TypeError(f"texts[{index}] must be a string or a list of strings, not {batch!r:.80}")
        return batch


def check_text_files(paths: Iterable[str | Path]) -> list[Path]:
    if isinstance(paths, (str, Path)):
        paths = [paths]
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError("paths is empty: name at least one text file")
    for path in files:
        if not path.exists():
            raise FileNotFoundError(f"corpus file {path} does not exist")
        if not path.is_file():
            raise ValueError(f"corpus path {path} is not a file: name text files, not folders")
        try:
            with path.open("rb") as file:
                start = file.read(CHUNK_BYTES)
        except OSError as error:
            raise OSError(error.errno, f"corpus file cannot be read ({error.strerror})", str(path)) from error
        if b"\0" in start:
            raise ValueError(f"corpus file {path} is binary (it holds zero bytes); text in UTF-8 is needed")
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"the corpus is empty: none of the {len(files)} files in paths holds any text")
    return files


def read_text_files(files: Iterable[Path]) -> Iterator[str]:
    """Yields whole lines in chunks, so that line breaks and the blanks after them stay together."""
    for path in files:
        with path.open("rb") as file:
            offset = 0
            while chunk := b"".join(file.readlines(CHUNK_BYTES)):
                try:
                    yield chunk.decode("utf-8")
                except UnicodeDecodeError as error:
                    position = offset + error.start
                    raise ValueError(f"corpus file {path} is not text in UTF-8: byte {position}: {error}") from error
                offset += len(chunk)
