"""What torch.compile makes of networks, read from its output: python -m bench.compiled. Writes results/compiled.json in minutes.

Counted are places where the compiler gave up and left the graph, and in the code that it writes for a CPU the loops, each of which
would be a kernel on a GPU, and the calls of kernels in libraries. The code is not built. Blocks are all alike: one and two of them at the width of the
variant are compiled, and the rest of a step is the first and as many times the difference as there are blocks more.
"""

import argparse
import re
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

from sana.config import AUTOENCODERS, LATENT_CHANNELS, VARIANTS, TransformerConfig

from .cases import AUTOENCODER, call
from .machine import write_result
from .race import Call
from .twins import autoencoder_pair, transformer_pair

STEPS = ("sana-0.6b-1024px", "sana-1.6b-1024px", "sana-1.5-1.6b-1024px", "sana-sprint-0.6b-1024px")
SIDE, TEXT_TOKENS = 8, 20  # cells of the latent, and tokens; of 32 and 300 the kernels are as many
FUNCTION = re.compile(r"^(\w+) = async_compile\.cpp_pybinding\((.*?)^'''\)", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^    \{$", re.MULTILINE)  # of the outermost, in the body of a function
CALL = re.compile(r"^\s+(?:\w+ = )?((?:extern_kernels|torch\.ops)\.[\w.]+|cpp_\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """Graph breaks, loops that were generated, and kernels of libraries, in one call of a network."""

    breaks: int
    generated: int
    library: int

    def of_blocks(self, count: int, with_two: "Compiled") -> "Compiled":
        """Of a network of so many blocks, this being one of a single block."""
        pairs = zip(astuple(self), astuple(with_two), strict=True)
        return Compiled(*(one + (count - 1) * (two - one) for one, two in pairs))


def compiled(run: Call) -> Compiled:
    """run: a call of what torch.compile gave, not called yet. What it gives is not filled, since no kernel is built."""
    counters.clear()
    unbuilt = patch.object(AsyncCompile, "cpp_pybinding", lambda *given: lambda *buffers: None)
    one_thread = {"cpp.threads": 1, "force_disable_caches": True}  # of more, the code divides the loops
    with torch._inductor.config.patch(one_thread), unbuilt:
        _, codes = run_and_get_code(run)
    torch._dynamo.reset()
    found = [counted_code(code) for code in codes]
    return Compiled(sum(counters["graph_break"].values()), *map(sum, zip(*found, strict=True)))


def counted_code(code: str) -> tuple[int, int]:
    """Loops that the code runs, and kernels of libraries that it calls."""
    loops = {name: len(LOOP.findall(body)) for name, body in FUNCTION.findall(code)}
    calls = CALL.findall(code[code.index("def call(") :])
    generated = [loops[name] for name in calls if name in loops]
    return sum(generated), len(calls) - len(generated)


def step_calls(config: TransformerConfig) -> tuple[Call, Call]:
    """A step with guidance, which Sprint has none of, compiled: diffusers' and ours, whose text keys and modulation are there."""
    ours, theirs = transformer_pair(config, torch.bfloat16)
    batch = 1 if config.guidance_embed else 2
    x = random(batch, LATENT_CHANNELS, SIDE, SIDE)
    text, time = random(batch, TEXT_TOKENS, config.text_width), torch.full((batch,), 0.5)
    embed = time[:1] if config.guidance_embed else None
    context, modulation = call(ours.text_context, text)(), call(ours.modulation, time[:1], embed)()
    others = {"encoder_attention_mask": torch.ones(text.shape[:2]).to(text), "timestep": time, "return_dict": False}
    others |= {"guidance": time} if config.guidance_embed else {}
    network = torch.compile(theirs)
    return (
        call(lambda: network(x, encoder_hidden_states=text, **others)[0]),
        call(torch.compile(ours.velocity), x, modulation, context),
    )


def decode_calls() -> tuple[Call, Call]:
    """The DC-AE's decoder, compiled: diffusers' and ours."""
    ours, theirs = autoencoder_pair(AUTOENCODERS[AUTOENCODER], torch.bfloat16)
    latent, decode = random(1, LATENT_CHANNELS, SIDE, SIDE), torch.compile(theirs.decode)
    return call(lambda: decode(latent, return_dict=False)[0]), call(torch.compile(ours.decode), latent)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def compiled_step(config: TransformerConfig) -> list[Compiled]:
    """Of all blocks, diffusers' and ours, from one and two of them."""
    one, two = (map(compiled, step_calls(replace(config, depth=depth))) for depth in (1, 2))
    return [single.of_blocks(config.depth, double) for single, double in zip(one, two, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/speed.md shows)"
    )
    options = parser.parse_args()
    rows = []
    steps = {f"step, {name}": partial(compiled_step, VARIANTS[name].transformer) for name in STEPS}
    for title, count in {**steps, "decode": lambda: list(map(compiled, decode_calls()))}.items():
        found = count()
        pairs = {name: [getattr(each, name) for each in found] for name in ("breaks", "generated", "library")}
        rows.append({"title": title, **pairs})
        print(rows[-1], flush=True)
    print(write_result("compiled", {"rows": rows}, options.out))


if __name__ == "__main__":
    main()
