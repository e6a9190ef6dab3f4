"""Candidates timed against each other: alternating, in one process, on the same inputs, with their results compared."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sana.networks.onednn import ONEDNN_LINEAR
from sana.networks.operations import Operations

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Measured:
    """One candidate. error: relative L2 distance to the first candidate's result; peak_bytes: allocated during a call."""

    seconds: float  # median
    spread: float  # of the middle half of the times, as a share of the median
    error: float
    peak_bytes: int


def race(candidates: dict[str, Call], repeats: int, tolerance: float) -> dict[str, Measured]:
    """Times every candidate `repeats` times, in turn, after one call that warms up and is measured for memory.

    Raises ArithmeticError for a result further than `tolerance` from the first candidate's: a fast wrong answer is none.
    """
    if torch.cuda.is_available():  # compiling takes memory of its own, and libraries keep some from their first call on
        for call in candidates.values():
            call()
    results = {name: peak_memory(call) for name, call in candidates.items()}
    expected = next(iter(results.values()))[0]
    errors = {name: relative_error(result, expected) for name, (result, _) in results.items()}
    for name, error in errors.items():
        if not error < tolerance:
            raise ArithmeticError(
                f"{name} differs by {error:.1e} from {next(iter(candidates))}, more than {tolerance:.0e}"
            )
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            times[name].append(seconds(call))
    return {
        name: Measured(statistics.median(taken), spread(taken), errors[name], results[name][1])
        for name, taken in times.items()
    }


def counterpart(name: str, names: Iterable[str]) -> str:
    """The one of these candidates that this one is compared with: compiled ones with each other, all others with the reference.

    names: the first is ours, the second the reference, which is its own counterpart.
    """
    ours, reference, *others = names
    if not name.startswith(ours):
        return name
    alike = name.replace(ours, reference)
    return alike if alike in others else reference


def seconds(call: Call) -> float:
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def spread(values: list[float]) -> float:
    """Width of the middle half over the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def relative_error(result: Tensor, expected: Tensor) -> float:
    result, expected = result.double(), expected.double()
    return float((result - expected).norm() / expected.norm())


def peak_memory(call: Call) -> tuple[Tensor, int]:
    """The result of a call and the most bytes it held at once, beyond what was held before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before
    return cpu_peak_memory(call)


def cpu_peak_memory(call: Call) -> tuple[Tensor, int]:
    """`peak_memory` of what PyTorch's CPU allocator gave, the result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def count_flops(call: Call) -> int:
    with FlopCounterMode(display=False, custom_mapping=OTHER_PRODUCTS) as counter:
        call()
    return counter.get_total_flops()


def linear_flops(x: torch.Size, weight: torch.Size, *others: object, out_shape: torch.Size) -> int:
    """Of a product with a weight (outputs, D)."""
    return 2 * x.numel() * weight[0]


def columns_flops(x: torch.Size, weight: torch.Size, *others: object, out_shape: torch.Size) -> int:
    """Of a product with a weight (D, outputs)."""
    return 2 * x.numel() * weight[1]


# What PyTorch's counter does not know, by shapes.
OTHER_PRODUCTS = {
    ONEDNN_LINEAR: linear_flops,
    torch.ops.aten._weight_int8pack_mm: linear_flops,
    torch.ops.aten._int_mm: columns_flops,
}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Floor:
    """What the device can do: a large matrix product and a large copy, measured in the same run."""

    flops_per_second: float
    bytes_per_second: float

    @classmethod
    @torch.no_grad()
    def measure(cls, dtype: torch.dtype, device: str) -> "Floor":
        side = 8192 if device == "cuda" else 2048
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        source = torch.empty(2**28 if device == "cuda" else 2**26, device=device)
        target = torch.empty_like(source)
        linear = Operations.Linear(side, side, bias=False, dtype=dtype, device=device)
        product = min(statistics.median(timed(call, 7)) for call in (lambda: a @ b, lambda: linear(a)))
        copy = statistics.median(timed(lambda: target.copy_(source), 7))
        return cls(2 * side**3 / product, 2 * source.nbytes / copy)


def timed(call: Call, repeats: int) -> Iterator[float]:
    call()
    return (seconds(call) for _ in range(repeats))
