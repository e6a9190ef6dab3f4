"""What is resident where memory is bounded: python -m bench.resident. Prints a table and writes results/resident.json.

Decoding and encoding in least memory, as the shell does it within a bound, by the bytes that PyTorch allocates and by those
that the process grows by. Each number is of a process of its own, on Linux with glibc. The exit code is 1 where more is
resident than 1.25 times the bound and 64 MB.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from sana.config import AUTOENCODERS, LATENT_CHANNELS
from sana.networks.autoencoder import DCAutoencoder, decode_within_memory, encode_within_memory
from sana.networks.streaming import least_bytes

from .cases import AUTOENCODER
from .machine import device_name, write_result
from .offload import reset_resident, resident_peak
from .race import cpu_peak_memory
from .weights import randomise

SIDES = (512, 1024)
DTYPES = ("bfloat16", "float32")
RUNS = ("decode", "encode")
WARM = 64  # px, of a call before, by which libraries have what they keep
MEASURES = ("allocated", "resident")


@dataclass(frozen=True)
class Row:
    """Bytes beyond weights and input; the two measured ones with the result, in float32."""

    run: str
    side: int  # px
    dtype: str
    bound: int
    allocated: int
    resident: int

    @property
    def allowed(self) -> int:
        return int(1.25 * self.bound + 64e6)

    @property
    def title(self) -> str:
        return f"{self.run}, {self.side} px, {self.dtype}"


def measure(run: str, side: int, dtype: str) -> Row:
    """One row, each number of it from a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        arguments = ((run, side, dtype, each) for each in MEASURES)
        bounds, numbers = zip(*processes.map(taken, *zip(*arguments, strict=True)), strict=True)
    return Row(run, side, dtype, bounds[0], *numbers)


@torch.no_grad()
def taken(run: str, side: int, dtype: str, measure: str) -> tuple[int, int]:
    """The bound, and the most bytes by one of MEASURES, the result included. For a process that has done nothing else."""
    number = getattr(torch, dtype)
    network = DCAutoencoder(AUTOENCODERS[AUTOENCODER], dtype=number, device="meta").to_empty(device="cpu")
    randomise(network)
    decodes = run == "decode"
    half, within = (network.decoder, decode_within_memory) if decodes else (network.encoder, encode_within_memory)
    within(network, random_input(run, WARM))
    x = random_input(run, side)
    bound = least_bytes(half, x.shape, number)
    if measure == "allocated":
        return bound, cpu_peak_memory(lambda: within(network, x, bound))[1]
    before = reset_resident()
    within(network, x, bound)
    return bound, resident_peak() - before


def random_input(run: str, side: int) -> torch.Tensor:
    """A latent or a picture of side x side px."""
    return torch.randn(1, LATENT_CHANNELS, side // 32, side // 32) if run == "decode" else torch.rand(1, 3, side, side)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resident", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int, default=1024, help="largest side to run, px (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/memory.md names)"
    )
    options = parser.parse_args()
    print(f"{device_name()}, MB\n\n| | bound | allocated | resident | allowed |\n|---|---:|---:|---:|---:|", flush=True)
    rows = []
    for side, dtype, run in product(SIDES, DTYPES, RUNS):
        if side <= options.measure:
            row = measure(run, side, dtype)
            numbers = (row.bound, row.allocated, row.resident, row.allowed)
            print(f"| {row.title} | {' | '.join(f'{number / 1e6:.0f}' for number in numbers)} |", flush=True)
            rows.append(row)
            path = write_result("resident", {"rows": [asdict(row) for row in rows]}, options.out)
    print(path)
    return 1 if any(row.resident > row.allowed for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
