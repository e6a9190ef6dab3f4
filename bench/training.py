"""How fast a SANA is trained: python -m bench.training. Writes results/training-DEVICE.json.

Of all weights, and of a LoRA beside frozen ones in bfloat16, with random weights, latents and texts: steps a second from one
step to the next by the training loop itself, and on a GPU the most memory that they took. Nothing is saved.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from sana.config import LATENT_CHANNELS, VARIANTS
from sana.networks.transformer import SanaTransformer
from sana.training.adapters import AdapterConfig, add_adapter
from sana.training.flow import FlowBatch, FlowObjective
from sana.training.loop import Report, TrainingConfig, Watch, train

from .cases import TEXT_TOKENS, random_text
from .machine import device_name, write_result
from .weights import randomise

WARM = 3  # steps that are not counted, the first of which makes what the optimiser remembers


class EnoughError(Exception):
    """All steps are done that were to be timed. Raised before a state is saved, which takes longer than they do."""


def every_weight(variant: str) -> tuple[SanaTransformer, nn.Module | None]:
    """The network, and what of it is trained: all."""
    return randomise(SanaTransformer(VARIANTS[variant].transformer)).requires_grad_(True), None


def lora(variant: str) -> tuple[SanaTransformer, nn.Module | None]:
    """The network with an adapter of rank 16, and the adapter."""
    network = randomise(SanaTransformer(VARIANTS[variant].transformer)).bfloat16()
    return network, add_adapter(network, AdapterConfig(rank=16))


KINDS: dict[str, Callable[[str], tuple[SanaTransformer, nn.Module | None]]] = {
    "all weights": every_weight,
    "LoRA of rank 16": lora,
}


def measure(kind: str, variant: str, side: int, size: int, steps: int) -> dict[str, object]:
    """Train for some steps on `size` pictures of `side` px each. Raises RuntimeError where the device has no room."""
    network, weights = KINDS[kind](variant)
    text, mask = random_text(network, size, torch.float32, "cpu")
    latents = torch.randn(size, LATENT_CHANNELS, side // 32, side // 32)
    objective = FlowObjective(network, null=torch.zeros(TEXT_TOKENS, network.config.text_width))
    stamps: list[float] = []

    def note(report: Report) -> None:
        """By now the loss is on the CPU, so the step is done."""
        stamps.append(time.perf_counter())
        if report.step == WARM + steps:
            raise EnoughError

    def batches(number: int, process: int) -> FlowBatch:
        return FlowBatch(latents, text=text, text_mask=mask, seed=number)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    config = TrainingConfig(WARM + steps + 1, 1e-5, warmup=1, save_every=WARM + steps + 1)
    with TemporaryDirectory() as folder:
        with suppress(EnoughError):
            train(objective.train(), batches, config, Path(folder), weights=weights, watch=Watch(bar=False, step=note))
    seconds = statistics.median(end - begun for begun, end in zip(stamps[WARM - 1 :], stamps[WARM:], strict=False))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"steps_per_second": 1 / seconds, "pictures_per_second": size / seconds, "peak_bytes": peak}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="sana-0.6b-1024px", help="default: %(default)s")
    parser.add_argument("--side", type=int, default=1024, help="px, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="to time (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/ of this device)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {"variant": options.variant, "side": options.side, "size": options.batch_size, "steps": options.steps}
    print(f"{device_name()}, {options.variant}, {options.batch_size} pictures of {options.side} px\n")
    print("| trained | steps a second | pictures a second | peak GB |\n|---|---:|---:|---:|", flush=True)
    rows, failed = [], []
    for kind in KINDS:
        try:
            row = measure(kind, **given)
        except RuntimeError as error:
            failed.append(f"{kind}: {str(error).strip()}")
            print(f"| {failed[-1]} |", flush=True)
        else:
            rows.append({"trained": kind, **row})
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
            speeds = f"{row['steps_per_second']:.2f} | {row['pictures_per_second']:.2f}"
            print(f"| {kind} | {speeds} | {peak} |", flush=True)
        path = write_result(f"training-{device}", {**given, "rows": rows, "failed": failed}, options.out)
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
