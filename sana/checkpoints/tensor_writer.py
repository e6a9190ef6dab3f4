"""A safetensors file, written tensor by tensor. The library's own function needs all of them in memory at once.

The header stands before the tensors and tells where each of them lies, which is known at the end. So a place is kept for it, and
what is left of that is filled with spaces, as the format allows. Nothing here knows what the tensors mean.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

# Bytes; the header ends at a multiple of it, and readers take a tensor only at a multiple of its numbers' size.
ALIGNMENT = 8
LONGEST_ENTRY = 128  # bytes of what a header tells of a tensor beside its name, at most
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class TensorWriter:
    """Writes one file, within a `with` statement; after an error in it the file is incomplete and of no use.

    names: of all tensors to come; there may be more, for which a place in the header is then kept in vain.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> None:
        self.position = 0  # bytes written so far, without the header
        self._header: dict[str, object] = {"__metadata__": dict(metadata)}
        size = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + LONGEST_ENTRY for name in names)
        self._header_size = size + -size % ALIGNMENT
        self._file = path.open("wb")
        self._file.seek(8 + self._header_size)

    def __enter__(self) -> "TensorWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that would lie where readers cannot take it: larger numbers belong before smaller ones."""
        if self.position % tensor.itemsize:
            raise ValueError(f"{name} would begin at byte {self.position}, which is no multiple of {tensor.itemsize}")
        start, self.position = self.position, self.position + tensor.nbytes
        offsets = [start, self.position]
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if kind is None:
                header = json.dumps(self._header, separators=(",", ":")).encode()
                assert len(header) <= self._header_size, "more names than were told"
                file.seek(0)
                file.write(self._header_size.to_bytes(8, "little") + header.ljust(self._header_size))
