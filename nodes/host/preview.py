"""Previews: a linear map from latents to small pictures, fitted to the autoencoder at hand.

A latent cell covers 32x32 px, so one colour for each would be a mosaic. Its 32 channels know more: the map gives 4x4 colours.
"""

import comfy.patcher_extension
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .vae import SanaVAE

SIDE = 4  # preview pixels for a latent cell, along each axis
FIT_PIXELS = 384  # side of the picture the map is fitted to: 144 cells for 33 unknowns


class Preview:
    """Latents (B, 32, H, W), scaled as in sampling, to pictures (B, 3, 4H, 4W) in [-1, 1]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # (33, 3 * SIDE * SIDE)

    def __call__(self, latent: Tensor) -> Tensor:
        ones = torch.ones_like(latent[:, :1])
        colours = torch.cat([latent, ones], dim=1).movedim(1, -1) @ self.weight.to(latent)
        return rearrange(colours, "b h w (c y x) -> b c (h y) (w x)", y=SIDE, x=SIDE).clamp(-1, 1)


def fit_preview(vae: SanaVAE) -> Preview:
    """Least squares between the latents of a picture of soft random colours and that picture made small."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(1, 3, FIT_PIXELS, FIT_PIXELS)
    for cells in (6, 12, 24, 48):
        colours = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        picture += F.interpolate(colours, size=(FIT_PIXELS, FIT_PIXELS), mode="bicubic")
    picture = (picture + 0.5).clamp(0, 1)
    latent = vae.encode(picture.movedim(1, -1)).float().cpu() * vae.config.latent_scale
    known = torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1).movedim(1, -1).flatten(0, 2)
    small = F.avg_pool2d(picture * 2 - 1, FIT_PIXELS // (latent.shape[-1] * SIDE))
    wanted = rearrange(small, "b c (h y) (w x) -> (b h w) (c y x)", y=SIDE, x=SIDE)
    # A little ridge: some channels may hardly vary in one picture.
    ridge = 1e-3 * len(known) * torch.eye(known.shape[1])
    return Preview(torch.linalg.solve(known.T @ known + ridge, known.T @ wanted))


def show_previews(patcher: ModelPatcher, preview: Preview) -> None:
    """Let the host draw previews of latents of a MODEL with this map, also where it loads it anew to compile it."""
    _set_factors(patcher.model.latent_format, preview)
    on_clone = comfy.patcher_extension.CallbacksMP.ON_CLONE
    patcher.add_callback(on_clone, lambda original, clone: _set_factors(clone.model.latent_format, preview))


def _set_factors(latent_format: LatentFormat, preview: Preview) -> None:
    latent_format.latent_rgb_factors = torch.eye(3).tolist()
    latent_format.latent_rgb_factors_bias = [0.0, 0.0, 0.0]
    latent_format.latent_rgb_factors_reshape = preview
