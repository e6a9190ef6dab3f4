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
from .stores import FOLDER_SIZE, is_picture

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

    retry: forget the rows that could not be drawn. A row that is drawn anew has two entries until `flush`, or until the next
    start where a process was killed before.
    """

    def __init__(self, place: Place, *, retry: bool = False) -> None:
        self.place = place
        self.done = array("q")  # for each row the key of its entry; -1: it has none
        self.count = 0  # rows that have one
        self.failed: set[int] = set()  # rows whose entry is an error
        self._part_of = array("i")  # for each row the part that its entry is in
        self._outdated: set[int] = set()  # parts with rows that have a later entry
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
            self._write()

    def flush(self) -> None:
        """Write what is waiting, and take out what is outdated, with its pictures. Nobody may be drawing."""
        self._write()
        self._drop_outdated()

    def _write(self) -> None:
        if self._waiting:
            columns = {name: [getattr(entry, name) for entry in self._waiting] for name in SCHEMA.names}
            self.place.write(f"{FOLDER}/{_part(self._parts)}", _content(arrow.table(columns, schema=SCHEMA)))
            self._parts += 1
            self._waiting = []
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
            self._outdated.add(self._part_of[row])
        self.done[row], self._part_of[row] = key, self._parts

    def _drop_outdated(self) -> None:
        """Entries, and before them the pictures that no other entry has, such as that of a row which has another name now.

        After what replaces them is written, so that a row has an entry at any time.
        """
        for part in sorted(self._outdated):
            table = self._read(_part(part))
            rows, files = table["row"].to_pylist(), table["file"].to_pylist()
            keep = [self._part_of[row] == part for row in rows]
            held: dict[int, set[str]] = {}  # by the number of a folder
            for row, file, is_kept in zip(rows, files, keep, strict=True):
                folder = row // FOLDER_SIZE
                if not is_kept and file is not None and is_picture(file):
                    held[folder] = held[folder] if folder in held else self._files(folder)
                    if file.casefold() not in held[folder]:
                        self.place.remove(file)
            self.place.write(f"{FOLDER}/{_part(part)}", _content(table.filter(keep)))
        self._outdated = set()

    def _files(self, folder: int) -> set[str]:
        """All that are told of rows whose pictures lie in the same folder, as file systems compare that know no capitals."""
        parts = {*self._part_of[folder * FOLDER_SIZE : (folder + 1) * FOLDER_SIZE]} - {-1}
        found: set[str] = set()
        for part in parts:
            table = self._read(_part(part))
            rows = zip(table["row"].to_pylist(), table["file"].to_pylist(), strict=True)
            found.update(file.casefold() for row, file in rows if file is not None and self._part_of[row] == part)
        return found

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
