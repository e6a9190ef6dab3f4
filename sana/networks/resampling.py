"""Feature maps of half and of double the size, as the layers of the DC-AE need them, with channels last in memory."""

from functools import cache
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


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


def average_unshuffle(x: Tensor, channels: int) -> Tensor:
    """`pixel_unshuffle` of x (B, C, 2H, 2W), then the mean over groups of consecutive channels: (B, channels, H, W)."""
    if channels == x.shape[1]:
        return F.avg_pool2d(x, 2)
    if channels == 2 * x.shape[1]:  # pairs of neighbours in a row, without rearranging all of x first
        pairs = (x[..., ::2] + x[..., 1::2]) * 0.5
        return rearrange(pairs, "b c (h dy) w -> b h w (c dy)", dy=2).permute(0, 3, 1, 2)
    return pixel_unshuffle(x).unflatten(1, (channels, -1)).mean(dim=2)


@cache
def nearest_operations(operations: type | ModuleType) -> type:
    """`operations` whose Conv2d first doubles its input by nearest neighbour.

    It happens where the layer applies its weights, so that a host may still cast or patch them on the way.
    """

    class NearestConv2d(operations.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return nearest_conv(x, weight, bias)

    return type("NearestOperations", (), {"Conv2d": NearestConv2d})


def nearest_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution of x (B, C, H, W) doubled by nearest neighbour: (B, outputs, 2H, 2W).

    Every 2x2 patch of the result sees only 2x2 values, so one 2x2 convolution to four times the channels, with sums of
    the weights, gives all of it at 4/9 of the work.
    """
    batch, _, height, width = x.shape
    outputs = weight.shape[0]
    biases = None if bias is None else bias.repeat(4)
    phases = F.conv2d(x, phase_weights(weight), biases, padding=1)  # (B, 4C', H+1, W+1)
    out = x.new_empty(batch, 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)
    for dy in (0, 1):
        for dx in (0, 1):
            phase = phases.narrow(1, (2 * dy + dx) * outputs, outputs)
            out[:, :, dy::2, dx::2] = phase[:, :, dy : dy + height, dx : dx + width]
    return out


def phase_weights(weight: Tensor) -> Tensor:
    """Weights of a 3x3 convolution after doubling, (C', C, 3, 3), to four of 2x2 before it, (4C', C, 2, 2)."""
    # Which of three rows (columns) after doubling fall on which of two before it, for the first and the second phase.
    above, middle, below = torch.eye(3, dtype=weight.dtype, device=weight.device)
    shares = torch.stack([above, middle + below, above + middle, below]).unflatten(0, (2, 2))
    table = torch.einsum("ypi,xqj->ijyxpq", shares, shares).reshape(9, 16)
    phases = rearrange(weight.flatten(2) @ table, "o i (yx p q) -> (yx o) p q i", yx=4, p=2, q=2)
    return phases.permute(0, 3, 1, 2)
