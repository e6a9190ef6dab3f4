"""Ours against diffusers and transformers: python -m bench. Prints a table and writes results/speed-DEVICE-DTYPE.json.

Random weights at the real sizes, the same in both; calls alternate in one process, and results must agree: where they do not,
or one cannot be computed, the case is named instead of timed, and the exit code is 1. Cases that this machine cannot run in the time allowed are only named.
"""

import argparse
import gc
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from sana.interruption import INTERRUPTED, begin

from .cases import Case, all_cases, int8_cases
from .machine import device_name, write_result
from .race import Floor, count_flops, counterpart, race

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
INT8_TOLERANCE = 5e-2  # what comes into a layer is rounded as well
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUILD_RATE = 1e8  # random weights a second on one core


def main() -> int:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[options.dtype or ("bfloat16" if device == "cuda" else "float32")]
    if options.in_int8 and device != "cpu":
        print("--in-int8 is for a CPU.")
        return 2
    cases = int8_cases() if options.in_int8 else all_cases(options.steps or (20 if device == "cuda" else 2))
    cases = [case for case in cases if options.only is None or options.only.search(case.title)]
    if not cases:
        print("No case has such a title.")
        return 2
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 are compared in float32
    floor = Floor.measure(dtype, device)
    print(
        f"{device_name()}, {dtype}: {floor.flops_per_second / 1e12:.2f} TFLOP/s, {floor.bytes_per_second / 1e9:.0f} GB/s"
    )
    compiled = device == "cuda" if options.compiled is None else options.compiled
    tolerance = INT8_TOLERANCE if options.in_int8 else TOLERANCE[dtype]
    result = {"dtype": str(dtype), "floor": asdict(floor), "repeats": options.repeats, "rows": []}
    result |= {"left_out": [case.title for case in cases], "failed": [], "load_before": psutil.getloadavg()[0]}
    name = f"{'int8' if options.in_int8 else 'speed'}-{device}-{str(dtype).removeprefix('torch.')}"
    print("\n| case | candidate | ms | spread | x faster than reference | peak MB | error | of the floor |")
    print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for case in choose(cases, floor, options.minutes * 60, memory(device), dtype, options.repeats, compiled):
        result["left_out"].remove(case.title)
        try:
            result["rows"] += run(case, floor, dtype, device, compiled, options.repeats, tolerance)
        except (ArithmeticError, RuntimeError) as error:  # a result that is unequal, or none for want of memory
            result["failed"].append(f"{case.title}: {error}")
            print(f"| {result['failed'][-1]} |", flush=True)
        result["load_after"] = psutil.getloadavg()[0]
        write_result(name, result, options.out)  # now, for the case that the next one ends everything
    print(f"\nLeft out, too large for this machine or for the time: {'; '.join(result['left_out']) or 'nothing'}.")
    print(write_result(name, result, options.out))
    return 1 if result["failed"] else 0


def parse() -> argparse.Namespace:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    top.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    top.add_argument("--minutes", type=float, default=20, help="to spend at most, about (default: 20)")
    top.add_argument("--repeats", type=count, default=5, help="timed calls of each candidate (default: 5)")
    top.add_argument("--steps", type=count, help="of whole pictures (default: 20 on a GPU, 2 on a CPU)")
    top.add_argument("--only", type=expression, help="cases whose title matches this regular expression; needs --out")
    top.add_argument(
        "--in-int8", action="store_true", help="on a CPU, files in int8 instead; writes int8-cpu-DTYPE.json"
    )
    top.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="torch.compile too, which takes a minute or more for each case (default: on a GPU)",
    )
    top.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/speed.md shows)"
    )
    options = top.parse_args()
    if options.only and not options.out:
        top.error("--only measures a part of the table in docs/speed.md; give --out, the file to write it to")
    return options


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def choose(
    cases: list[Case], floor: Floor, seconds: float, space: float, dtype: torch.dtype, repeats: int, compiled: bool
) -> Iterator[Case]:
    """The smaller cases first, as many as fit, by the clock: a case may take as much more than estimated as those before it."""
    start, estimated = time.monotonic(), 0.0
    for case in sorted(cases, key=lambda case: case.flops):
        calls = (repeats + 1) * (5 if compiled else 3)
        cost = calls * 1.5 * case.flops / floor.flops_per_second + case.weights / BUILD_RATE
        need = (case.weights + case.activations) * dtype.itemsize
        spent = time.monotonic() - start
        pace = max(1.0, spent / estimated) if estimated else 1.0
        if spent + pace * cost <= seconds and need <= space:
            estimated += cost
            yield case


def memory(device: str) -> float:
    """Bytes to be had: of the GPU, or most of the machine's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return 0.8 * psutil.virtual_memory().available


def run(
    case: Case, floor: Floor, dtype: torch.dtype, device: str, compiled: bool, repeats: int, tolerance: float
) -> Iterator[dict[str, object]]:
    """Race one case, print its lines and return them."""
    if compiled:
        torch.compiler.reset()  # what is compiled for a second size, in the same process, is for all sizes and slower
    calls = case.build(dtype, device, compiled)
    least = count_flops(next(iter(calls.values()))) / floor.flops_per_second
    measured = race(calls, repeats, tolerance)
    for name, found in measured.items():
        against = measured[counterpart(name, measured)]
        row = {"case": case.title, "candidate": name, **asdict(found)}
        row |= {"ratio": against.seconds / found.seconds, "of_floor": least / found.seconds}
        print(
            f"| {case.title} | {name} | {found.seconds * 1000:.1f} | {found.spread:.0%} | {row['ratio']:.2f} | "
            f"{found.peak_bytes / 1e6:.0f} | {found.error:.0e} | {row['of_floor']:.0%} |",
            flush=True,
        )
        yield row
    del calls
    gc.collect()


if __name__ == "__main__":
    try:
        begin()
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped; finished cases are kept.", file=sys.stderr)
        sys.exit(INTERRUPTED)
