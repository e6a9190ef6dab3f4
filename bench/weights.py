"""Random weights for networks of any size, those of the tests included."""

import torch
from torch import nn


@torch.no_grad()
def randomise(network: nn.Module, seed: int | None = None) -> nn.Module:
    """Fill a network, batch statistics included, so that activations stay near one and no number is without effect.

    Uniform numbers: several times quicker to draw than normal ones, and the largest networks need billions.
    seed: of numbers drawn on a CPU; None: they come from PyTorch's own generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    statistics = (pair for pair in network.named_buffers() if pair[0].endswith(("running_mean", "running_var")))
    for name, tensor in (*network.named_parameters(), *statistics):
        if tensor.ndim == 1 and "norm" in name and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            deviation = tensor[0].numel() ** -0.5 if tensor.ndim > 1 and "table" not in name else 0.2
            bound = 3**0.5 * deviation
            tensor.uniform_(-bound, bound, generator=generator)
    return network.eval().requires_grad_(False)
