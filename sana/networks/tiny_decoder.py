"""TAESANA: a small network that draws nearly the picture of the DC-AE (madebyollin/taesd, December 2025).

Plain 3x3 convolutions with ReLU. 8.3 million parameters instead of the 160 million of the DC-AE's decoder.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS
from .operations import Operations

# Channels of the stages, from the latent on; between two of them a side doubles. Three blocks each, one in the last.
WIDTHS = (256, 128, 64, 64, 64, 64)
BLOCKS = 3
RANGE = 3.0  # beyond it latents are bent, so that no outlier spoils a picture


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / RANGE) * RANGE


class Block(nn.Module):
    """Three convolutions around a skip; (B, width, H, W) in and out."""

    def __init__(self, width: int, operations: type | ModuleType, factory: dict[str, object]) -> None:
        super().__init__()
        first, second, third = (operations.Conv2d(width, width, 3, padding=1, **factory) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu_()


class TinyDecoder(nn.Sequential):
    """Latents, scaled as in sampling, to pictures. Tensors are named as in the published file, by the layers' numbers."""

    def __init__(
        self,
        channels: int = LATENT_CHANNELS,
        widths: Sequence[int] = WIDTHS,
        *,
        operations: type | ModuleType = Operations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        factory = {"dtype": dtype, "device": device}
        layers = [SoftClamp(), operations.Conv2d(channels, widths[0], 3, padding=1, **factory), nn.ReLU(inplace=True)]
        for width, following in zip(widths, widths[1:], strict=False):
            layers += [Block(width, operations, factory) for _ in range(BLOCKS)]
            layers += [
                nn.Upsample(scale_factor=2),
                operations.Conv2d(width, following, 3, padding=1, bias=False, **factory),
            ]
        layers += [Block(widths[-1], operations, factory), operations.Conv2d(widths[-1], 3, 3, padding=1, **factory)]
        super().__init__(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        """latent: (B, 32, H, W). Returns (B, 3, 32 H, 32 W) in [-1, 1]."""
        return super().forward(latent).mul(2).sub(1).clamp(-1, 1)
