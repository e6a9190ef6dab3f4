"""What the program itself takes in a step, beside arithmetic: python -m bench.program. Writes results/program.json in seconds.

What binds a fast GPU besides launches is Python and PyTorch's dispatch. It shows in a network as deep as the 0.6B on tensors so
small that arithmetic costs nothing, on one thread of a CPU. Candidates share their weights, take turns in one process, and must
agree. `python -m tests.host.steps program` measures a step inside ComfyUI, too, for the same table.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from sana.config import LATENT_CHANNELS, VARIANTS, TransformerConfig
from sana.networks.transformer import SanaTransformer

from .cases import call
from .machine import write_result
from .race import Call, relative_error, seconds, spread
from .twins import transformer_pair

CONFIG = replace(
    VARIANTS["sana-0.6b-1024px"].transformer, depth=28, hidden_size=64, ff_width=160, cross_heads=4, text_width=64
)
SIDE, TEXT_TOKENS = 2, 20  # cells of the latent, of which each is a token; tokens of the text, which all count
SIGMA = 0.5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
REFERENCE, SHELL, PLAIN, HOST = "diffusers", "here", "here, with layers of torch.nn", "in ComfyUI"


@dataclass(frozen=True)
class Step:
    """A step with guidance: our network, whose weights all candidates have, and what it is given."""

    network: SanaTransformer
    x: Tensor  # (2, 32, SIDE, SIDE)
    text: Tensor  # (2, TEXT_TOKENS, text_width)


InHost = Callable[[Step], Call]  # the same step by a host; the call gives a velocity


def candidates(dtype: torch.dtype, config: TransformerConfig, in_host: InHost | None) -> dict[str, Call]:
    """A step by each, the reference first. Text keys and modulation are there already in ours, as in its samplers."""
    ours, theirs = transformer_pair(config, dtype)
    plain = SanaTransformer(config, operations=nn, device="meta").eval()
    plain.load_state_dict(ours.state_dict(), strict=True, assign=True)
    x = torch.randn(2, LATENT_CHANNELS, SIDE, SIDE).to(dtype)
    text = torch.randn(2, TEXT_TOKENS, config.text_width).to(dtype)
    others = {"encoder_attention_mask": torch.ones(text.shape[:2], dtype=dtype), "return_dict": False}
    timestep = torch.full((2,), 1000 * SIGMA)
    context, modulation = call(ours.text_context, text)(), call(ours.modulation, timestep[:1])()
    found = {
        REFERENCE: call(lambda: theirs(x, encoder_hidden_states=text, timestep=timestep, **others)[0]),
        SHELL: call(ours.velocity, x, modulation, context),
        PLAIN: call(plain.velocity, x, modulation, context),
    }
    return found if in_host is None else {**found, HOST: in_host(Step(ours, x, text))}


def measured(calls: dict[str, Call], repeats: int, tolerance: float) -> list[dict[str, object]]:
    """Rows by candidate. seconds: median and least; ratio: how many times as fast as the first in the same round, median.

    Raises ArithmeticError for a result further than tolerance from the first candidate's.
    """
    expected = next(iter(calls.values()))()
    for name, each in calls.items():
        error = relative_error(each(), expected)
        if not error < tolerance:
            raise ArithmeticError(f"{name} differs by {error:.1e} from {next(iter(calls))}, more than {tolerance:.0e}")
    rounds = [{name: seconds(each) for name, each in calls.items()} for _ in range(repeats)]
    rows = []
    for name in calls:
        times = [found[name] for found in rounds]
        ratios = [found[next(iter(calls))] / found[name] for found in rounds]
        row = {"candidate": name, "seconds": statistics.median(times), "least": min(times)}
        rows.append({**row, "ratio": statistics.median(ratios), "spread": spread(ratios)})
    return rows


def main(in_host: InHost | None = None) -> None:
    """in_host: makes a step by a host; None: there is none."""
    parser = argparse.ArgumentParser(prog="python -m bench.program", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each candidate (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/speed.md shows)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"repeats": options.repeats, "load_before": psutil.getloadavg()[0], "rows": []}
    for dtype, tolerance in TOLERANCE.items():
        for row in measured(candidates(dtype, CONFIG, in_host), options.repeats, tolerance):
            result["rows"].append({"dtype": str(dtype).removeprefix("torch."), **row})
            print(result["rows"][-1], flush=True)
    print(write_result("program", {**result, "load_after": psutil.getloadavg()[0]}, options.out))
    if in_host is None:
        print("A step inside ComfyUI is left out: python -m tests.host.steps program measures it, after python3 tests.")


if __name__ == "__main__":
    main()
