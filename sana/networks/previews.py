"""Small pictures from latents, without the autoencoder: a linear map that is fitted to it.

A latent cell covers 32x32 px, so one colour for each would be a mosaic. Its 32 channels know more: the map gives 4x4 colours.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

SIDE = 4  # preview pixels for a latent cell, along each axis
FIT_PIXELS = 384  # side of the picture the map is fitted to: 144 cells for 33 unknowns
DISCS, SMALLEST, LARGEST = 400, 8, 80  # in it, and their radii in px


class LinearPreview:
    """Latents (B, 32, H, W), scaled as in sampling, to pictures (B, 3, 4H, 4W) in [-1, 1]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # (33, 3 * SIDE * SIDE)

    def __call__(self, latent: Tensor) -> Tensor:
        ones = torch.ones_like(latent[:, :1])
        colours = torch.cat([latent, ones], dim=1).movedim(1, -1) @ self.weight.to(latent)
        return rearrange(colours, "b h w (c y x) -> b c (h y) (w x)", y=SIDE, x=SIDE).clamp(-1, 1)


def fit_preview(encode: Callable[[Tensor], Tensor]) -> LinearPreview:
    """Least squares between the latents of a picture of overlapping discs and that picture made small.

    encode: an image (1, 3, height, width) in [-1, 1] to its latent, scaled as in sampling.
    """
    picture = _discs()
    latent = encode(picture).float().cpu()
    known = torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1).movedim(1, -1).flatten(0, 2)
    small = F.avg_pool2d(picture, FIT_PIXELS // (latent.shape[-1] * SIDE))
    wanted = rearrange(small, "b c (h y) (w x) -> (b h w) (c y x)", y=SIDE, x=SIDE)
    # A little ridge: some channels may hardly vary in one picture.
    ridge = 1e-3 * len(known) * torch.eye(known.shape[1])
    return LinearPreview(torch.linalg.solve(known.T @ known + ridge, known.T @ wanted))


def _discs() -> Tensor:
    """Discs of random colours that hide one another, mostly small ones: plain areas and edges, about as often as in photographs."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(1, 3, FIT_PIXELS, FIT_PIXELS)
    rows, columns = torch.arange(FIT_PIXELS)[:, None], torch.arange(FIT_PIXELS)
    for top, left, size, *colour in torch.rand(DISCS, 6, generator=generator).tolist():
        radius = SMALLEST + (LARGEST - SMALLEST) * size**3
        inside = (rows - top * FIT_PIXELS) ** 2 + (columns - left * FIT_PIXELS) ** 2 < radius**2
        picture[0, :, inside] = torch.tensor(colour)[:, None] * 2 - 1
    return picture
