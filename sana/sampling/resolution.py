"""Picture sizes, (height, width) in pixels: what a model takes, and the sizes it was trained on."""

from ..config import DOWNSAMPLE

LARGEST_SIDE = 16384  # pixels; what is larger is a slip of the pen

# Sizes of the 1024 px models by falling width, NVlabs/Sana diffusion/data/datasets/utils.py, ASPECT_RATIO_1024. The tables of
# the 512, 2048 and 4096 px models are multiples of this one, and those used for inference are parts of it.
BUCKETS_1024 = tuple(
    (int(height), int(width))
    for height, width in (
        size.split("x")
        for size in (
            "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 "
            "704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 "
            "1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 "
            "1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512"
        ).split()
    )
)


def buckets(base_size: int) -> tuple[tuple[int, int], ...]:
    """The sizes a model of this base size was trained on, where they are whole latents."""
    scaled = ((height * base_size / 1024, width * base_size / 1024) for height, width in BUCKETS_1024)
    return tuple(
        (int(height), int(width)) for height, width in scaled if height % DOWNSAMPLE == 0 == width % DOWNSAMPLE
    )


def nearest_bucket(height: int, width: int, base_size: int) -> tuple[int, int]:
    """The trained size whose aspect ratio is nearest to height / width."""
    return min(buckets(base_size), key=lambda size: abs(size[0] / size[1] - height / width))


def check_size(height: int, width: int, factor: int = DOWNSAMPLE) -> None:
    """Raises ValueError, with a size that works, unless both sides are multiples of factor from factor to 16384 px."""
    for name, side in (("height", height), ("width", width)):
        if not factor <= side <= LARGEST_SIDE or side % factor:
            fitting = min(max(factor, round(side / factor) * factor), LARGEST_SIDE)
            raise ValueError(
                f"{name} {side} is not a multiple of {factor} px from {factor} to {LARGEST_SIDE}; use {fitting}"
            )
