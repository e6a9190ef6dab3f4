"""Feature maps of half and of double the size, as the layers of the DC-AE need them, with channels last in memory."""

from functools import cache
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .layers import may_write


def pixel_shuffle(x: Tensor) -> Tensor:
    """(B, 4C, H, W) to (B, C, 2H, 2W), as `F.pixel_shuffle`, with channels last in memory."""
    return rearrange(x, "b (c dy dx) h w -> b (h dy) (w dx) c", dy=2, dx=2).permute(0, 3, 1, 2)


def pixel_unshuffle(x: Tensor) -> Tensor:
    """(B, C, 2H, 2W) to (B, 4C, H, W), as `F.pixel_unshuffle`, with channels last in memory."""
    return rearrange(x, "b c (h dy) (w dx) -> b h w (c dy dx)", dy=2, dx=2).permute(0, 3, 1, 2)


def add_shuffled(out: Tensor, x: Tensor) -> Tensor:
    """Add to out (B, C', 2H, 2W), in place, the channels of x (B, C, H, W), each 4C' / C times, pixel-shuffled.

    The repetition is a broadcast: of the four pixels of a patch, 4, 2 or 1 share a channel of x, when C' is C, C / 2 or
    C / 4.
    """
    channels = out.shape[1]
    patches = rearrange(out, "b c (h dy) (w dx) -> b h w c dy dx", dy=2, dx=2)
    shared = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[x.shape[1] // channels]
    patches.add_(x.permute(0, 2, 3, 1).unflatten(-1, (channels, *shared)))
    return out


def add_averaged(out: Tensor, x: Tensor) -> Tensor:
    """Add to out (B, C', H, W), in place, `pixel_unshuffle` of x (B, C, 2H, 2W) averaged over groups of consecutive channels."""
    channels = out.shape[1]
    if channels == x.shape[1]:
        return out.add_(F.avg_pool2d(x, 2))
    if channels == 2 * x.shape[1]:  # pairs of neighbours in a row, without rearranging all of x first
        pairs = rearrange(x[..., ::2] + x[..., 1::2], "b c (h dy) w -> b h w c dy", dy=2)
        out.permute(0, 2, 3, 1).unflatten(-1, (-1, 2)).add_(pairs, alpha=0.5)
        return out
    return out.add_(pixel_unshuffle(x).unflatten(1, (channels, -1)).mean(dim=2))


@cache
def nearest_operations(operations: type | ModuleType) -> type:
    """`operations` whose Conv2d first doubles its input by nearest neighbour, and gives `nearest_phases`.

    It happens where the layer applies its weights, so that a host may still cast or patch them on the way.
    """

    class NearestConv2d(operations.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return nearest_phases(x, weight, bias)

    return type("NearestOperations", (), {"Conv2d": NearestConv2d})


def nearest_phases(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution of x (B, C, H, W) doubled by nearest neighbour, as `place_phases` takes it: (B, 4C', H+1, W+1).

    Every 2x2 patch of the result sees only 2x2 values, so one 2x2 convolution to four times the channels, with sums of
    the weights, gives all of it at 4/9 of the work.
    """
    return F.conv2d(x, phase_weights(weight), None if bias is None else bias.repeat(4), padding=1)


def place_phases(phases: Tensor, x: Tensor | None = None) -> Tensor:
    """The four pixels of each patch from `nearest_phases` into their places: (B, C', 2H, 2W), channels last in memory.

    x: (B, C, H, W), whose channels are added on the way, each 4C' / C times, pixel-shuffled; None: nothing is.
    """
    outputs, (height, width) = phases.shape[1] // 4, (size - 1 for size in phases.shape[2:])
    out = phases.new_empty(len(phases), 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)
    for pixel, phase in enumerate(phases.chunk(4, dim=1)):
        dy, dx = divmod(pixel, 2)
        phase, place = phase[:, :, dy : dy + height, dx : dx + width], out[:, :, dy::2, dx::2]
        if x is None:
            place.copy_(phase)
        elif not may_write():
            place.copy_(phase + shared_channels(x, outputs, pixel))
        else:
            torch.add(phase, shared_channels(x, outputs, pixel), out=place)
    return out


def shared_channels(x: Tensor, outputs: int, pixel: int) -> Tensor:
    """Of x (B, C, H, W) the channels that pixel 0 to 3 of each patch shows, where each is repeated: (B, outputs, H, W)."""
    shares = x.shape[1] // outputs  # 1, 2 or 4 of x for one of the result
    return x[:, pixel * shares // 4 :: shares]


def phase_weights(weight: Tensor) -> Tensor:
    """Weights of a 3x3 convolution after doubling, (C', C, 3, 3), to four of 2x2 before it, (4C', C, 2, 2)."""
    # Which of three rows (columns) after doubling fall on which of two before it, for the first and the second phase.
    above, middle, below = torch.eye(3, dtype=weight.dtype, device=weight.device)
    shares = torch.stack([above, middle + below, above + middle, below]).unflatten(0, (2, 2))
    table = torch.einsum("ypi,xqj->ijyxpq", shares, shares).reshape(9, 16)
    phases = rearrange(weight.flatten(2) @ table, "o i (yx p q) -> (yx o) p q i", yx=4, p=2, q=2)
    return phases.permute(0, 3, 1, 2)
