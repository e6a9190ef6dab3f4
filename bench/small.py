"""A benchmark with networks of a few channels, in seconds on any machine: python -m bench.small MODULE ARGUMENTS.

Not for its numbers: it shows that every line of a command runs, before the command meets a machine that is lent for minutes.
Sizes become 64 px, what is to be compiled runs as it is, and a CPU records graphs.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import torch

from sana.config import AUTOENCODERS, VARIANTS, GemmaConfig, StageConfig, TransformerConfig

from . import __main__ as speed
from . import cases, memory, race, twins
from .race import Floor
from .recorder import graphs_on_cpu

SIDE = 64  # px
GEMMA = GemmaConfig(
    hidden_size=40,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
)
WIDTHS = (32, 64, 64, 64, 128, 128)  # of the DC-AE, the least that its shortcuts and heads allow


def small_transformer(config: TransformerConfig) -> TransformerConfig:
    """The same structure with three heads of 32 in self-attention and two of 48 in cross-attention."""
    return replace(config, hidden_size=96, depth=2, cross_heads=2, text_width=GEMMA.hidden_size, ff_width=240)


def small_stages(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
    return tuple(replace(s, width=w, depth=min(s.depth, 1)) for s, w in zip(stages, WIDTHS, strict=True))


@contextmanager
def shrunk() -> Iterator[None]:
    """Until it is left, the networks and sizes of all benchmarks in this process are small."""
    row = AUTOENCODERS[cases.AUTOENCODER]
    autoencoder = replace(row, encoder=small_stages(row.encoder), decoder=small_stages(row.decoder))
    variants = {name: replace(row, transformer=small_transformer(row.transformer)) for name, row in VARIANTS.items()}
    with (
        patch.dict(VARIANTS, variants),
        patch.dict(AUTOENCODERS, {cases.AUTOENCODER: autoencoder}),
        patch.object(twins, "GEMMA_2_2B", GEMMA),
        patch.object(cases, "SIDES", (SIDE,)),
        patch.object(memory, "SIDES", (SIDE,)),
        patch.object(speed, "memory", lambda device: math.inf),  # cases tell what they need at their real sizes
        patch.object(race, "cpu_peak_memory", lambda call: (call(), 0)),  # a profiler takes a second to start
        patch("gc.collect", lambda: 0),  # half a second of it, with all libraries imported
        patch.object(Floor, "measure", lambda dtype, device: Floor(math.inf, math.inf)),
        torch.compiler.set_stance("force_eager"),
        nullcontext() if torch.cuda.is_available() else graphs_on_cpu(),
    ):
        yield


def main() -> int | None:
    if len(sys.argv) < 2:
        print("python -m bench.small needs the name of a benchmark, such as bench.precision", file=sys.stderr)
        return 2
    del sys.argv[0]
    name = sys.argv[0]
    with shrunk():
        return import_module("bench.__main__" if name == "bench" else name).main()


if __name__ == "__main__":
    sys.exit(main())
