"""Where pictures go: a folder, or an address that fsspec knows, such as s3://bucket/pictures."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..saving import remove_leftovers, replacing


class PlaceError(OSError):
    """The output cannot be read or written from here: no fault of a row."""


class Place(Protocol):
    """Names are relative, with / between their parts. All raise PlaceError."""

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes: ...

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """To read some of a file."""

    def write(self, name: str, content: bytes | Path) -> None:
        """A file, from memory or from another one, appears as a whole or not at all."""

    def remove(self, name: str) -> None:
        """A file, if it is there."""

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder, in order; none if it does not exist."""


def open_place(address: str) -> Place:
    """Raises ValueError for an address of a kind that is not known, or whose package is not installed."""
    if "://" not in address:
        return Folder(Path(address))
    try:
        import fsspec

        system, root = fsspec.url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:
        raise ValueError(
            f"{address} cannot be opened ({error}); give a folder, or an address that fsspec knows"
        ) from error
    return Remote(system, root)


class Folder:
    """One on a disk that all workers share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        with place_errors(OSError):
            return (self.root / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        with place_errors(OSError):
            return (self.root / name).open("rb")

    def write(self, name: str, content: bytes | Path) -> None:
        path = self.root / name
        with place_errors(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as unfinished:
                if isinstance(content, bytes):
                    unfinished.write_bytes(content)
                else:
                    shutil.copyfile(content, unfinished)

    def remove(self, name: str) -> None:
        with place_errors(OSError):
            (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        with place_errors(OSError):
            if not (self.root / folder).is_dir():
                return []
            remove_leftovers(self.root / folder)
            return sorted(path.name for path in (self.root / folder).iterdir() if path.is_file())


class Remote:
    """Of fsspec, whose systems raise errors of many kinds. Object stores show a file when all of it is there."""

    def __init__(self, system: Any, root: str) -> None:
        self.system, self.root = system, root.rstrip("/")

    def exists(self, name: str) -> bool:
        with place_errors(Exception):
            return self.system.isfile(f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        with place_errors(Exception):
            return self.system.cat_file(f"{self.root}/{name}")

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        with place_errors(Exception):
            return self.system.open(f"{self.root}/{name}", "rb")

    def write(self, name: str, content: bytes | Path) -> None:
        path = f"{self.root}/{name}"
        with place_errors(Exception):
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(content, bytes):
                self.system.pipe_file(path, content)
            else:
                self.system.put_file(str(content), path)

    def remove(self, name: str) -> None:
        if self.exists(name):
            with place_errors(Exception):
                self.system.rm_file(f"{self.root}/{name}")

    def names(self, folder: str) -> list[str]:
        path = f"{self.root}/{folder}"
        with place_errors(Exception):
            self.system.invalidate_cache()
            if not self.system.isdir(path):
                return []
            found = self.system.ls(path, detail=True)
        return sorted(entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file")


@contextmanager
def place_errors(kind: type[Exception]) -> Iterator[None]:
    """Errors of a kind become PlaceErrors."""
    try:
        yield
    except kind as error:
        raise PlaceError(str(error) or type(error).__name__) from error
