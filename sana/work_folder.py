"""A folder for one piece of work: which it is, and that one process at a time is at it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .reading import parse_json, read_bytes
from .saving import lock, remove_leftovers, write_json

NOTE = "run.json"
LONGEST_NOTE = 2**16  # bytes; paths are far shorter

log = logging.getLogger(__name__)


@contextmanager
def claim_folder(folder: Path, run: Mapping[str, str], work: str, option: str = "--out") -> Iterator[None]:
    """Make a folder, note what it is for, remove what killed processes have left in it, and hold it until the end.

    run: what must be the same whenever the work goes on. work: what it is called, such as "training". option: of the shell, by
    which the folder is given. Raises ValueError if the folder is for something else, if another process holds it, or if it is
    no folder, and OSError, with a sentence, if it cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another {option}, a folder")
    with _lock_file(folder, work, option) as file:
        try:
            if not lock(file):
                raise ValueError(f"another {work} is at work in {folder}; wait until it ends, or give another {option}")
        except OSError:
            log.warning("%s is on a disk without locks; do not start a second %s in it.", folder, work)
        remove_leftovers(folder, everywhere=True)
        note = folder / NOTE
        if not note.exists():
            write_json(note, run)
        try:
            content = read_bytes(note, LONGEST_NOTE)
        except (ValueError, OSError):
            content = b""
        check_note(content, run, str(folder), work, option)
        yield


def _lock_file(folder: Path, work: str, option: str) -> BinaryIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"{work}.lock").open("wb")
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}); give another {option}, a folder that is yours to write to"
        ) from error


def check_note(content: bytes, run: Mapping[str, str], folder: str, work: str, option: str = "--out") -> None:
    """Raises ValueError if the note of a folder, or of an address, says that it is for something else, or nothing."""
    try:
        known = parse_json(content) if len(content) <= LONGEST_NOTE else None
    except ValueError:
        known = None
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise ValueError(
            f"{folder}/{NOTE} does not tell what {folder} is for; if it is for this {work}, move that file away and "
            f"give the same command again, or else give another {option}"
        )
    if known != run:
        told = ", ".join(f"{name} {value}" for name, value in known.items())
        raise ValueError(f"{folder} holds another {work} ({told}); give another {option}")
