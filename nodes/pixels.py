"""Pictures of the host as 8-bit pixels."""

import numpy as np
import torch


def to_pixels(picture: torch.Tensor) -> np.ndarray:
    """An IMAGE (height, width, 1, 3 or 4 channels) in [0, 1], clamped and rounded: uint8 (height, width, 3)."""
    colours = picture.expand(-1, -1, 3) if picture.shape[-1] == 1 else picture[..., :3]
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
