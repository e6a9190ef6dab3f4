"""SHA-256 of files, computed once for each file and kept in the user's cache folder."""

import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from .reading import MOST_JSON_BYTES, parse_json, read_bytes
from .saving import remove_leftovers, write_json

# An object of paths, each with the size in bytes, the time of its last change in ns, and the digits.
NAME = "hashes.json"
KEPT_FROM = 2**24  # bytes; smaller files are read as fast as what is kept
MOST = 1000  # files that are remembered
CHUNK = 2**20  # bytes


def file_hash(path: Path) -> str:
    """The 64 digits of a file, which is read only if its size or the time of its last change is another than it was.

    A folder that cannot be read or written to, or a damaged list in it, only means that files are read again. Raises OSError
    for a file that cannot be read.
    """
    stat = path.stat()
    state = [stat.st_size, stat.st_mtime_ns]
    folder = cache_folder() if stat.st_size >= KEPT_FROM else None
    known = _read(folder / NAME) if folder else {}
    name = os.path.abspath(path)
    kept = known.pop(name, None)
    if isinstance(kept, list) and len(kept) == 3 and kept[:2] == state and isinstance(kept[2], str):
        return kept[2]
    with path.open("rb") as file:
        digits = digest(file).hex()
    if folder:
        _write(folder, {**dict(list(known.items())[1 - MOST :]), name: [*state, digits]})
    return digits


def digest(file: BinaryIO) -> bytes:
    """SHA-256 of all that is still to be read of a file."""
    found = sha256()
    while part := file.read(CHUNK):
        found.update(part)
    return found.digest()


def cache_folder() -> Path | None:
    """Where this package keeps what it can compute again; None if the system knows no home for the user."""
    try:
        if given := os.environ.get("XDG_CACHE_HOME"):
            return Path(given, "sana")
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local", "sana", "Cache")
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "sana"
    except RuntimeError:
        return None


def _read(path: Path) -> dict[str, object]:
    try:
        found = parse_json(read_bytes(path, MOST_JSON_BYTES))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(folder: Path, known: dict[str, object]) -> None:
    try:
        remove_leftovers(folder)
        write_json(folder / NAME, known)
    except OSError:
        return
