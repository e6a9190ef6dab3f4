"""What stands in a GGUF file: fields, and where each tensor is. Knows no meaning, and needs no package.

The gguf package reads the same with ten seconds of work and a gigabyte for the 256,000 tokens of Gemma.
Source: github.com/ggml-org/ggml docs/gguf.md.
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

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
ALIGNMENTS = range(8, 2**16 + 1, 8)
MOST = 2**14  # fields, or tensors; a Gemma-2-2b has 40 and 288
MOST_AXES = 4

Value = TypeVar("Value")


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
    """Raises CheckpointError for a file that is cut, of another version, or has what no model has."""
    content = np.memmap(path, mode="c")
    cursor = _Cursor(memoryview(content), len(MAGIC))
    try:
        version = cursor.number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{path.name} is GGUF of version {version}; take one of version 3")
        tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
        if max(tensor_count, field_count) > MOST:
            raise struct.error(
                f"it has {tensor_count} tensors and {field_count} fields, and no model has more than {MOST}"
            )
        fields = _by_name(cursor.field() for _ in range(field_count))
        tensors = _by_name((tensor.name, tensor) for tensor in (cursor.tensor() for _ in range(tensor_count)))
        alignment = fields.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment not in ALIGNMENTS:
            raise struct.error(f"its tensors are aligned to {str(alignment)[:50]!r} bytes")
        odd = next((tensor.name for tensor in tensors.values() if tensor.start % alignment), None)
        if odd is not None:
            raise struct.error(f"{odd!r} does not begin at a multiple of {alignment} bytes")
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} is not a readable GGUF file ({error}); download it again") from error
    start = -(-cursor.place // alignment) * alignment
    return Container(fields, [tensor._replace(start=start + tensor.start) for tensor in tensors.values()], content)


def _by_name(pairs: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Raises struct.error if two have one name."""
    found: dict[str, Value] = {}
    for name, value in pairs:
        if name in found:
            raise struct.error(f"it has {name!r} twice")
        found[name] = value
    return found


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
        if kind != ARRAY:
            return self.single(kind)
        kind, count = self.number("I"), self.number("Q")
        if kind not in NUMBERS:
            return [self.single(kind) for _ in range(count)]
        size = struct.calcsize(f"<{NUMBERS[kind]}")
        return np.frombuffer(self.take(count * size), dtype=f"<{NUMBERS[kind]}" if size > 1 else NUMBERS[kind]).tolist()

    def single(self, kind: int) -> object:
        """A value that is no array: no field of a model has arrays in an array."""
        if kind == STRING:
            return self.text()
        if kind not in NUMBERS:
            raise struct.error(f"there is a value of type {kind} at {self.place}")
        return self.number(NUMBERS[kind])

    def tensor(self) -> StoredTensor:
        name, axes = self.text(), self.number("I")
        shape = tuple(self.number("Q") for _ in range(min(axes, MOST_AXES)))
        if not 0 < axes <= MOST_AXES or 0 in shape:
            raise struct.error(f"{name!r} has {axes} axes, of {shape}")
        return StoredTensor(name, shape[::-1], self.number("I"), self.number("Q"))
