"""Whether a device computes what a CPU does: python -m bench.precision. Writes results/precision-DEVICE.json.

Networks of the released widths and few blocks run on the device in each number format, and on the CPU in float32 with the same
weights. Where a result is further off than the format explains, or there is none, the row is named and the exit code is 1.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.checkpoints.header import transformer_header
from sana.checkpoints.quantising import quantise
from sana.checkpoints.transformer import load_transformer
from sana.config import AUTOENCODERS, LATENT_CHANNELS, VARIANTS, StageConfig, TransformerIdentity
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.streaming import least_bytes
from sana.networks.transformer import SanaTransformer
from sana.text.gemma import Gemma2

from . import twins
from .cases import AUTOENCODER, random_text
from .machine import device_name, write_result
from .race import relative_error
from .weights import randomise

VARIANT = "sana-0.6b-1024px"
BLOCKS = 2
WORDS, VOCABULARY = 300, 8192  # of Gemma: tokens of a text, and of the vocabulary, whose size changes no arithmetic
TOKENS = 16_384  # of a picture of 4096 px
# Of the relative L2 distance: a few times what rounding gives on a CPU. The DC-AE amplifies it by its many norms.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SUM_BOUND = 4e-3  # of a sum that is rounded to bfloat16 once, which changes it by up to 2^-9
PACKED = ("fp8", "nvfp4")

Outcome = tuple[Tensor, Tensor]  # found on the device, and expected


@dataclass(frozen=True)
class Check:
    """What is computed, in which format, how far off it may be, and how."""

    title: str
    form: str
    bound: float
    run: Callable[[], Outcome]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def transformer_checks(device: str, side: int, folder: Path) -> Iterator[Check]:
    """A step with guidance at `side` px. Packed weights are those of files that `sana convert --quantize` writes."""
    row = VARIANTS[VARIANT]
    config = replace(row.transformer, depth=BLOCKS)
    plain = randomise(SanaTransformer(config), seed=0)
    identity = TransformerIdentity(config, "custom", row.base_size, row.flow_shift, row.dtype, "bench")
    x = torch.randn(2, LATENT_CHANNELS, side // 32, side // 32)
    inputs = (x, torch.tensor([900.0, 300.0]), *random_text(plain, 2, torch.float32, "cpu"))

    expected = cache(lambda: plain(*inputs))

    def outcome(dtype: torch.dtype) -> Outcome:
        on_device = copy.deepcopy(plain).to(device, dtype)
        return on_device(*(tensor.to(device) for tensor in inputs)), expected()

    def packed(form: str) -> Outcome:
        target = folder / f"{form}.safetensors"
        quantise(source, target, form, dtype=torch.float32)
        found = load_transformer(target, torch.bfloat16).to(device)(*(tensor.to(device) for tensor in inputs))
        return found, load_transformer(target)(*inputs)

    title = f"transformer, {side} px"
    for dtype, bound in BOUNDS.items():
        yield Check(title, name_of(dtype), bound, partial(outcome, dtype))
    save_file(plain.state_dict(), source := folder / "plain.safetensors", transformer_header(identity))
    for form in PACKED:
        yield Check(title, f"{form} in bfloat16", BOUNDS[torch.bfloat16], partial(packed, form))


def autoencoder_checks(device: str, side: int) -> Iterator[Check]:
    """Encoding, and decoding at once and in as little memory as the size allows. Not in float16, which overflows."""
    config = AUTOENCODERS[AUTOENCODER]
    config = replace(config, encoder=shallow(config.encoder), decoder=shallow(config.decoder))
    network = randomise(DCAutoencoder(config), seed=0)
    image = torch.rand(1, 3, side, side) * 2 - 1
    latent = torch.randn(1, LATENT_CHANNELS, side // 32, side // 32)

    given = {"encode": image, "decode": latent}
    expected = cache(lambda way: getattr(network, way)(given[way]))

    def outcome(way: str, dtype: torch.dtype, bounded: bool) -> Outcome:
        on_device = copy.deepcopy(network).to(device, dtype)
        most = least_bytes(on_device.decoder, latent.shape, dtype) if bounded else None
        return getattr(on_device, way)(given[way].to(device, dtype), most), expected(way)

    for way, bounded, suffix in (("encode", False, ""), ("decode", False, ""), ("decode", True, " in least memory")):
        for dtype in (torch.float32, torch.bfloat16):
            run = partial(outcome, way, dtype, bounded)
            yield Check(f"{way}, {side} px{suffix}", name_of(dtype), BOUNDS[dtype], run)


def shallow(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
    """One block in each stage that has any."""
    return tuple(replace(stage, depth=min(stage.depth, 1)) for stage in stages)


def text_checks(device: str) -> Iterator[Check]:
    """Gemma's hidden states of a long prompt. Not in float16, which overflows."""
    config = replace(twins.GEMMA_2_2B, num_hidden_layers=BLOCKS, vocab_size=VOCABULARY)
    network = randomise(Gemma2(config), seed=0)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.sub_(1.0)  # Gemma adds one
    tokens = torch.randint(VOCABULARY, (1, WORDS))
    expected = cache(lambda: network(tokens)[0])

    def outcome(dtype: torch.dtype) -> Outcome:
        return copy.deepcopy(network).to(device, dtype)(tokens.to(device))[0], expected()

    for dtype in (torch.float32, torch.bfloat16):
        yield Check(f"Gemma-2-2b, {WORDS} tokens", name_of(dtype), BOUNDS[dtype], partial(outcome, dtype))


