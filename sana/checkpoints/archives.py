"""PyTorch's own files: a pickle that says which tensors there are, and their numbers behind or beside it, as they are.

Since PyTorch 1.6 such a file is a zip without compression. Numbers are mapped into memory and not read, where they lie as a
processor wants them.
"""

import io
import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .pickles import FEW_STEPS, MOST_BYTES, RefusedPickle, StoredTensor, read_pickle, tensors_in

STARTS = (b"PK\x03\x04", b"\x80")  # of the zip files of today, and of the format before PyTorch 1.6
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # what files of that format begin with
LOCAL_HEADER = struct.Struct("<26xHH")  # of a part of a zip, before its name: lengths of this and of an extra field
MOST_AXES, MOST_SIZE = 8, 2**63  # of a tensor
# Keys under which training code files its tensors; the first one that has any counts.
WRAPPERS = (
    *("state_dict", "model", "module", "model_state_dict", "params", "net", "generator", "student", "weights"),
    *("state_dict_ema", "ema", "model_ema", "ema_model", "params_ema"),
)
# What is raised where the bytes make no sense.
DAMAGE = (
    *(RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, OverflowError, struct.error),
    *(zipfile.BadZipFile, NotImplementedError),
)


class Part(NamedTuple):
    """Bytes of a file."""

    start: int
    size: int


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of PyTorch, by name; {}: it has none.

    Raises RefusedPickle for code and for a file that unfolds to more than it holds, and what DAMAGE lists for damage.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        found, parts = _read_zip(file) if _begins(file, STARTS[0]) else _read_stream(file)
    stored = tensors_in(found, WRAPPERS)
    for tensor in stored.values():
        _check(tensor, parts[tensor.storage.key], size)
    # Tied weights are in the file once and count twice.
    if sum(_numbers(tensor) * tensor.dtype.itemsize for tensor in stored.values()) > 2 * size:
        raise RefusedPickle(f"has {size:,} bytes and unfolds to more than twice as many; take the original file")
    return _mapped(path, size, stored, parts)


def _begins(file: BinaryIO, start: bytes) -> bool:
    file.seek(0)
    return file.read(len(start)) == start


def _read_zip(file: BinaryIO) -> tuple[object, dict[str, Part]]:
    """What the pickle says, and where the numbers are by the keys of their storages."""
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].split("/")[0]
        infos = {name.removeprefix(f"{root}/"): info for name, info in archive.NameToInfo.items()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
            raise RefusedPickle("is compressed, which PyTorch's own files are not; take the original file")
        if infos["data.pkl"].file_size > MOST_BYTES:
            raise RefusedPickle(f"has a pickle of more than {MOST_BYTES:,} bytes beside its tensors; give these alone")
        if "byteorder" in infos and archive.read(infos["byteorder"]).decode() != sys.byteorder:
            raise ValueError("numbers of another kind of processor")
        found = read_pickle(io.BytesIO(archive.read(infos["data.pkl"])))
    parts = {}
    for key in found.storages:
        info = infos[f"data/{key}"]
        file.seek(info.header_offset)
        start = info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size)))
        parts[key] = Part(start, info.file_size)
    return found.value, parts


def _read_stream(file: BinaryIO) -> tuple[object, dict[str, Part]]:
    """The same of the format before PyTorch 1.6: five pickles, and then each storage behind the count of its numbers."""
    file.seek(0)
    data = io.BytesIO(file.read(MOST_BYTES))
    if [read_pickle(data, FEW_STEPS).value, read_pickle(data, FEW_STEPS).value] != [MAGIC, VERSION]:
        raise ValueError("no file of PyTorch")
    read_pickle(data, FEW_STEPS)  # of the machine that wrote it
    found = read_pickle(data)
    keys = read_pickle(data).value
    place, parts = data.tell(), {}
    for key in keys:
        file.seek(place)
        storage = found.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.count:
            raise ValueError("a storage of another size")
        parts[storage.key] = Part(place + 8, count * storage.dtype.itemsize)
        place += 8 + parts[key].size
    return found.value, parts


def _numbers(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape)


def _check(tensor: StoredTensor, part: Part, size: int) -> None:
    """Raises ValueError for a tensor whose numbers are not in its part of a file of so many bytes."""
    sizes = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) > MOST_AXES or not all(0 <= number < MOST_SIZE for number in sizes):
        raise ValueError("a tensor of no possible shape")
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
    stop = tensor.dtype.itemsize * (tensor.offset + (last + 1 if _numbers(tensor) else 0))
    stored = tensor.storage.count * tensor.storage.dtype.itemsize
    if stop > stored or stored > part.size or part.start + stored > size:
        raise ValueError("a tensor that reaches beyond its numbers")


def _mapped(path: Path, size: int, stored: Mapping[str, StoredTensor], parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Tensors on the file, but for numbers that do not begin at a multiple of their size, which are copied."""
    whole = torch.UntypedStorage.from_file(str(path), False, size)
    storages: dict[str, torch.UntypedStorage] = {}
    for tensor in stored.values():
        key, part = tensor.storage.key, parts[tensor.storage.key]
        if key not in storages:
            piece = whole[part.start : part.start + part.size]
            storages[key] = piece.clone() if part.start % tensor.dtype.itemsize else piece
    return {
        name: torch.empty(0, dtype=tensor.dtype).set_(
            storages[tensor.storage.key], tensor.offset, tensor.shape, tensor.strides
        )
        for name, tensor in stored.items()
    }
