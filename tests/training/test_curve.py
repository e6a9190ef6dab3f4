"""The loss of a training, drawn and for TensorBoard."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sana.training.curve import LINE, read_log, smoothed, write_curve
from tests.training.lora_runs import lora


def test_the_loss_is_drawn_as_a_curve(tmp_path: Path) -> None:
    """It falls to the right, as the losses do; a log of one row is no curve."""
    (log := tmp_path / "log.csv").write_text("10,1.0,5\n", encoding="utf-8")
    write_curve(log, path := tmp_path / "loss.png")
    assert not path.exists()
    log.write_text("".join(f"{10 * k},{1 / k},5\n" for k in range(1, 50)) + "damaged\n", encoding="utf-8")
    assert read_log(log)[-1] == (490, pytest.approx(1 / 49))
    write_curve(log, path)
    with Image.open(path) as picture:
        pixels = torch.tensor(list(picture.convert("RGB").tobytes())).view(picture.height, picture.width, 3)
    blue = (pixels == torch.tensor(LINE)).all(dim=2)
    columns = blue.any(dim=0).nonzero().flatten()
    heights = [float(blue[:, x].nonzero().float().mean()) for x in (columns[0], columns[-1])]
    assert heights[0] < heights[1] - 50


def test_the_line_begins_among_the_points() -> None:
    """A first loss that is far off does not hold it up: of few it is the mean, and of many a tenth of each new one."""
    assert smoothed([4.0, 2.0, 0.0]) == pytest.approx([4.0, 3.0, 2.0])
    assert smoothed([10.0, *[0.0] * 11])[9:] == pytest.approx([1.0, 0.9, 0.81])


def test_events_are_written_where_tensorboard_is_installed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, step))

        def close(self) -> None:
            seen.append(("closed",))

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: name if name == "tensorboard" else find(name, *more)
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert lora(pictures, tmp_path) == 0
    names = ("loss", "smoothed loss", "images per second")
    assert seen == [(str(tmp_path / "events"), 1), *((name, step) for step in (1, 2) for name in names), ("closed",)]
