"""Whether a GGUF file can be what its header says: readers believe every length and count in it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

from minillm.conversion.family import ConversionError
from minillm.conversion.files import first_bytes, require_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# By the numbers of GGUF's types of values.
SCALARS = dict(enumerate("B b H h I i f ?".split())) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, UINT32 = 8, 9, 4
LEAST_SETTING = 13
LEAST_TENSOR = 32
MOST_DIMENSIONS = 4
MOST_NESTED = 4
ALIGNMENT = "general.alignment"


class Cursor:
    """Reads on from a place in a file, and never past its end.

    Raises:
        ConversionError: more is claimed than is there.
    """

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.place, self.order = file, data, 0, "<"

    def take(self, count: int, least: int, what: str) -> int:
        """Passes `count` things of at least `least` bytes each; returns where they begin."""
        self.require(count, least, what)
        begin = self.place
        self.place += count * least
        return begin

    def require(self, count: int, least: int, what: str) -> None:
        if count * least > len(self.data) - self.place:
            raise ConversionError(
                f"{self.file} is damaged or cut off: it claims {count:,} {what} at byte {self.place:,} of "
                f"{len(self.data):,}"
            )

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack_from(self.order + kind, self.data, self.take(1, struct.calcsize("<" + kind), what))[0]

    def text(self) -> str:
        length = self.number("Q", "string")
        begin = self.take(length, 1, "bytes of text")
        return self.data[begin : self.place].decode("utf-8", "replace")

    def skip(self, kind: int, key: str, depth: int = 0) -> None:
        """Passes a value."""
        if kind == STRING:
            self.text()
        elif kind in SCALARS:
            self.take(1, struct.calcsize("<" + SCALARS[kind]), "value")
        elif kind == ARRAY and depth < MOST_NESTED:
            inner, count = self.number("I", "type"), self.number("Q", "length")
            if inner in SCALARS:
                self.take(count, struct.calcsize("<" + SCALARS[inner]), f"values of `{key}`")
                return
            self.require(count, 8, f"values of `{key}`")
            for _ in range(count):
                self.skip(inner, key, depth + 1)
        else:
            raise ConversionError(f"{self.file} is damaged: `{key}` has type {kind}, which GGUF does not know")


def check_header(file: Path) -> None:
    """Walks the header of a GGUF file.

    Raises:
        ConversionError: it is no GGUF file, or one that is damaged or cut off.
    """
    if not first_bytes(require_file(file)).startswith(MAGIC):
        raise ConversionError(f"{file} is no GGUF file: it does not begin with {MAGIC.decode()}")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(file, data)
        cursor.take(len(MAGIC), 1, "bytes")
        version = cursor.number("I", "version")
        if not version & 0xFFFF:
            cursor.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in VERSIONS:
            raise ConversionError(f"{file} is GGUF of version {version}; known: {', '.join(map(str, VERSIONS))}")
        tensors, settings = cursor.number("Q", "number of tensors"), cursor.number("Q", "number of settings")
        cursor.require(settings, LEAST_SETTING, "settings")
        alignment = 32
        for _ in range(settings):
            key, kind = cursor.text(), cursor.number("I", "type")
            if key == ALIGNMENT and kind == UINT32:
                alignment = cursor.number("I", "alignment")
            else:
                cursor.skip(kind, key)
        cursor.require(tensors, LEAST_TENSOR, "tensors")
        if not alignment:
            raise ConversionError(f"{file} is damaged: `{ALIGNMENT}=0`")
        check_tensors(cursor, tensors, alignment)


def check_tensors(cursor: Cursor, count: int, alignment: int) -> None:
    """Checks that each tensor has bytes of its own in the file, from the end of the header on."""
    from gguf import GGML_QUANT_SIZES

    file, found = cursor.file, []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I", "dimensions")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ConversionError(f"{file} is damaged: `{name}` has {dimensions:,} dimensions")
        shape = [cursor.number("Q", "size") for _ in range(dimensions)]
        kind, offset = cursor.number("I", "type"), cursor.number("Q", "offset")
        if kind not in GGML_QUANT_SIZES:
            raise ConversionError(f"{file} holds `{name}` in a type ({kind}) that the package gguf does not know")
        block, size = GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[0] % block:
            raise ConversionError(f"{file} is damaged: `{name}` has shape {shape}")
        found.append((offset, offset + math.prod(shape) // block * size, name))
    held = len(cursor.data) - -(-cursor.place // alignment) * alignment
    for _, end, name in found:
        if end > held:
            raise ConversionError(
                f"{file} is damaged or cut off: `{name}` would end {end - held:,} bytes after the file"
            )
    for (_, end, name), (begin, _, other) in pairwise(sorted(found)):
        if begin < end:
            raise ConversionError(f"{file} is damaged: `{name}` and `{other}` overlap")
