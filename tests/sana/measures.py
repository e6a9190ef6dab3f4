"""What tests measure: the error of a tensor, the memory a call takes, and whether tensors are in memory or in a file."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from bench.race import cpu_peak_memory as peak_bytes
from bench.race import relative_error

__all__ = ["mapped_bytes", "peak_bytes", "relative_error"]


def mapped_bytes(tensors: Iterable[Tensor], path: Path) -> int:
    """Bytes of the tensors that lie where Linux has mapped the file into memory, and were not read."""
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    return sum(t.nbytes for t in tensors if any(start <= t.data_ptr() < end for start, end in ranges))
