"""What a picture takes on a card at most: python -m bench.memory. Prints a table and writes results/memory.json.

The parts of a picture come one after another, each with its own weights, as a host that offloads keeps them. Working memory
comes from the memory model that the nodes rely on; up to a size that this machine runs in minutes it is measured beside it.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch

from sana.config import AUTOENCODERS, LATENT_CHANNELS, VARIANTS
from sana.networks.memory import GIB
from sana.networks.streaming import least_bytes
from sana.networks.transformer import WORKING_BYTES

from .cases import AUTOENCODER, call, random_text
from .machine import device_name, write_result
from .race import peak_memory
from .twins import autoencoder_pair, gemma_pair, transformer_pair

DTYPE = torch.bfloat16
SIDES = (1024, 2048, 4096)
CARD = 8  # GiB
LONG_PROMPT = " ".join(["word"] * 280)


@dataclass(frozen=True)
class Phase:
    """One part of a picture. model, measured: bytes beside the weights; None: not known, or not run."""

    phase: str
    side: int  # px; 0: does not matter
    weights: int
    model: int | None
    measured: int | None = None

    @property
    def total(self) -> int:
        return self.weights + max(self.model or 0, self.measured or 0)


def prompt_phase(device: str) -> Phase:
    text_encoder, model = gemma_pair(DTYPE, device)
    _, peak = peak_memory(call(lambda: text_encoder([LONG_PROMPT])[0]))
    return Phase(f"prompt of {LONG_PROMPT.count('word')} words, Gemma-2-2b", 0, parameter_bytes(model), None, peak)


def step_phases(variant: str, device: str, largest: int) -> Iterator[Phase]:
    """A step with guidance, that is of a batch of two. largest: px; what is larger is not measured."""
    network, _ = transformer_pair(VARIANTS[variant].transformer, DTYPE, device)
    text, mask = random_text(network, 2, DTYPE, device)
    context = call(network.text_context, text, mask.fill_(True))()
    modulation = call(network.modulation, torch.full((2,), 500.0, device=device))()
    texts = sum(part.nbytes for pair in context.keys_values for part in pair)
    for side in SIDES:
        shape = torch.Size((2, LATENT_CHANNELS, side // 32, side // 32))
        model = network.activation_bytes(shape, DTYPE.itemsize, WORKING_BYTES) + texts
        peak = None
        if side <= largest:
            x = torch.randn(shape, device=device).to(DTYPE)
            peak = peak_memory(call(network.velocity, x, modulation, context))[1] + texts
        yield Phase(f"step with guidance, {variant}", side, parameter_bytes(network), model, peak)


def decode_phases(device: str, largest: int) -> Iterator[Phase]:
    """In as little memory as the size allows; the picture, which is made meanwhile, included."""
    network, _ = autoencoder_pair(AUTOENCODERS[AUTOENCODER], DTYPE, device)
    for side in SIDES:
        shape = torch.Size((1, LATENT_CHANNELS, side // 32, side // 32))
        picture = 3 * side**2 * DTYPE.itemsize
        least = least_bytes(network.decoder, shape, DTYPE)
        peak = None
        if side <= largest:
            peak = peak_memory(call(network.decode, torch.randn(shape, device=device).to(DTYPE), least))[1]
        yield Phase("decode, DC-AE", side, parameter_bytes(network.decoder), least + picture, peak)


def parameter_bytes(network: torch.nn.Module) -> int:
    return DTYPE.itemsize * sum(parameter.numel() for parameter in network.parameters())


def gibibytes(number: int | None) -> str:
    return "" if number is None else f"{number / GIB:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="sana-1.6b-1024px", help="default: %(default)s")
    parser.add_argument("--measure", type=int, default=1024, help="largest side to run, px (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/memory.md names)"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device_name()}, {DTYPE}, GiB\n\n| part | px | weights | model | measured | together |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    rows = []
    parts = (
        (prompt_phase(device),),
        step_phases(options.variant, device, options.measure),
        decode_phases(device, options.measure),
    )
    for phase in chain.from_iterable(parts):
        numbers = (gibibytes(n) for n in (phase.weights, phase.model, phase.measured, phase.total))
        print(f"| {phase.phase} | {phase.side or ''} | {' | '.join(numbers)} |", flush=True)
        rows.append(phase)
        most = max(phase.total for phase in rows)
        result = {"variant": options.variant, "phases": [asdict(phase) for phase in rows], "most": most}
        path = write_result("memory", result, options.out)  # now, for the case that the next one ends everything
    verdict = "suffices" if most < CARD * GIB else "is too small"
    print(f"\nThe most at once: {gibibytes(most)} GiB; a card of {CARD} GiB {verdict}.")
    print(path)


if __name__ == "__main__":
    main()
