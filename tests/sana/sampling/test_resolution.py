"""Trained sizes against the tables of diffusers, and sizes no model takes."""

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

from sana.sampling.resolution import BUCKETS_1024, buckets, check_size, nearest_bucket


@pytest.mark.parametrize(
    ("base_size", "table"),
    [
        (512, ASPECT_RATIO_512_BIN),
        (1024, ASPECT_RATIO_1024_BIN),
        (2048, ASPECT_RATIO_2048_BIN),
        (4096, ASPECT_RATIO_4096_BIN),
    ],
)
def test_sizes_used_for_inference_are_among_the_trained_ones(base_size: int, table: dict[str, list[float]]) -> None:
    sizes = {(int(height), int(width)) for height, width in table.values()}
    usable = {(height, width) for height, width in sizes if height % 32 == width % 32 == 0}
    assert usable <= set(buckets(base_size))


@pytest.mark.parametrize("base_size", [256, 512, 1024, 2048, 4096])
def test_buckets_are_whole_latents_of_about_one_area(base_size: int) -> None:
    for height, width in buckets(base_size):
        check_size(height, width)
        assert 0.88 < height * width / base_size**2 < 1.08
    assert (base_size, base_size) in buckets(base_size)


def test_there_is_a_bucket_for_either_orientation_of_the_usual_shapes() -> None:
    assert len(BUCKETS_1024) == len(set(BUCKETS_1024)) == 40
    assert nearest_bucket(1080, 1920, 1024) == (768, 1344)
    assert nearest_bucket(1920, 1080, 1024) == (1344, 768)
    assert nearest_bucket(7, 7, 2048) == (2048, 2048)
    assert nearest_bucket(1, 100, 1024) == (512, 2048)


@pytest.mark.parametrize("size", [(32, 32), (64, 16384), (4096, 1024)])
def test_sizes_that_fit_are_accepted(size: tuple[int, int]) -> None:
    check_size(*size)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (100, 64, "height 100 is not a multiple of 32 px from 32 to 16384; use 96"),
        (64, 0, "width 0 is not a multiple of 32 px from 32 to 16384; use 32"),
        (-64, 64, "height -64 is not a multiple of 32 px from 32 to 16384; use 32"),
        (64, 1000000, "width 1000000 is not a multiple of 32 px from 32 to 16384; use 16384"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_one_that_does(height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_size(height, width)


def test_the_factor_is_that_of_the_autoencoder() -> None:
    check_size(128, 64, factor=64)
    with pytest.raises(ValueError, match="^height 96 is not a multiple of 64 px from 64 to 16384; use 128$"):
        check_size(96, 64, factor=64)
