"""Which rows of a file of prompts are done, and what became of each: a folder of Parquet files."""

import json
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO

import pyarrow as arrow
from pyarrow import parquet

from .places import Place

FOLDER = "manifest"
ROWS, SECONDS = 1000, 60.0  # of a part; after so many or so long it is written
SCHEMA = arrow.schema(
    [
        ("row", arrow.int64()),
        ("key", arrow.int64()),
        ("name", arrow.string()),
        ("prompt", arrow.string()),
        ("seed", arrow.int64()),
        ("settings", arrow.string()),
        ("file", arrow.string()),
        ("sha256", arrow.string()),
        ("seconds", arrow.float64()),
        ("worker", arrow.string()),
        ("error", arrow.string()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """What became of a row: a file, or an error in a sentence."""

    row: int
    key: int  # of `Row.key`
    name: str | None = None
    prompt: str = ""
    seed: int | None = None
    settings: str = "{}"  # with everything needed to draw it again, as JSON; see `Plan.record`
    file: str | None = None  # relative to the output
    sha256: str | None = None
    seconds: float | None = None  # of the worker; None for a picture that was there already
    worker: str | None = None
    error: str | None = None


class Manifest:
    """Of one run, which alone writes it. Raises ValueError for a part that is damaged, and OSError.

    retry: forget the rows that could not be drawn.
    """

    def __init__(self, place: Place, *, retry: bool = False) -> None:
        self.place = place
        self.done = array("q")  # for each row the key of its entry; -1: it has none
        self.count = 0  # rows that have one
        self.failed: set[int] = set()  # rows whose entry is an error
        self._part_of = array("i")  # for each row the part that its entry is in
        self._outdated: dict[int, set[int]] = {}  # by part, rows that have a later entry
        self._waiting: list[Entry] = []
        self._since = time.monotonic()
        self._parts = 0
        for name in place.names(FOLDER):
            self._parts = int(name.removeprefix("part-").removesuffix(".parquet"))
            table = self._read(name)
            if retry and table["error"].null_count < len(table):
                table = table.filter(arrow.compute.is_null(table["error"]))
                place.write(f"{FOLDER}/{name}", _content(table))
            for row, key, error in zip(*(table[column].to_pylist() for column in ("row", "key", "error")), strict=True):
                self._mark(row, key, error)
            self._parts += 1
        self._drop_outdated()

    def has(self, row: int, key: int) -> bool:
        """Whether there is an entry of this row, as it is now."""
        return row < len(self.done) and self.done[row] == key

    def add(self, entry: Entry) -> None:
        """Keep an entry; it is written with others, and before `flush` returns."""
        self._mark(entry.row, entry.key, entry.error)
        self._waiting.append(entry)
        if len(self._waiting) >= ROWS or time.monotonic() - self._since >= SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            columns = {name: [getattr(entry, name) for entry in self._waiting] for name in SCHEMA.names}
            self.place.write(f"{FOLDER}/{_part(self._parts)}", _content(arrow.table(columns, schema=SCHEMA)))
            self._parts += 1
            self._waiting = []
            self._drop_outdated()
        self._since = time.monotonic()

    def entries(self) -> Iterator[Mapping[str, object]]:
        """All that is written, row by row, in no order."""
        for name in self.place.names(FOLDER):
            yield from self._read(name).to_pylist()

    def _mark(self, row: int, key: int, error: str | None) -> None:
        (self.failed.discard if error is None else self.failed.add)(row)
        for kept in (self.done, self._part_of):
            kept.extend([-1] * (row + 1 - len(kept)))
        if self.done[row] == -1:
            self.count += 1
        elif self._part_of[row] != self._parts:
            self._outdated.setdefault(self._part_of[row], set()).add(row)
        self.done[row], self._part_of[row] = key, self._parts

    def _drop_outdated(self) -> None:
        """After what replaces it is written, so that a row has an entry at any time."""
        for part, rows in self._outdated.items():
            table = self._read(_part(part))
            keep = [row not in rows for row in table["row"].to_pylist()]
            self.place.write(f"{FOLDER}/{_part(part)}", _content(table.filter(keep)))
        self._outdated = {}

    def _read(self, name: str) -> arrow.Table:
        try:
            table = parquet.read_table(BytesIO(self.place.read(f"{FOLDER}/{name}")))
            return table.cast(SCHEMA)
        except (arrow.ArrowInvalid, ValueError, KeyError) as error:
            raise ValueError(
                f"{FOLDER}/{name} is damaged ({str(error).splitlines()[0]}); delete it, and its rows are looked at again"
            ) from error


def _part(number: int) -> str:
    return f"part-{number:06d}.parquet"


def as_json(record: Mapping[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True)


def _content(table: arrow.Table) -> bytes:
    buffer = BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
