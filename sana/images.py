"""Pictures: from files, to tensors, and from what an autoencoder decodes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def read_picture(path: Path) -> Image.Image:
    """A picture from a file, upright as its camera says. Raises ValueError, with the path, if it is none or broken."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture; give a PNG or JPEG file") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); give another file") from error


def to_tensor(picture: Image.Image, height: int, width: int) -> Tensor:
    """A picture scaled, and cut at the middle, to a size in px: (1, 3, height, width) float32 in [-1, 1]."""
    fitted = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float().div(127.5).sub(1)


def to_picture(image: Tensor) -> Image.Image:
    """A decoded image (3, height, width), near [-1, 1], as an 8-bit picture."""
    pixels = image.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
