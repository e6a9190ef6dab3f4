"""The part of a picture around a mask."""

import re

import pytest
import torch

from tests.host.inprocess.conftest import Host

HEIGHT, WIDTH = 300, 500


def crop(host: Host, top: int, left: int, bottom: int, right: int, margin: int) -> tuple:
    """What the node makes of a mask that is a box; of the picture and of the mask where they begin and end in the whole ones."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    image = torch.stack([rows, columns, rows + columns], dim=-1)[None].float()
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, top:bottom, left:right] = 0.5
    part, of_mask, x, y, width, height = host.nodes["SanaCropToMask"].execute(image, mask, margin).result
    assert torch.equal(part, image[:, y : y + height, x : x + width])
    assert torch.equal(of_mask, mask[:, y : y + height, x : x + width]) and of_mask.sum() == mask.sum()
    assert part.shape[1:3] == of_mask.shape[1:] == (height, width)
    return x, y, width, height


def test_the_part_is_the_mask_with_its_margin(host: Host) -> None:
    assert crop(host, 100, 200, 140, 250, 20) == (180, 80, 90, 80)
    assert crop(host, 100, 200, 140, 250, 0) == (200, 100, 50, 40)


def test_the_part_ends_with_the_picture(host: Host) -> None:
    assert crop(host, 0, 460, 40, 500, 30) == (430, 0, 70, 70)
    assert crop(host, 100, 200, 140, 250, 4096) == (0, 0, WIDTH, HEIGHT)


def test_the_part_is_at_least_half_as_high_as_wide(host: Host) -> None:
    """Both ends alike, or where there is room."""
    assert crop(host, 145, 100, 155, 300, 10) == (90, 95, 220, 110)
    assert crop(host, 0, 100, 10, 300, 10) == (90, 0, 220, 110)
    assert crop(host, 290, 100, 300, 300, 10) == (90, 190, 220, 110)
    assert crop(host, 20, 485, 220, 495, 0) == (400, 20, 100, 200)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.zeros(0, HEIGHT, WIDTH), "the mask is empty; paint over what shall be drawn anew"),
        (torch.zeros(1, 64, 64), "the mask is empty; paint over what shall be drawn anew"),
        (
            torch.ones(1, 64, 80),
            "the mask has 80 x 64 px and the picture 500 x 300; give the mask of this picture, or scale both alike",
        ),
    ],
)
def test_other_masks_are_refused(host: Host, mask: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        host.nodes["SanaCropToMask"].execute(torch.zeros(1, HEIGHT, WIDTH, 3), mask, 0)