def sum_checks(device: str) -> Iterator[Check]:
    """The sums of linear attention in bfloat16, as they are drawn with and as they are trained with.

    Keys and values are the tokens themselves, so that nothing is rounded but the sums. A product may add its parts in bfloat16
    where PyTorch is allowed to, which is its default.
    """
    attention = SanaTransformer(replace(VARIANTS[VARIANT].transformer, depth=1)).transformer_blocks[0].attn1
    for layer in (attention.to_k, attention.to_v):
        nn.init.eye_(layer.weight)
    on_device = copy.deepcopy(attention).to(device, torch.bfloat16)
    tokens = torch.randn(1, TOKENS, attention.to_k.in_features).bfloat16() + 1
    flags = torch.backends.cuda.matmul

    def outcome(reduced: bool, training: bool) -> Outcome:
        before, flags.allow_bf16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction, reduced
        try:
            with torch.set_grad_enabled(training):
                return on_device.state(tokens.to(device)).detach(), attention.state(tokens.float()).detach()
        finally:
            flags.allow_bf16_reduced_precision_reduction = before

    for reduced in (False, True):
        for training in (False, True):
            title = f"sums over {TOKENS:,} tokens{', trained' if training else ''}"
            form = f"bfloat16, {'with' if reduced else 'without'} reduced precision"
            yield Check(title, form, SUM_BOUND, partial(outcome, reduced, training))


def checks(device: str, side: int, folder: Path) -> Iterator[Check]:
    yield from sum_checks(device)
    yield from transformer_checks(device, side, folder)
    yield from autoencoder_checks(device, side // 2)
    yield from text_checks(device)


@torch.no_grad()
def checked(check: Check) -> dict[str, object]:
    """The row of a check. failed: why there is no result, or that it is too far off; empty: neither."""
    row: dict[str, object] = {"what": check.title, "format": check.form, "bound": check.bound, "error": None}
    try:
        found, expected = check.run()
    except RuntimeError as error:  # no kernel, no memory, or a package that is missing
        return row | {"failed": str(error).strip().split("\n")[0]}
    error = relative_error(found.cpu(), expected)
    failed = "" if error < check.bound else f"differs by {error:.1e} from the CPU in float32"
    return row | {"error": error if error == error else None, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="px of the step, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/ of this device)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 are compared in float32
    torch.manual_seed(0)
    print(f"{device_name()}\n\n| what | format | error | at most | |\n|---|---|---:|---:|---|", flush=True)
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        for check in checks(device, options.side, Path(folder)):
            rows.append(row := checked(check))
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            print(f"| {check.title} | {check.form} | {error} | {check.bound:.0e} | {row['failed']} |", flush=True)
            path = write_result(f"precision-{device}", {"side": options.side, "rows": rows}, options.out)
    print(path)
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
