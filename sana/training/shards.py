"""Tensors by keys in files of Parquet: written whole, read one by one, and never changed."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..saving import replacing

KEY_BYTES = 16
SHARD_BYTES, SHARD_ROWS = 2**27, 512  # a shard ends at whichever comes first; an open one takes 4 kB of memory a row
NAME = "states-{}.parquet"
OPEN = 16  # shards at a time
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SCHEMA = pa.schema(
    [
        ("key", pa.binary(KEY_BYTES)),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("data", pa.large_binary()),  # of a tensor in row-major order, little-endian
    ]
)
# A row is a group of its own, so that it can be read alone, with a checksum. Numbers like these compress by little.
LAYOUT = {
    **{"compression": "none", "use_dictionary": False, "write_statistics": False},
    **{"write_page_checksum": True},
}


def write_shards(folder: Path, rows: Iterable[tuple[bytes, Tensor]]) -> None:
    """Write tensors as they come, each under its key of 16 bytes. Several processes may do so in one folder.

    Where `rows` raises an error, what came before it is kept; a process that is killed loses the shard that it was writing.
    Raises OSError if a shard cannot be written, of which nothing stays.
    """
    failed: list[BaseException] = []
    rest = _until_error(rows, failed)
    for first in rest:
        with _new_shard(folder) as writer:
            size = count = 0
            for key, tensor in chain([first], rest):
                writer.write_batch(_batch(key, tensor.detach().cpu().contiguous()))
                size, count = size + tensor.nbytes, count + 1
                if size >= SHARD_BYTES or count == SHARD_ROWS:
                    break
    if failed:
        raise failed[0]


class Shards:
    """All shards in a folder, as one list of rows. Of threads one at a time may read.

    known: the same folder at an earlier time, whose keys are not read again. Raises ValueError for a file that is damaged or of
    another program.
    """

    def __init__(self, folder: Path, known: "Shards | None" = None) -> None:
        self.paths = sorted(folder.glob(NAME.format("*")))
        before = dict(zip(known.paths, known.keys.chunks, strict=True)) if known else {}
        keys = [before[path] if path in before else _keys(path) for path in self.paths]
        self.keys = pa.chunked_array(keys, SCHEMA.field("key").type)
        self.ends = np.cumsum([len(part) for part in keys], dtype=np.int64)
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """The rows of keys, int64; -1: there is none."""
        found = pc.index_in(pa.array(keys, SCHEMA.field("key").type), value_set=self.keys)
        return found.fill_null(-1).to_numpy().astype(np.int64)

    def read(self, row: int, shape: tuple[int | None, ...]) -> Tensor:
        """The tensor of a row. shape: None where any length will do. Raises ValueError for one that is damaged."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        begin = int(self.ends[shard - 1]) if shard else 0
        try:
            return _tensor(self._file(shard).read_row_group(int(row) - begin, use_threads=False), shape)
        except (OSError, ValueError, LookupError) as error:  # all errors of Arrow are one of these
            raise _damage(self.paths[shard]) from error

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._open:
            self._open[shard] = _opened(self.paths[shard])
            if len(self._open) > OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]


def _until_error(rows: Iterable[tuple[bytes, Tensor]], failed: list[BaseException]) -> Iterator[tuple[bytes, Tensor]]:
    """The same, and where they end by an error that is kept instead."""
    try:
        yield from rows
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - it is raised once the shard is whole
        failed.append(error)


@contextmanager
def _new_shard(folder: Path) -> Iterator[pq.ParquetWriter]:
    with replacing(folder / NAME.format(uuid4().hex[:16])) as unfinished:
        with pq.ParquetWriter(unfinished, SCHEMA, **LAYOUT) as writer:
            yield writer


def _batch(key: bytes, tensor: Tensor) -> pa.RecordBatch:
    dtype = str(tensor.dtype).removeprefix("torch.")
    data = tensor.flatten().view(torch.uint8).numpy().tobytes()
    return pa.record_batch([[key], [dtype], [[*tensor.shape]], [data]], schema=SCHEMA)


def _tensor(row: pa.Table, shape: tuple[int | None, ...]) -> Tensor:
    """Raises LookupError or ValueError for a row that does not hold such a tensor."""
    (found,) = row.to_pylist()
    dtype, sides = DTYPES[found["dtype"]], found["shape"]
    if len(sides) != len(shape) or any(b not in (None, a) for a, b in zip(sides, shape, strict=True)):
        raise ValueError(f"shape {sides} instead of {shape}")
    if min(sides) < 1 or math.prod(sides) * dtype.itemsize != len(found["data"]):
        raise ValueError(f"{len(found['data'])} bytes of shape {sides}")
    return torch.frombuffer(bytearray(found["data"]), dtype=dtype).view(sides)


def _opened(path: Path) -> pq.ParquetFile:
    if not path.is_file():  # a named pipe has no end
        raise OSError
    return pq.ParquetFile(path, page_checksum_verification=True)


def _keys(path: Path) -> pa.Array:
    try:
        with _opened(path) as file:
            if not file.schema_arrow.equals(SCHEMA) or file.metadata.num_row_groups != file.metadata.num_rows:
                raise ValueError
            return file.read(columns=["key"], use_threads=False).column("key").combine_chunks()
    except (OSError, ValueError, LookupError) as error:
        raise _damage(path) from error


def _damage(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged or of another program; delete it, and the same command computes it again")
