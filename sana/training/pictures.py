"""A folder of pictures with captions, and with masks that tell what in them counts."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional

from ..config import DOWNSAMPLE
from ..images import SUFFIXES, read_picture, read_size, to_mask
from ..sampling.resolution import nearest_bucket
from .captions import TURN, Caption, Choice, read_captions

log = logging.getLogger(__name__)

TextEncoder = Callable[
    [Sequence[str], str | None], tuple[Tensor, Tensor]
]  # as `GemmaTextEncoder`: prompts, instruction
MASK = "-masklabel.png"  # behind the name of a picture: OneTrainer's name of the mask beside it
LARGEST_SCALE = 4  # a picture that is scaled up by more teaches blur


@dataclass(frozen=True)
class Picture:
    """A picture file, its captions, and the size to train it at."""

    path: Path
    captions: tuple[Caption, ...]  # at least one
    size: tuple[int, int]  # (height, width) px


def picture_files(folder: Path, besides: Path | None = None) -> list[Path]:
    """All pictures in a folder, at any depth, in order of their paths.

    besides: a work folder, whose pictures do not count, wherever it is. Raises ValueError if there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with pictures, each with a .txt file of its name")
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("._"))  # of macOS
    found = [path for path in files if path.suffix.lower() in SUFFIXES and not path.name.endswith(MASK)]
    paths = sorted(path for path in found if besides is None or besides.resolve() not in path.resolve().parents)
    if found and not paths:
        raise ValueError(f"the pictures in {folder} lie in the work folder {besides}; give them a folder outside of it")
    if not paths:
        raise ValueError(
            f"{folder} holds no pictures; put {', '.join(SUFFIXES)} files there, each with a .txt file of its name"
        )
    return paths


def read_pictures(
    folder: Path,
    base_size: int,
    choice: Choice = TURN,
    besides: Path | None = None,
    on_broken: Callable[[ValueError], object] | None = None,
) -> list[Picture]:
    """The pictures in a folder with the captions that may be taken, each with the bucket of base_size nearest to its shape.

    besides: as for `picture_files`. on_broken: is told of each file that is no picture, which then does not count. Raises
    ValueError as `picture_files` and `read_captions` do, for a file that is no picture, and if captions cannot be chosen for
    want of scores.
    """
    paths = picture_files(folder, besides)
    pictures: list[Picture] = []
    small: list[Picture] = []
    for path, captions in zip(paths, read_captions(folder, paths), strict=True):
        try:
            possible = choice.possible(captions)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        try:
            found = read_size(path)
        except ValueError as error:
            if on_broken is None:
                raise
            on_broken(error)
            continue
        picture = Picture(path, possible, nearest_bucket(*found, base_size))
        pictures.append(picture)
        if min(found) * LARGEST_SCALE < min(picture.size):
            small.append(picture)
    if small:
        log.warning(
            "%d of %d pictures are scaled up by more than %d, first %s, and teach blur; leave them out, or give larger ones.",
            *(len(small), len(pictures), LARGEST_SCALE, small[0].path.name),
        )
    return pictures


def mask_path(picture: Picture) -> Path | None:
    """Where the mask of a picture lies, if it has one."""
    path = picture.path.with_name(picture.path.stem + MASK)
    return path if path.exists() else None


def read_weight(path: Path | None, size: tuple[int, int]) -> Tensor:
    """What the errors in each cell of a picture count, (1, H, W), 1 on average: the share of it that is white in its mask.

    path: of the mask; without one all cells count alike. size: (height, width) px of the picture. Raises ValueError for a mask
    that is broken or black.
    """
    height, width = size
    if path is None:
        return torch.ones(1, height // DOWNSAMPLE, width // DOWNSAMPLE)
    fitted = ImageOps.fit(to_mask(read_picture(path)), (width, height))  # cut as the picture is
    shares = functional.avg_pool2d(torch.from_numpy(np.array(fitted))[None].float(), DOWNSAMPLE)
    if not bool(shares.any()):
        raise ValueError(f"{path} is black, so that nothing of its picture would be learnt; paint white what counts")
    return shares / shares.mean()
