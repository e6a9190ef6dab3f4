"""Settings to compare, and the grid that shows what was drawn with them."""

import re

import pytest
import torch
from torch import Tensor

from tests.host.inprocess.conftest import Host

WHITE = 1.0


def settings(host: Host, seeds: str = "1", steps: str = "20", cfgs: str = "4.5") -> tuple:
    return host.nodes["SanaCompareSettings"].execute(seeds=seeds, steps=steps, cfgs=cfgs).result


def grid(host: Host, images: list[Tensor], labels: list[str], columns: int = 0) -> Tensor:
    """(height, width, 3)"""
    (sheet,) = host.nodes["SanaPictureGrid"].execute(images=images, labels=labels, columns=[columns]).result
    assert sheet.shape[0] == 1 and sheet.dtype == torch.float32
    return sheet[0]


def plain(*levels: float, height: int = 64, width: int = 96) -> Tensor:
    """A batch of pictures of one colour each."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, height, width, 3)


def test_every_combination_is_drawn_once(host: Host) -> None:
    """In rows by the first setting with several numbers, in columns by the last one."""
    seed, steps, cfg, labels, columns = settings(host, steps="8, 20", cfgs="2, 4.5,7")
    assert (seed, columns) == ([1] * 6, 3)
    assert steps == [8, 8, 8, 20, 20, 20] and cfg == [2, 4.5, 7, 2, 4.5, 7]
    assert (labels[0], labels[5]) == ("8 steps, cfg 2", "20 steps, cfg 7")
    seed, steps, cfg, labels, columns = settings(host, seeds="3, 1", steps="8, 20")
    assert (seed, steps, columns) == ([3, 3, 1, 1], [8, 20, 8, 20], 2)
    assert labels == ["seed 3, 8 steps", "seed 3, 20 steps", "seed 1, 8 steps", "seed 1, 20 steps"]


def test_one_setting_with_several_numbers_fills_rows(host: Host) -> None:
    seed, steps, cfg, labels, columns = settings(host, seeds=f"1, 2,\n{2**64 - 1}, 2")
    assert seed == [1, 2, 2**64 - 1] and steps == [20] * 3 and cfg == [4.5] * 3
    assert (labels, columns) == (["seed 1", "seed 2", f"seed {2**64 - 1}"], 0)
    assert settings(host, steps="1, 2")[3] == ["1 step", "2 steps"]
    assert settings(host)[3:] == (["seed 1, 20 steps, cfg 4.5"], 0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"steps": "8, x"}, '"x" in steps is not a whole number; write them with commas between, such as 10, 20'),
        ({"steps": "8.5"}, '"8.5" in steps is not a whole number; write them with commas between, such as 10, 20'),
        ({"cfgs": "2,,3"}, '"" in cfgs is not a number; write them with commas between, such as 10, 20'),
        ({"cfgs": "nan"}, "nan in cfgs is not from 0 to 30"),
        ({"steps": "0"}, "0 in steps is not from 1 to 1000"),
        ({"seeds": "-1"}, "-1 in seeds is not from 0 to 18446744073709551615"),
        (
            {"seeds": ",".join(map(str, range(51))), "steps": "1,2"},
            "these are 102 pictures; take fewer numbers, for 100 at most",
        ),
    ],
)
def test_other_texts_are_refused(host: Host, given: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        settings(host, **given)


def test_pictures_stand_in_rows(host: Host) -> None:
    """On white, 8 px apart, in the order of the list and of each batch, and a small one in the middle of its place."""
    sheet = grid(host, [plain(0.2, 0.4), plain(0.6, height=32, width=32)], [""])
    assert sheet.shape == (2 * 64 + 8, 2 * 96 + 8, 3)
    for level, part in ((0.2, sheet[:64, :96]), (0.4, sheet[:64, 104:]), (0.6, sheet[88:120, 32:64])):
        assert (part - level).abs().max() < 1 / 255
    assert (sheet[72:88] == WHITE).all() and (sheet[72:, 64:] == WHITE).all() and (sheet[72:, :32] == WHITE).all()


def test_grey_and_transparent_pictures(host: Host) -> None:
    """Grey of one channel is shown as grey; of four channels the fourth is left out."""
    sheet = grid(host, [torch.full((1, 16, 16, 1), 0.4), torch.full((1, 16, 16, 4), 0.6)], [" \n"])
    assert sheet.shape == (16, 40, 3)
    assert (sheet[:, :16] - 0.4).abs().max() < 1 / 255 and (sheet[:, 24:] - 0.6).abs().max() < 1 / 255


def test_columns_are_as_many_as_rows_or_as_asked(host: Host) -> None:
    for count, columns, shape in ((1, 0, (1, 1)), (5, 0, (2, 3)), (9, 0, (3, 3)), (3, 1, (3, 1)), (2, 7, (1, 2))):
        sheet = grid(host, [plain(*[0.5] * count)], [""], columns)
        assert sheet.shape == (shape[0] * 72 - 8, shape[1] * 104 - 8, 3)


@pytest.mark.parametrize("labels", [["a\nbb"], ["a", "bb"]])
def test_each_picture_has_its_label_above(host: Host, labels: list[str]) -> None:
    """Of two lines or of a list; in black, within the width of its picture."""
    sheet = grid(host, [plain(0.5, 0.5)], labels)
    strip = sheet.shape[0] - 64
    assert strip == 20 and (sheet[strip:, :96] - 0.5).abs().max() < 1 / 255
    first, second = sheet[:strip, :96], sheet[:strip, 104:]
    assert first.min() < 0.5 and (first < 0.5).sum() < (second < 0.5).sum()
    long = grid(host, [plain(0.5, height=640, width=200)], ["twenty steps, cfg 4.5, seed 1234567"])[:70]
    columns = (long < 0.5).any(dim=2).any(dim=0).nonzero()
    assert 0 < columns.min() and columns.max() < 199


def test_labels_are_for_each_picture(host: Host) -> None:
    sentence = "2 labels for 3 pictures; write a line for each picture, or none"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        grid(host, [plain(0, 0, 0)], ["a\nb"])
    blank_lines_below = grid(host, [plain(0, 0)], ["a\r\nb\r\n \n"])
    assert torch.equal(blank_lines_below, grid(host, [plain(0, 0)], ["a\nb"]))
    with pytest.raises(ValueError, match="^there are no pictures for the grid; connect at least one$"):
        grid(host, [plain()], ["a"])
