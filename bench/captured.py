"""Steps and whole samplings by CUDA graphs against those without: python -m bench.captured. Needs a GPU by CUDA or ROCm.

Writes results/captured-DEVICE-DTYPE.json. Both compute with the same random weights and must agree; where they do not, or cannot,
the case is named and the exit code is 1. The first call of a graph records it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from sana import capturing
from sana.config import AUTOENCODERS, LATENT_CHANNELS, VARIANTS, TransformerIdentity
from sana.networks.autoencoder import DCAutoencoder
from sana.networks.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.sampling.guidance import Condition

from .__main__ import DTYPES, TOLERANCE, count
from .cases import AUTOENCODER, PROMPT, call, random_text
from .machine import device_name, write_result
from .race import Call, race, seconds
from .weights import in_8_bits, randomise

VARIANT_OF_ALL = "sana-0.6b-1024px"  # of the cases beside a step of each
STEPS_OF = (VARIANT_OF_ALL, "sana-sprint-0.6b-1024px", "sana-1.6b-1024px")
PLAIN, GRAPHS = "ours", "ours, graphs"
SAMPLING_TOLERANCE = 2  # times that of a step: rounding adds up


def network(variant: str, dtype: torch.dtype, device: str, packed: bool = False) -> SanaTransformer:
    """With random weights. packed: in 8 bits."""
    made = SanaTransformer(VARIANTS[variant].transformer, dtype=dtype, device=device)
    return randomise(in_8_bits(made, dtype) if packed else made)


def step_calls(variant: str, side: int, dtype: torch.dtype, device: str, packed: bool = False) -> dict[str, Call]:
    """An evaluation with guidance, but for Sprint: text keys and modulation are there already."""
    made = network(variant, dtype, device, packed)
    embed = torch.full((1,), 0.45, device=device) if made.config.guidance_embed else None
    batch = 1 if made.config.guidance_embed else 2
    x = torch.randn(batch, LATENT_CHANNELS, side // 32, side // 32, device=device).to(dtype)
    time_at = torch.full((1,), 0.5 if made.config.continuous_time else 500.0, device=device)
    modulation = call(made.modulation, time_at, embed)()
    context = call(made.text_context, *random_text(made, batch, dtype, device))()
    ways = {PLAIN: made.velocity, GRAPHS: capturing.CapturedVelocity(made, torch.device(device))}
    return {name: call(way, x, modulation, context) for name, way in ways.items()}


def sampling_calls(steps: int, side: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """All steps of a picture by a pipeline, from encoded texts to the latent."""
    row, made = VARIANTS[VARIANT_OF_ALL], network(VARIANT_OF_ALL, dtype, device)
    identity = TransformerIdentity(row.transformer, "custom", row.base_size, row.flow_shift, row.dtype, "bench")
    autoencoder = DCAutoencoder(AUTOENCODERS[AUTOENCODER], device="meta")  # asked for its sizes alone
    texts = tuple(Condition(*random_text(made, 1, dtype, device)) for _ in range(2))
    settings = Settings(height=side, width=side, steps=steps)

    def sample(pipeline: SanaPipeline) -> torch.Tensor:
        *_, last = pipeline.follow(pipeline.plan(PROMPT, settings), texts)
        return last.next_x

    make = partial(SanaPipeline, made, autoencoder, None, identity)
    return {PLAIN: call(sample, make()), GRAPHS: call(sample, make(fast=True))}


def cases(side: int, steps: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, float, Callable]]:
    """Title, tolerance and what builds the calls of each."""
    tolerance = TOLERANCE[dtype]
    for variant in STEPS_OF:
        yield f"step, {variant}, {side} px", tolerance, partial(step_calls, variant, side, dtype, device)
    small = partial(step_calls, VARIANT_OF_ALL, side // 2, dtype, device)
    yield f"step, {VARIANT_OF_ALL}, {side // 2} px", tolerance, small
    packed = partial(step_calls, VARIANT_OF_ALL, side, dtype, device, packed=True)
    yield f"step, {VARIANT_OF_ALL} in 8 bits, {side} px", tolerance, packed
    whole = partial(sampling_calls, steps, side, dtype, device)
    yield f"{steps} steps, {VARIANT_OF_ALL}, {side} px", SAMPLING_TOLERANCE * tolerance, whole


def run(
    title: str, tolerance: float, build: Callable[[], dict[str, Call]], repeats: int
) -> Iterator[dict[str, object]]:
    """Race one case, print its lines and return them. Raises ArithmeticError as `race`, and RuntimeError."""
    calls = build()
    first = {name: seconds(each) for name, each in calls.items()}
    measured = race(calls, repeats, tolerance)
    for name, found in measured.items():
        ratio = measured[PLAIN].seconds / found.seconds
        print(
            f"| {title} | {name} | {found.seconds * 1000:.2f} | {found.spread:.0%} | {ratio:.2f} | "
            f"{first[name] * 1000:.0f} | {found.error:.0e} |",
            flush=True,
        )
        yield {"case": title, "candidate": name, **asdict(found), "ratio": ratio, "first_seconds": first[name]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.captured", description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="px, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=20, help="of a whole sampling (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=count, default=15, help="timed calls of each candidate (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/ of this device)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if capturing.graph_recorder(torch.device(device)) is None:
        print("Left out: graphs are recorded on a GPU by CUDA or ROCm, and PyTorch finds none here.", file=sys.stderr)
        return 2
    dtype, start = DTYPES[options.dtype], time.monotonic()
    result = {"dtype": str(dtype), "repeats": options.repeats, "rows": [], "failed": []}
    print(f"{device_name()}, {dtype}\n\n| case | candidate | ms | spread | x faster | first call, ms | error |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    for title, tolerance, build in cases(options.side, options.steps, dtype, device):
        try:
            result["rows"] += run(title, tolerance, build, options.repeats)
        except (ArithmeticError, RuntimeError) as error:
            result["failed"].append(f"{title}: {str(error).strip()}")
            print(f"| {result['failed'][-1]} |", flush=True)
        result["seconds"] = round(time.monotonic() - start, 1)
        path = write_result(f"captured-{device}-{options.dtype}", result, options.out)
    print(path)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
