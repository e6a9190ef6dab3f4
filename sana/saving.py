"""Files that appear as a whole or not at all, and locks that the operating system takes back from a process that was killed.

Nothing here knows what the files hold.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

from safetensors import SafetensorError

if os.name == "nt":
    import msvcrt
else:
    import fcntl

PREFIX, SUFFIX = ".sana-", ".part"  # of the folder in which a file is written
LOCK = "lock"  # a file in it, which the process that writes holds
MACHINE = sha256(platform.node().encode()).hexdigest()[:8]  # in the folder's name
PATIENCE = 24 * 60 * 60  # seconds; nothing takes longer to be written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives an empty file to write to. It takes the place of `path` at the end, or vanishes after an error.

    It is in a folder of its own beside `path`, with all that a library may put beside it. That folder is what a killed
    process leaves, see `remove_leftovers`. Raises OSError, with a sentence, if the file cannot be written.
    """
    try:
        with _own_folder(path.parent) as folder:
            unfinished = folder / "unfinished"  # without a suffix: programs look for pictures and models in all folders
            unfinished.touch()
            mode = unfinished.stat().st_mode
            yield unfinished
            unfinished.chmod(mode)  # safetensors lets nobody else read what it writes
            os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{path} cannot be written ({reason}); make room, or give a place that is yours to write"
        ) from error


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object as a whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def remove_leftovers(folder: Path, *, everywhere: bool = False) -> None:
    """Remove what killed processes were writing in a folder, and nothing that is still being written.

    everywhere: in the folders below as well. What another machine has left goes after a day, since not every shared folder
    shows the locks of one machine to the others.
    """
    pattern = f"{PREFIX}*{SUFFIX}"
    for found in folder.rglob(pattern) if everywhere else folder.glob(pattern):
        _remove_if_left(found)


def lock(file: BinaryIO) -> bool:
    """Hold an open file until it is closed or the process ends; False if it is held already. At the beginning of the file.

    Raises OSError where the file system knows no locks.
    """
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        file = None
        while file is None:  # another process may find the folder before it is held, and remove it
            folder = Path(mkdtemp(prefix=f"{PREFIX}{MACHINE}-", suffix=SUFFIX, dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)  # after its lock is closed, or Windows refuses
            file = _held(folder / LOCK)
        stack.enter_context(file)
        yield folder


def _held(path: Path) -> BinaryIO | None:
    """The lock of a folder, open and held; None if another process has taken it or removed it."""
    try:
        file = path.open("wb")
    except FileNotFoundError:
        return None
    try:
        held = lock(file)
    except OSError:  # then nobody else can hold it, and `_remove_if_left` leaves it
        held = True
    if held and path.exists():
        return file
    file.close()
    return None


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of `replacing` unless somebody writes in it, as far as this machine can tell."""
    try:
        is_old = time.time() - folder.stat().st_mtime > PATIENCE
        if not (is_old or folder.name.startswith(f"{PREFIX}{MACHINE}-")):
            return
        with (folder / LOCK).open("wb") as file:
            if not lock(file):
                return
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return
    shutil.rmtree(folder, ignore_errors=True)  # on Windows, which removes no open file
