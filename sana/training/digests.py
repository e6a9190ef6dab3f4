"""Hashes of weights, and of files, which are remembered for as long as the files do not change."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..file_hashes import digest as read_digest
from ..saving import replacing

SCHEMA = pa.schema([("path", pa.string()), ("bytes", pa.int64()), ("changed", pa.int64()), ("digest", pa.binary(32))])


class Digests:
    """What files hold, as SHA-256. path: where it is kept between runs; a file that is damaged is as none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, tuple[int, int, bytes]] = {}  # by the path: bytes, ns of its last change, digest
        self.is_new = False
        try:
            table = pq.ParquetFile(path).read() if path.is_file() else SCHEMA.empty_table()
            if table.schema.equals(SCHEMA):
                columns = (table.column(name).to_pylist() for name in SCHEMA.names)
                self.known = {name: tuple(rest) for name, *rest in zip(*columns, strict=True)}
        except (OSError, ValueError):  # all errors of Arrow are one of these
            return

    def of(self, path: Path) -> bytes:
        """Of a file, which is read if its size or the time of its last change is another than it was."""
        stat = path.stat()
        size, changed, digest = self.known.get(str(path), (-1, -1, b""))
        if (size, changed) != (stat.st_size, stat.st_mtime_ns):
            with path.open("rb") as file:
                digest = read_digest(file)
            self.known[str(path)] = (stat.st_size, stat.st_mtime_ns, digest)
            self.is_new = True
        return digest

    def save(self) -> None:
        """Keep what is known. Raises OSError."""
        if not self.is_new:
            return
        rows = [(name, *rest) for name, rest in self.known.items()]
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), SCHEMA.types, strict=True)]
        with replacing(self.path) as unfinished:
            pq.write_table(pa.table(columns, SCHEMA), unfinished)
        self.is_new = False


def fingerprint(tensors: Mapping[str, Tensor]) -> bytes:
    """The SHA-256 of all numbers of some weights, as bfloat16 has them, with their names, whatever they are computed in."""
    found = sha256()
    for name, tensor in sorted(tensors.items()):
        rounded = (tensor.bfloat16() if tensor.is_floating_point() else tensor).cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(memoryview(rounded.flatten().view(torch.uint8).numpy()))
    return found.digest()
