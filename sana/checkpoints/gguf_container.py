"""What stands in a GGUF file: fields, and where each tensor is. Knows no meaning, and needs no package.

The gguf package reads the same with ten seconds of work and a gigabyte for the 256,000 tokens of Gemma.
Source: github.com/ggml-org/ggml docs/gguf.md.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Types of values by their numbers, as `struct` and NumPy write them.
NUMBERS = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), ("B", "b", "H", "h", "I", "i", "f", "?", "Q", "q", "d"), strict=True)
)
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # of tensors, in bytes, unless a field says otherwise


class StoredTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # rows first
    kind: int  # of its blocks, by ggml's number
    start: int  # in bytes of the file


class Container(NamedTuple):
    fields: dict[str, object]
    tensors: list[StoredTensor]
    content: np.ndarray  # the file as bytes, mapped; what is written to it stays in memory


def is_gguf(path: Path | str) -> bool:
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_container(path: Path) -> Container:
    """Raises CheckpointError for a file that is cut or of another version."""
    content = np.memmap(path, mode="c")
    cursor = _Cursor(memoryview(content), len(MAGIC))
    try:
        version = cursor.number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{path.name} is GGUF of version {version}; take one of version 3")
        tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
        fields = dict(cursor.field() for _ in range(field_count))
        tensors = [cursor.tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", ALIGNMENT)
        start = -(-cursor.place // alignment) * alignment
    except (struct.error, KeyError, TypeError, ZeroDivisionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} is not a readable GGUF file ({error}); download it again") from error
    return Container(fields, [tensor._replace(start=start + tensor.start) for tensor in tensors], content)


class _Cursor:
    """Reads values one after another."""

    def __init__(self, content: memoryview, place: int) -> None:
        self.content, self.place = content, place

    def number(self, kind: str) -> int | float | bool:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def take(self, count: int) -> bytes:
        if count > len(self.content) - self.place:
            raise struct.error(f"{count} bytes are asked for at {self.place} of {len(self.content)}")
        self.place += count
        return bytes(self.content[self.place - count : self.place])

    def field(self) -> tuple[str, object]:
        return self.text(), self.value(self.number("I"))

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind not in NUMBERS:
            return [self.value(kind) for _ in range(count)]
        size = struct.calcsize(f"<{NUMBERS[kind]}")
        return np.frombuffer(self.take(count * size), dtype=f"<{NUMBERS[kind]}" if size > 1 else NUMBERS[kind]).tolist()

    def tensor(self) -> StoredTensor:
        name, axes = self.text(), self.number("I")
        shape = tuple(self.number("Q") for _ in range(axes))
        return StoredTensor(name, shape[::-1], self.number("I"), self.number("Q"))
