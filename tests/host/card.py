"""A picture on a small card: .venv/tests/bin/python -m tests.host.card, after python3 tests. Writes card-SIDE.json
to bench/results/.

The real ComfyUI with its offloading, our nodes, and random weights at the real sizes in bfloat16, on the tests' stand-in for a
GPU: it computes on the CPU, but counts what PyTorch allocates and runs out of memory. Not counted, as on a GPU they would be:
workspaces of kernels, and gaps between allocations. An 8 GiB card has about 7 to give.
--real: on the GPU that is there, within as much of its memory, or on the CPU, where nothing is counted.
"""

import argparse
import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from bench.cases import AUTOENCODER
from bench.machine import device_name, write_result
from bench.memory import DTYPE, LONG_PROMPT, gibibytes
from bench.twins import autoencoder_pair, gemma_pair, transformer_pair
from sana.checkpoints.names import with_convolutions
from sana.checkpoints.text_encoder import stored_companions
from sana.config import AUTOENCODERS, VARIANTS
from sana.networks.memory import GIB
from sana.text.tokenizers import JsonTokenizer
from tests.host import second_device
from tests.host.boot import ON_CPU, Host, boot
from tests.host.hosts import NEWEST
from tests.host.second_device import MEMORY
from tests.sana.models import tokenizer_json

NAME = "random.safetensors"
DEMO = {"model": "demo", "text_encoder": "auto", "vae": "auto", "dtype": "auto", "variant": "auto"}
VRAM = {"normal": [], "low": ["--lowvram"], "no": ["--novram"]}  # flags of ComfyUI


@dataclass(frozen=True)
class Part:
    """One part of a picture. peak: bytes allocated at most, the weights that the host keeps meanwhile included."""

    part: str
    before: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Card:
    """What is allocated on the stand-in, or on the real device."""

    real: bool

    def restart(self) -> int:
        """Bytes allocated now, from which on the peak is counted anew."""
        if not self.real:
            MEMORY.peak = MEMORY.used
        elif torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self.peak

    @property
    def peak(self) -> int:
        if not self.real:
            return MEMORY.peak
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0

    def prepare(self, gib: float) -> list[str]:
        """Limit the memory that there is to give. Returns flags for ComfyUI."""
        if not self.real:
            second_device.install()
            MEMORY.capacity = int(gib * GIB)
            return []
        if not torch.cuda.is_available():
            return ON_CPU
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
        return ["--reserve-vram", f"{max(0.0, total / GIB - gib):.2f}"]


def write_models(folder: Path, variant: str) -> dict[str, str]:
    """Files of all three parts where the host looks for them. Returns the inputs of the node that loads them."""
    transformer, _ = transformer_pair(VARIANTS[variant].transformer, DTYPE, "cpu")
    save_file(with_convolutions(transformer.state_dict()), folder / "diffusion_models" / NAME)
    del transformer
    gemma, _ = gemma_pair(DTYPE, "cpu")
    companions = stored_companions(JsonTokenizer(tokenizer_json()), gemma.model.config)
    save_file({**gemma.model.state_dict(), **companions}, folder / "text_encoders" / NAME)
    del gemma
    autoencoder, _ = autoencoder_pair(AUTOENCODERS[AUTOENCODER], DTYPE, "cpu")
    save_file(autoencoder.state_dict(), folder / "vae" / NAME)
    return {"model": NAME, "text_encoder": NAME, "vae": NAME, "dtype": "auto", "variant": variant}


@torch.inference_mode()
def draw(host: Host, card: Card, models: dict[str, str], side: int, steps: int) -> list[Part]:
    """A picture with guidance, node by node."""
    parts: list[Part] = []

    def run(part: str, node: str, **inputs: object) -> object:
        gc.collect()
        before = card.restart()
        start = time.monotonic()
        result = host.call(node, **inputs)
        peak = card.peak
        if card.real and torch.cuda.is_available():
            torch.cuda.synchronize()
        parts.append(Part(part, before, peak, time.monotonic() - start))
        print(f"| {part} | {gibibytes(before)} | {gibibytes(peak)} | {parts[-1].seconds:.1f} |", flush=True)
        return result[0]

    model, clip, vae = host.call("SanaCheckpointLoader", **models)
    texts = {"clip": clip, "custom_instruction": ""}
    positive = run("prompt of 280 words", "GemmaTextEncode", **texts, text=LONG_PROMPT, instruction="official")
    negative = run("negative prompt", "GemmaTextEncode", **texts, text="blurry", instruction="none")
    (latent,) = host.call(
        "EmptySanaLatentImage", size=host.pack("nodes.latent").FREE, width=side, height=side, batch_size=1
    )
    sampling = {"seed": 0, "steps": steps, "cfg": 4.5, "denoise": 1.0, "flow_shift": 0.0}
    prompts = {"positive": positive, "negative": negative}
    samples = run("sampling with guidance", "FlowDPMSampler", model=model, latent=latent, **prompts, **sampling)
    image = run("decoding", "DCAEDecode", samples=samples, vae=vae, max_memory=0.0)
    if image.shape != (1, side, side, 3) or not bool(image.isfinite().all()):
        raise RuntimeError(f"the picture is {tuple(image.shape)} or not finite")
    return parts


def main() -> None:
    top = argparse.ArgumentParser(prog="python -m tests.host.card", description=__doc__.splitlines()[0])
    top.add_argument("--gib", type=float, default=7.0, help="that the card has to give (default: %(default)s)")
    top.add_argument("--side", type=int, default=1024, help="px (default: %(default)s)")
    top.add_argument("--steps", type=int, default=2, help="default: %(default)s")
    top.add_argument("--variant", choices=("demo", *VARIANTS), default="sana-1.6b-1024px", help="default: %(default)s")
    top.add_argument("--real", action="store_true", help="on a GPU, or on the CPU if there is none")
    top.add_argument("--vram", choices=tuple(VRAM), default="normal", help="flag of ComfyUI (default: %(default)s)")
    top.add_argument("--out", type=Path, help="JSON file to write (default: the one in bench/results/ of this side)")
    options = top.parse_args()
    out = vars(options).pop("out")
    card = Card(options.real)
    flags = card.prepare(options.gib)
    with TemporaryDirectory() as folder:
        host = boot(NEWEST, Path(folder, "host"), *flags, *([] if flags == ON_CPU else VRAM[options.vram]))
        models = DEMO if options.variant == "demo" else write_models(host.base / "models", options.variant)
        print(f"{device_name()}, ComfyUI {NEWEST}, {options.variant}, {options.side} px, {options.gib} GiB")
        print("\n| part | GiB before | GiB at most | s |\n|---|---:|---:|---:|", flush=True)
        parts = draw(host, card, models, options.side, options.steps)
    result = {"comfyui": NEWEST, **vars(options), "parts": [asdict(part) for part in parts]}
    print(write_result(f"card-{options.side}", result, out))


if __name__ == "__main__":
    main()
