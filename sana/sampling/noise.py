"""The noise of a batch of pictures: each has a seed of its own, so that the size of a batch changes no picture."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def noise_source(shape: Sequence[int], seeds: Sequence[int]) -> Callable[[], Tensor]:
    """A function that draws standard normal noise, (B, C, H, W) float32, the k-th picture's from the k-th seed.

    It draws on the CPU, so that a seed means the same on every device, and each call draws anew. shape: (C, H, W), of
    one picture. Raises ValueError for a seed that does not fit into 64 bits.
    """
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed {seed} does not fit into 64 bits; use a smaller one")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
