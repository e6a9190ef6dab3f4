"""How the loss of a training went: a picture of its log, and events for TensorBoard where that is installed."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..saving import replacing
from .loop import ROW, Report

SIZE, MARGIN = (720, 360), 48  # px
SMOOTHING = 0.9  # what a row of the log leaves of the line before it
POINTS, LINE, AXES = (200, 205, 215), (30, 90, 200), (90, 90, 90)


def read_log(path: Path) -> list[tuple[int, float]]:
    """Steps and mean losses of a `log.csv`; [] if there is none."""
    if not path.is_file():
        return []
    rows = [
        row.split(",") for row in path.read_text(encoding="utf-8", errors="replace").splitlines() if ROW.fullmatch(row)
    ]
    return [(int(step), float(loss)) for step, loss, _ in rows]


def write_curve(log: Path, path: Path) -> None:
    """The losses of a log as points and, smoothed, as a line, in a PNG; nothing before there are two rows."""
    rows = read_log(log)
    if len(rows) < 2:
        return
    steps, losses = zip(*rows, strict=True)
    line = smoothed(losses)
    top = max(losses) or 1.0
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    width, height = SIZE[0] - 2 * MARGIN, SIZE[1] - 2 * MARGIN

    def places(values: Sequence[float]) -> list[tuple[float, float]]:
        return [
            (MARGIN + width * step / steps[-1], MARGIN + height * (1 - value / top))
            for step, value in zip(steps, values, strict=True)
        ]

    pen.line([(MARGIN, MARGIN), (MARGIN, MARGIN + height), (MARGIN + width, MARGIN + height)], AXES)
    for x, y in places(losses):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), POINTS)
    pen.line(places(line), LINE, 2)
    pen.text((4, MARGIN - 6), f"{top:.3g}", AXES)
    pen.text((4, MARGIN + height - 6), "0", AXES)
    pen.text((MARGIN + width - 24, MARGIN + height + 8), f"{steps[-1]}", AXES)
    pen.text((MARGIN, 8), f"loss, smoothed {line[-1]:.4f}", AXES)
    with replacing(path) as unfinished:
        picture.save(unfinished, format="PNG")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Their mean at first, and once there are many one in which older ones count less and less."""
    found: list[float] = []
    for number, loss in enumerate(losses, 1):
        before = found[-1] if found else loss
        found.append(before + (loss - before) * max(1 - SMOOTHING, 1 / number))
    return found


def event_writer(folder: Path) -> Callable[[Report], None] | None:
    """Writes loss, smoothed loss and speed of each step for TensorBoard; None: it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def write(report: Report) -> None:
        if not writers:  # what a run that was killed wrote of this step and later ones does not count
            writers.append(SummaryWriter(str(folder), purge_step=report.step))
        told = {"loss": report.loss, "smoothed loss": report.smoothed, "images per second": report.images_per_second}
        for name, value in told.items():
            writers[0].add_scalar(name, value, report.step)
        if report.step == report.steps:
            writers[0].close()

    return write
