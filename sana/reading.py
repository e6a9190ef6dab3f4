"""What a path leads to, and JSON, before either can do harm: not every path is a file, and not every JSON is small."""

import json
import os
import stat
from pathlib import Path

MOST_JSON_BYTES = 2**22  # the largest configuration of a release has 2 kB
MOST_LEVELS = 100  # of JSON in JSON; those of configurations have 5


def check_file(path: Path | str) -> None:
    """Raises ValueError for a pipe, a socket or a device, which would wait or never end, and OSError for nothing at all."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder answers at once, and says what it is
        raise ValueError("it is a pipe, a socket or a device")


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file, or of a larger one a byte more than `most`. Raises as `check_file`, and OSError."""
    check_file(path)
    with path.open("rb") as file:
        return file.read(most + 1)


def parse_json(source: bytes | str) -> object:
    """What a JSON text in UTF-8 says. Raises ValueError for none, and for one that is larger or deeper than any of ours."""
    if len(source) > MOST_JSON_BYTES:
        raise ValueError(f"it has more than {MOST_JSON_BYTES:,} bytes")
    text = source.decode("utf-8-sig") if isinstance(source, bytes) else source
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_deep()) from None
    level = [found]
    for _ in range(MOST_LEVELS):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [value for values in parts for value in values]
        if not level:
            return found
    raise ValueError(_deep())


def _deep() -> str:
    return f"it is nested more than {MOST_LEVELS} deep"
