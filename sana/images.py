"""Pictures: from files, to tensors, and from what an autoencoder decodes."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from .reading import check_file

# What is opened, by Pillow's names. Others may start a program to be read, as EPS does.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".avifs"),
)
# 200 MB in RGB; the largest picture that a model draws has a quarter, and cameras of today have 61 million.
MOST_PIXELS = 8192**2
BAND = 256  # rows of a transparent picture that are drawn above its ground at once
SIDEWAYS = range(5, 9)  # Exif orientations that swap height and width
# What Pillow and its libraries raise where the bytes of a picture make no sense.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, RuntimeError, EOFError, LookupError, ArithmeticError, struct.error),
)


def read_picture(path: Path) -> Image.Image:
    """A picture from a file in one of FORMATS, upright as its camera says.

    Raises ValueError, with the path, if it is none, broken, or larger than MOST_PIXELS.
    """
    with _opened(path) as picture:
        return _in_8_bits(ImageOps.exif_transpose(picture))


def read_size(path: Path) -> tuple[int, int]:
    """Height and width, px, of what `read_picture` would give, from the beginning of the file. Raises as it does."""
    with _opened(path) as picture:
        # Of a TIFF, Pillow tells the upright size from the start.
        sideways = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
        return picture.size if sideways else picture.size[::-1]


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow would not scale but cut at 255. Raises ValueError for fractions."""
    if picture.mode == "F":
        raise ValueError("its numbers are fractions; save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # older versions of Pillow have no AVIF
    try:
        check_file(path)
        with _quietly_opened(path, known) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield picture
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} has more than {MOST_PIXELS:,} px, which is 8192 x 8192; make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture; give a PNG or JPEG file") from error
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); give another file") from error


def _quietly_opened(path: Path, formats: list[str]) -> Image.Image:
    """Without Pillow's warning of a picture that is refused anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=formats)


def on_white(picture: Image.Image) -> Image.Image:
    """A picture in RGB, with white below what is transparent: the colours that are stored there were never seen."""
    return _above(picture, "white", "RGB")


def to_mask(picture: Image.Image) -> Image.Image:
    """A mask in grey, white where to paint. What is transparent is black: it is kept."""
    return _above(picture, "black", "L")


def _above(picture: Image.Image, ground: str, mode: str) -> Image.Image:
    """In this mode, above a colour. A band of rows at a time, since each layer takes as much memory as the picture."""
    if not picture.has_transparency_data:
        return picture.convert(mode)
    found = Image.new(mode, picture.size)
    for top in range(0, picture.height, BAND):
        box = (0, top, picture.width, min(top + BAND, picture.height))
        layer = picture.crop(box).convert("RGBA")
        found.paste(Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert(mode), box)
    return found


def to_tensor(picture: Image.Image, height: int, width: int) -> Tensor:
    """A picture on white, scaled, and cut at the middle, to a size in px: (1, 3, height, width) float32 in [-1, 1]."""
    fitted = ImageOps.fit(on_white(picture), (width, height), Image.Resampling.LANCZOS)
    return to_unit(np.array(fitted)[None])


def to_cells(mask: Tensor, rows: int, columns: int) -> Tensor:
    """A mask (B, 1, height, width) at the size of a latent: a cell is painted anew as far as any of its pixels is."""
    return F.adaptive_max_pool2d(mask, (rows, columns))


def to_picture(image: Tensor) -> Image.Image:
    """A decoded image (3, height, width), near [-1, 1], as an 8-bit picture."""
    return Image.fromarray(to_pixels(image[None])[0])


def to_unit(pictures: np.ndarray) -> Tensor:
    """uint8 (B, height, width, 3) to float32 (B, 3, height, width) in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(images: Tensor) -> np.ndarray:
    """The inverse of `to_unit`, clamped and rounded."""
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
