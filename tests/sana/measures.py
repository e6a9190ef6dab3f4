"""What tests measure: the error of a tensor, the memory a call takes, and whether tensors are in memory or in a file."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of what is expected, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def peak_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """The result of a call, and the most memory it held at once of what PyTorch's CPU allocator gave, result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def mapped_bytes(tensors: Iterable[Tensor], path: Path) -> int:
    """Bytes of the tensors that lie where Linux has mapped the file into memory, and were not read."""
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    return sum(t.nbytes for t in tensors if any(start <= t.data_ptr() < end for start, end in ranges))
