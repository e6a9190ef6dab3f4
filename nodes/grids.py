"""Settings to compare, and the grid of labelled pictures that shows them side by side."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont

from .pixels import to_pixels

CATEGORY = "SANA/comparison"
MOST_PICTURES = 100
MOST_SEED = 2**64 - 1
MOST_STEPS, MOST_CFG = 1000, 30
GAP = 8  # px between cells
LEAST_FONT = 10  # px
FONT_SHARE = 1 / 18  # of the height of a picture


def numbers(text: str, name: str, kind: Callable[[str], float], least: int, most: int) -> list[float]:
    """The numbers of a text with commas between, each once. Raises ValueError for anything else, or none."""
    found = []
    for part in (" ".join(part.split()) for part in text.split(",")):
        try:
            value = kind(part)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(
                f'"{part}" in {name} is not {what}; write them with commas between, such as 10, 20'
            ) from error
        if not least <= value <= most:
            raise ValueError(f"{part} in {name} is not from {least} to {most}")
        found.append(value)
    return list(dict.fromkeys(found))


def labels_and_columns(seeds: Sequence[int], steps: Sequence[int], cfgs: Sequence[float]) -> tuple[list[str], int]:
    """What tells each picture from the others, and how many of them stand in a row: as many as the last of several lists has."""
    lists = (
        [f"seed {n}" for n in seeds],
        [f"{n} step{'s' if n > 1 else ''}" for n in steps],
        [f"cfg {n:g}" for n in cfgs],
    )
    several = [names for names in lists if len(names) > 1]
    return [", ".join(names) for names in itertools.product(*several or lists)], len(several[-1]) if several[1:] else 0


def picture_grid(pictures: Sequence[torch.Tensor], labels: Sequence[str], columns: int) -> torch.Tensor:
    """(height, width, 3) in [0, 1] of pictures of any sizes in rows, on white, with a label above each, if there are any.

    columns 0: as many as there are rows, or one more.
    """
    columns = min(columns or math.isqrt(len(pictures) - 1) + 1, len(pictures))
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    size = max(LEAST_FONT, round(height * FONT_SHARE))
    strip = 2 * size if labels else 0
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (strip + height + GAP) - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        left, top = place % columns * (width + GAP), place // columns * (strip + height + GAP)
        pixels = Image.fromarray(to_pixels(picture))
        sheet.paste(pixels, (left + (width - pixels.width) // 2, top + strip + (height - pixels.height) // 2))
        if labels:
            font = _fitting_font(labels[place], size, width)
            pen.text((left + width / 2, top + strip / 2), labels[place], fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.asarray(sheet, np.float32) / 255)


def _fitting_font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font up to `size` px in which a line takes at most 95 % of `width` px, or the smallest."""
    while size > LEAST_FONT and ImageFont.load_default(size).getlength(text) > 0.95 * width:
        size -= 1
    return ImageFont.load_default(size)


class SanaCompareSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        each = "One picture for each combination."
        return io.Schema(
            node_id="SanaCompareSettings",
            display_name="Settings to compare",
            category=CATEGORY,
            search_aliases=["xy plot", "parameter sweep", "seed grid", "steps and cfg", "list of seeds"],
            description="Lists of seeds, steps and cfg, for a sampler that then draws once for each combination.",
            inputs=[
                io.String.Input("seeds", default="1", tooltip=f"Whole numbers with commas between. {each}"),
                io.String.Input("steps", default="10, 20", tooltip=f"Whole numbers with commas between. {each}"),
                io.String.Input("cfgs", default="2, 4.5, 7", tooltip=f"Numbers with commas between. {each}"),
            ],
            outputs=[
                io.Int.Output("seed", is_output_list=True),
                io.Int.Output("step_count", display_name="steps", is_output_list=True),
                io.Float.Output("cfg", is_output_list=True),
                io.String.Output("labels", is_output_list=True),
                io.Int.Output("columns"),
            ],
        )

    @classmethod
    def execute(cls, seeds: str, steps: str, cfgs: str) -> io.NodeOutput:
        lists = (
            numbers(seeds, "seeds", int, 0, MOST_SEED),
            numbers(steps, "steps", int, 1, MOST_STEPS),
            numbers(cfgs, "cfgs", float, 0, MOST_CFG),
        )
        count = math.prod(map(len, lists))
        if count > MOST_PICTURES:
            raise ValueError(f"these are {count:,} pictures; take fewer numbers, for {MOST_PICTURES} at most")
        labels, columns = labels_and_columns(*lists)
        return io.NodeOutput(*map(list, zip(*itertools.product(*lists), strict=True)), labels, columns)


class SanaPictureGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaPictureGrid",
            display_name="Picture grid with labels",
            category=CATEGORY,
            search_aliases=["image grid", "contact sheet", "xy plot", "collage", "captions"],
            description="Pictures in rows in one picture, with a label above each.",
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures of any sizes: a list, a batch, or both."),
                io.String.Input(
                    "labels",
                    multiline=True,
                    default="",
                    tooltip="A line for each picture, or the labels of Settings to compare. Empty: no labels.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=MOST_PICTURES,
                    tooltip="Pictures in a row. 0: as many as there are rows.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, images: list[torch.Tensor], labels: list[str], columns: list[int]) -> io.NodeOutput:
        pictures = [picture for batch in images for picture in batch]
        if not pictures:
            raise ValueError("there are no pictures for the grid; connect at least one")
        lines = "\n".join(labels).rstrip().splitlines()
        if lines and len(lines) != len(pictures):
            raise ValueError(
                f"{len(lines)} labels for {len(pictures)} pictures; write a line for each picture, or none"
            )
        return io.NodeOutput(picture_grid(pictures, lines, columns[0])[None])


NODES = (SanaCompareSettings, SanaPictureGrid)
