"""Random weights for networks of any size, those of the tests included."""

import torch
from torch import nn

from sana.networks.packed import PackedWeight, scaled
from sana.networks.packed_layers import put_weight


@torch.no_grad()
def randomise(network: nn.Module, seed: int | None = None) -> nn.Module:
    """Fill a network, batch statistics included, so that activations stay near one and no number is without effect.

    Uniform numbers: several times quicker to draw than normal ones, and the largest networks need billions.
    seed: of numbers drawn on a CPU; None: they come from PyTorch's own generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    statistics = (pair for pair in network.named_buffers() if pair[0].endswith(("running_mean", "running_var")))
    for name, tensor in (*network.named_parameters(), *statistics):
        if tensor.dtype == torch.uint8:  # of a packed weight, random in every bit but for scales near one
            _randomise_packed(name, tensor, generator)
        elif tensor.ndim == 1 and "norm" in name and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            deviation = tensor[0].numel() ** -0.5 if tensor.ndim > 1 and "table" not in name else 0.2
            bound = 3**0.5 * deviation
            tensor.uniform_(-bound, bound, generator=generator)
    return network.eval().requires_grad_(False)


def _randomise_packed(name: str, tensor: torch.Tensor, generator: torch.Generator | None) -> None:
    """The parts of `in_8_bits`."""
    if name.endswith(".scale"):
        tensor.view(torch.float32).fill_(1e-4)
    else:
        tensor.random_(0, 256, generator=generator)


@torch.no_grad()
def rounded_to_int8(layers: nn.Module, twin: nn.Module) -> None:
    """Round every matrix to int8 with a scale for each row: in the twin, which has the same weights, these are packed."""
    for name, layer in list(layers.named_modules()):
        if isinstance(layer, nn.Linear):
            weight = layer.weight.float()
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            parts = {"packed": (weight / scale).round_().to(torch.int8), "scale": scale}
            packed = PackedWeight("int8", scaled, parts, weight.shape).to(layer.weight.dtype)
            put_weight(twin, f"{name}.weight", packed)
            layer.weight.copy_(packed())


def in_8_bits(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network with every matrix in 8 bits, and a scale for each of its rows, on the device where the network is.

    dtype: of the numbers that it gives.
    """
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear | nn.Embedding):
            (rows, columns), device = layer.weight.shape, layer.weight.device
            parts = {
                "packed": torch.empty(rows, columns, dtype=torch.int8, device=device),
                "scale": torch.empty(rows, 1, device=device),
            }
            put_weight(network, f"{name}.weight", PackedWeight("int8", scaled, parts, (rows, columns)).to(dtype))
    return network
