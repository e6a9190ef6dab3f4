"""Noise masks at the size of SANA's latents, for every sampler of the host."""

from collections.abc import Callable

import comfy.samplers
from torch import Tensor

from ...sana.config import DOWNSAMPLE
from ...sana.images import to_cells
from .extension import extend
from .model import SanaModel


def extend_masks() -> None:
    """Let whatever samples a SANA model paint the cells that a mask touches, and no other."""
    extend(comfy.samplers.CFGGuider, "sample", _sample)


def cell_mask(mask: Tensor, rows: int, columns: int) -> Tensor:
    """A mask of any size (..., height, width) for a latent of rows x columns cells: (B, 1, rows, columns).

    A mask of a picture that the VAE has cut is cut as the picture was. The host's own way reads the pixels near the
    middle of a cell, does not see a stroke between them, and cuts nothing.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    for axis, cells in ((2, rows), (3, columns)):
        size = mask.shape[axis]
        if size // DOWNSAMPLE == cells:
            mask = mask.narrow(axis, size % DOWNSAMPLE // 2, cells * DOWNSAMPLE)
    return to_cells(mask, rows, columns)


def _sample(
    original: Callable[..., Tensor],
    guider: comfy.samplers.CFGGuider,
    noise: Tensor,
    latent_image: Tensor,
    sampler: object,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *more: object,
    **named: object,
) -> Tensor:
    if denoise_mask is not None and isinstance(guider.model_patcher.model, SanaModel) and latent_image.ndim == 4:
        denoise_mask = cell_mask(denoise_mask, *latent_image.shape[-2:])
    return original(guider, noise, latent_image, sampler, sigmas, denoise_mask, *more, **named)
