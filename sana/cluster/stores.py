"""How pictures lie in their place: each a file, or hundreds of them in a tar of WebDataset's layout."""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from .places import Place, place_errors
from .rows import Row

FOLDER_SIZE = 1000  # pictures at most
SHARD_SIZE = 250  # pictures at most; some hundred megabytes at 1024 px
Record = Mapping[str, object]


class Batch(Protocol):
    """Where the pictures of some rows are looked for and kept. Raises PlaceError."""

    def file(self, row: Row) -> str:
        """Name of the file that holds the picture of a row. Raises ValueError for a row whose name cannot be."""

    def get(self, row: Row) -> bytes | None:
        """The picture of a row, a PNG, if there is one, which may be that of older settings."""

    def put(self, row: Row, picture: bytes, record: Record) -> None:
        """Keep a picture in the place of an older one."""

    def drop(self, row: Row) -> None:
        """The row cannot be drawn: what a file holds of it beside others is to go. A file of its own goes with its entry."""


class Files:
    """pictures/000012/000012345.png, or of the row's own name; at most FOLDER_SIZE in a folder."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @contextmanager
    def batch(self, rows: Sequence[Row], *, alone: bool = False) -> Iterator[Batch]:
        yield self

    def file(self, row: Row) -> str:
        return f"pictures/{row.number // FOLDER_SIZE:06d}/{key_of(row)}.png"

    def get(self, row: Row) -> bytes | None:
        return self.place.read(self.file(row)) if self.place.exists(self.file(row)) else None

    def put(self, row: Row, picture: bytes, record: Record) -> None:
        self.place.write(self.file(row), picture)

    def drop(self, row: Row) -> None:
        """Nothing lies beside others."""


class Shards:
    """pictures/000049.tar: of each row KEY.png, KEY.txt with its prompt and KEY.json with all else, where KEY is its name or number.

    A shard is the work of one worker at a time, and is written when all its pictures are drawn. A row that is drawn alone, since
    workers have ended at its shard, has a shard to itself: pictures/000049/000012345.tar.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    @contextmanager
    def batch(self, rows: Sequence[Row], *, alone: bool = False) -> Iterator[Batch]:
        """rows: of one shard. alone: it is one row. Raises ValueError for an older shard that is damaged."""
        name = f"pictures/{rows[0].number // SHARD_SIZE:06d}"
        target = f"{name}/{rows[0].number:09d}.tar" if alone else f"{name}.tar"
        with ExitStack() as stack, TemporaryDirectory(prefix="sana-shard-") as folder:
            path = Path(folder, "shard.tar")
            with tarfile.open(path, "w") as tar:
                shard = _Shard(target, tar)
                if not alone:
                    for single in self.place.names(name):
                        shard.read(f"{name}/{single}", self._opened(f"{name}/{single}", stack))
                if self.place.exists(target):
                    shard.read(target, self._opened(target, stack))
                yield shard
                shard.keep_others()
            if shard.is_changed:
                self.place.write(target, path)

    def _opened(self, name: str, stack: ExitStack) -> tarfile.TarFile:
        try:
            return stack.enter_context(tarfile.open(mode="r:", fileobj=stack.enter_context(self.place.open(name))))
        except tarfile.TarError as error:
            raise _damaged(name, error) from error


class _Shard:
    """Old pictures and new ones. target: name of the file that will be written."""

    def __init__(self, target: str, tar: tarfile.TarFile) -> None:
        self.target, self.tar = target, tar
        self.old: dict[int, tuple[str, tarfile.TarFile, list[tarfile.TarInfo]]] = {}  # by row: where it lies
        self.is_changed = False

    def read(self, name: str, tar: tarfile.TarFile) -> None:
        """Learn what an older tar holds: three members of each row, of which the last is its JSON."""
        members: list[tarfile.TarInfo] = []
        try:
            for member in tar:
                members.append(member)
                if member.name.endswith(".json"):
                    self.old[json.loads(tar.extractfile(member).read())["row"]] = name, tar, members
                    members = []
        except (tarfile.TarError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise _damaged(name, error) from error

    def file(self, row: Row) -> str:
        return self.old[row.number][0] if row.number in self.old else self.target

    def get(self, row: Row) -> bytes | None:
        if row.name is not None and "." in row.name:
            raise ValueError(f"its name {row.name} has a dot, where a WebDataset takes it to end; give another")
        _, tar, members = self.old.get(row.number, (None, None, []))
        found = [member for member in members if member.name == f"{key_of(row)}.png"]
        return tar.extractfile(found[0]).read() if found else None

    def put(self, row: Row, picture: bytes, record: Record) -> None:
        self.old.pop(row.number, None)
        self.is_changed = True
        texts = {"txt": row.prompt, "json": json.dumps({"row": row.number, **record}, ensure_ascii=False)}
        for suffix, content in {"png": picture, **{name: text.encode() for name, text in texts.items()}}.items():
            self._add(tarfile.TarInfo(f"{key_of(row)}.{suffix}"), content)

    def drop(self, row: Row) -> None:
        name, *_ = self.old.pop(row.number, (None,))
        self.is_changed |= name == self.target

    def keep_others(self) -> None:
        """What the target held and is not replaced."""
        for name, tar, members in self.old.values():
            for member in members if name == self.target else ():
                self._add(member, tar.extractfile(member).read())

    def _add(self, member: tarfile.TarInfo, content: bytes) -> None:
        member.size = len(content)
        with place_errors(OSError):
            self.tar.addfile(member, BytesIO(content))


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} is damaged ({error}); delete it and manifest/, and what else is there is found again")


def key_of(row: Row) -> str:
    """What the picture of a row is called in its folder."""
    return row.name or f"{row.number:09d}"


def is_picture(name: str) -> bool:
    """Whether a file has such a name as stores give; a manifest may come from anybody."""
    top, *rest = name.split("/")
    return top == "pictures" and 0 < len(rest) < 3 and "\\" not in name and not {"", ".", ".."} & {*rest}
