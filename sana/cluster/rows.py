"""What a file of prompts asks for, row by row: text, CSV, JSON lines or Parquet, read as a stream."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path

from ..reading import check_file, parse_json

MOST_ROW_BYTES = 2**20
NAME = re.compile(r"[^\x00-\x1f/\\:*?\"<>|.][^\x00-\x1f/\\:*?\"<>|]*")
MOST_NAME_BYTES = 200  # file systems take 255 with what is added
READ_TOGETHER = 1000  # rows of a Parquet file


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    value.encode()  # what was no UTF-8, or half a pair of surrogates, cannot be written again
    return value


def _whole(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _number(value: object) -> float:
    """From a number or its text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)  # a seed may have more digits than a float
    number = value if isinstance(value, int) else float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


# What a column may be called, and how its values are read. Most are fields of `Settings`.
COLUMNS: dict[str, tuple[Callable[[object], object], str]] = {
    "prompt": (_text, "a text"),
    "name": (_text, "a text"),
    "lora": (_text, "FILE or FILE=STRENGTH, several with a semicolon between them"),
    **{name: (_text, "a text") for name in ("negative", "instruction", "solver", "reference")},
    **{name: (_text, "the path of a picture") for name in ("image", "mask", "control_image")},
    **{name: (_whole, "a whole number") for name in ("height", "width", "steps", "seed")},
    **{
        name: (_number, "a number")
        for name in (
            *("guidance_scale", "pag_scale", "flow_shift", "strength", "control_scale", "control_from", "control_to"),
        )
    },
}


@dataclass(frozen=True)
class Row:
    """A picture that is asked for. fault: why it cannot be drawn, in a sentence; None: it may be."""

    number: int  # from 0
    prompt: str = ""
    name: str | None = None  # of its file
    lora: str | None = None
    settings: Mapping[str, object] = field(
        default_factory=dict
    )  # fields of `Settings` by name, of pictures their paths
    fault: str | None = None
    given: object = None  # what else a worker needs to know, if no file asks for the row

    def key(self) -> int:
        """63 bits that change with all that it asks for."""
        asked = [self.prompt, self.name, self.lora, sorted(self.settings.items())]
        return int.from_bytes(sha256(json.dumps(asked).encode()).digest()[:8], "big") >> 1


def read_rows(path: Path, on_unknown: Callable[[str], object] = lambda column: None) -> Iterator[Row]:
    """The rows of a file, one by one; of a text file each line that is not blank is a prompt.

    The kind is told by the suffix: .csv and .tsv with names of COLUMNS in the first line, .jsonl and .ndjson with an object
    in each line, .parquet, and anything else is text. An empty value stands for none. on_unknown: is called once for each
    column of another name, which does not count. A row that makes no sense has a fault.
    Raises ValueError for what is no such file, has no prompts, or is Parquet without the package pyarrow, and OSError if a disk
    fails later.
    """
    try:
        check_file(path)
        path.open("rb").close()
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({reason}); give a file of prompts") from error
    reader = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    unknown: set[str] = set()
    rows = 0
    try:
        for values in reader.get(path.suffix.lower(), _lines)(path):
            if isinstance(values, str):
                yield Row(rows, fault=values)
            else:
                for column in values.keys() - COLUMNS.keys() - unknown:
                    unknown.add(column)
                    on_unknown(column)
                yield _row(rows, values)
            rows += 1
    except UnicodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8; write it anew") from error
    if not rows:
        raise ValueError(f"{path} holds no prompt; write one on each line")


def _row(number: int, values: Mapping[str, object]) -> Row:
    found: dict[str, object] = {}
    for column, value in values.items():
        if column in COLUMNS and value is not None and value != "":
            read, expected = COLUMNS[column]
            try:
                found[column] = read(value)
            except UnicodeEncodeError:
                return Row(number, fault=f"its {column} is {_short(value)}, which is no text in UTF-8; write it anew")
            except (ValueError, OverflowError):
                return Row(number, fault=f"its {column} is {_short(value)}; it must be {expected}")
    prompt, name, lora = (found.pop(column, None) for column in ("prompt", "name", "lora"))
    if prompt is None:
        return Row(number, fault="it has no prompt; write one in the column prompt")
    if len(prompt.encode()) > MOST_ROW_BYTES:
        return Row(number, fault=f"its prompt has more than {MOST_ROW_BYTES:,} bytes; shorten it")
    if name is not None and not (NAME.fullmatch(name) and len(name.encode()) <= MOST_NAME_BYTES):
        return Row(number, fault=f"its name is {_short(name)}, which cannot be that of a file; give another")
    return Row(number, prompt, name, lora, found)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bounded_lines(path: Path) -> Iterator[str | None]:
    """Lines of a text, which end at a line feed and at no other character; None for one that is too long.

    What is no UTF-8 becomes surrogates. Raises UnicodeDecodeError for such a first line, by which a file is none at all.
    """
    with path.open("rb") as file:
        for number in count():
            line = file.readline(MOST_ROW_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MOST_ROW_BYTES)
                yield None
            else:
                text = line.decode("utf-8", "surrogateescape") if number else line.decode("utf-8-sig")
                yield text.rstrip("\r\n")


LONG = f"it has more than {MOST_ROW_BYTES:,} bytes; shorten it"


def _lines(path: Path) -> Iterator[Mapping[str, object] | str]:
    for line in _bounded_lines(path):
        if line is None:
            yield LONG
        elif line.strip():
            yield {"prompt": line.strip()}


def _json_lines(path: Path) -> Iterator[Mapping[str, object] | str]:
    for line in _bounded_lines(path):
        if line is None:
            yield LONG
        elif line.strip():
            try:
                found = parse_json(line)
            except ValueError as error:
                yield f"it is no JSON ({error}); write an object with a prompt in each line"
                continue
            yield found if isinstance(found, dict) else "it is no JSON object; write one with a prompt in each line"


def _csv(path: Path) -> Iterator[Mapping[str, object] | str]:
    """A value in quotes may hold line feeds."""
    csv.field_size_limit(MOST_ROW_BYTES)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        names = lines.fieldnames or ()
        "".join(names).encode()  # raises UnicodeEncodeError for what was no UTF-8
        if "prompt" not in names:
            raise ValueError(f"{path} has no column prompt in its first line; name its columns there")
        if twice := [name for name in COLUMNS if names.count(name) > 1]:
            raise ValueError(f"{path} has the column {twice[0]} twice; name each once")
        while True:
            try:
                found = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield LONG if "field limit" in str(error) else f"it is no row of CSV ({error}); quote its values"
                continue
            if None in found or None in found.values():
                yield f"it has not the {len(lines.fieldnames)} values that the first line names; quote those with commas"
            else:
                yield found


def _parquet(path: Path) -> Iterator[Mapping[str, object]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{path.name} needs the package pyarrow; run pip install ".[cluster]" in the folder of this project'
        ) from error
    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}); write it anew") from error
    if "prompt" not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column prompt; name the one with the prompts so")
    try:
        for batch in file.iter_batches(READ_TOGETHER):
            yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); write it anew") from error
