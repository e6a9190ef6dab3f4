"""Where pictures go: a folder, or an address that fsspec knows, such as s3://bucket/pictures."""

from pathlib import Path
from typing import Any, Protocol

from ..saving import remove_leftovers, replacing


class Place(Protocol):
    """Names are relative, with / between their parts. All but `exists` raise OSError."""

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, content: bytes) -> None:
        """A file appears as a whole or not at all."""

    def remove(self, name: str) -> None: ...

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
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)

    def remove(self, name: str) -> None:
        (self.root / name).unlink()

    def names(self, folder: str) -> list[str]:
        if not (self.root / folder).is_dir():
            return []
        remove_leftovers(self.root / folder)
        return sorted(path.name for path in (self.root / folder).iterdir() if path.is_file())


class Remote:
    """Of fsspec. Object stores show a file when all of it is there."""

    def __init__(self, system: Any, root: str) -> None:
        self.system, self.root = system, root.rstrip("/")

    def exists(self, name: str) -> bool:
        return self.system.isfile(f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        return self.system.cat_file(f"{self.root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        path = f"{self.root}/{name}"
        self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(path, content)

    def remove(self, name: str) -> None:
        self.system.rm_file(f"{self.root}/{name}")

    def names(self, folder: str) -> list[str]:
        path = f"{self.root}/{folder}"
        self.system.invalidate_cache()
        if not self.system.isdir(path):
            return []
        found = self.system.ls(path, detail=True)
        return sorted(entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file")
