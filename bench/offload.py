"""What the parts of the shell take on a device, one after another: python -m bench.offload. Prints a table and writes
results/offload-VARIANT.json.

The memory model that `--offload auto` decides by, for several sizes, and up to one size what is measured beside it: bytes that
PyTorch allocates, and resident memory of this process beyond what it was before the first part. Weights are random.
"""

import argparse
import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from sana.config import AUTOENCODERS, VARIANTS, GemmaConfig, TransformerIdentity
from sana.inputs import encode_texts
from sana.needs import needs
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.offloading import weight_bytes
from sana.pipeline import SanaPipeline
from sana.plan import Plan, Settings
from sana.sampling.guidance import Condition
from sana.text.gemma import Gemma2
from sana.text.text_encoder import GemmaTextEncoder

from .cases import AUTOENCODER, random_text
from .machine import device_name, write_result
from .memory import DTYPE, LONG_PROMPT, SIDES, gibibytes
from .race import cpu_peak_memory
from .twins import WordTokenizer
from .weights import in_8_bits, randomise


@dataclass(frozen=True)
class Phase:
    """Bytes. weights: on the device; elsewhere: of Gemma's embedding, on the CPU. model, measured: beside weights.

    resident: weights, the embedding and all else, measured; None: not run.
    """

    phase: str
    side: int
    weights: int
    elsewhere: int
    model: int
    measured: int | None = None
    resident: int | None = None


class Networks:
    """All on meta, and one at a time with numbers. bits: of the weights of matrices but for the DC-AE's."""

    def __init__(self, variant: str, bits: int) -> None:
        row = VARIANTS[variant]
        self.bits = bits
        self.identity = TransformerIdentity(
            row.transformer, variant, row.base_size, row.flow_shift, row.dtype, "the table"
        )
        options = {"dtype": DTYPE, "device": "meta"}
        self.transformer = self._packed(SanaTransformer(row.transformer, **options))
        self.autoencoder = DCAutoencoder(AUTOENCODERS[AUTOENCODER], **options)
        self.text_encoder = GemmaTextEncoder(self._packed(Gemma2(GemmaConfig(), **options)), WordTokenizer())

    def _packed(self, network: nn.Module) -> nn.Module:
        return in_8_bits(network, DTYPE) if self.bits == 8 else network

    def phases(self, side: int) -> Iterator[tuple[Phase, nn.Module, Callable[[], object]]]:
        """Each phase, the part that it needs, and how it runs."""
        pipeline = SanaPipeline(self.transformer, self.autoencoder, self.text_encoder, self.identity)
        plan = pipeline.plan(LONG_PROMPT, Settings(height=side, width=side, steps=1))
        found = needs(plan, self.transformer, self.autoencoder, self.text_encoder)
        gemma = self.text_encoder.model
        embedding = weight_bytes(gemma.embed_tokens)
        parts = {
            "encoding the prompt": (gemma, embedding, lambda: self._encode(plan)),
            "sampling": (self.transformer, 0, lambda: self._step(pipeline, plan)),
            "decoding": (self.autoencoder.decoder, 0, lambda: self._decode(pipeline, side, found["decoding"].least)),
        }
        for name, (part, elsewhere, run) in parts.items():
            yield Phase(name, side, weight_bytes(part) - elsewhere, elsewhere, found[name].least), part, run

    def _encode(self, plan: Plan) -> object:
        self.text_encoder.forget()
        return encode_texts(self.text_encoder, plan)

    def _step(self, pipeline: SanaPipeline, plan: Plan) -> object:
        cond = Condition(*random_text(self.transformer, 1, DTYPE, "cpu"))
        cond.text_mask.fill_(True)
        return [step.next_x for step in pipeline.follow(plan, (cond, cond))]

    def _decode(self, pipeline: SanaPipeline, side: int, need: int) -> object:
        return pipeline.pictures(torch.randn(1, 32, side // 32, side // 32), need - 12 * side**2)


def measure(phase: Phase, part: nn.Module, run: Callable[[], object], before: int) -> Phase:
    """The part gets numbers, runs twice, once for each measure, and loses them. before: resident bytes without any part."""
    gc.collect()
    reset_resident()
    part.to_empty(device="cpu")
    randomise(part)
    with torch.no_grad():
        run()
        resident = resident_peak() - before
        _, peak = cpu_peak_memory(run)
    part.to_empty(device="meta")
    return Phase(**{**asdict(phase), "measured": peak, "resident": resident})


def reset_resident() -> int:
    """Resident bytes of this process, from which on the peak is counted anew. Linux with glibc only.

    What nobody needs any more is given back first, since it would hide as much of what comes.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.offload", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="sana-0.6b-1024px", help="default: %(default)s")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8, help="of weights (default: %(default)s)")
    parser.add_argument("--measure", type=int, default=1024, help="largest side to run, px (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/ of this variant)")
    options = parser.parse_args()
    networks, rows = Networks(options.variant, options.bits), []
    before = reset_resident()
    print(f"{device_name()}, {options.variant}, {options.bits} bits, GiB\n")
    print("| phase | px | weights | elsewhere | model | measured | on the device | resident |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for side in SIDES:
        for phase, part, run in networks.phases(side):
            row = measure(phase, part, run, before) if side <= options.measure else phase
            together = row.weights + max(row.model, row.measured or 0)
            numbers = (row.weights, row.elsewhere, row.model, row.measured, together, row.resident)
            print(f"| {row.phase} | {row.side} | {' | '.join(map(gibibytes, numbers))} |", flush=True)
            rows.append(asdict(row))
    result = {"variant": options.variant, "bits": options.bits, "phases": rows}
    print(write_result(f"offload-{options.variant}", result, options.out))


if __name__ == "__main__":
    main()
