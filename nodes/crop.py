"""The part of a picture around a mask, to be drawn anew at a size of its own."""

import torch
from comfy_api.latest import io

MOST_MARGIN = 4096  # px


def span(low: int, high: int, least: int, side: int) -> tuple[int, int]:
    """low to high within a side, made at least `least` long on both ends alike, or where there is room. (start, length), px."""
    low, high = max(low, 0), min(high, side)
    length = min(max(high - low, least), side)
    start = min(max((low + high - length) // 2, 0), side - length)
    return start, length


class SanaCropToMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaCropToMask",
            display_name="Crop around mask",
            category="SANA/inpainting",
            search_aliases=["inpaint crop", "crop and stitch", "mask bounds", "crop image", "detailer"],
            description="The part of a picture around its mask, so that inpainting draws it with all of the model's pixels.",
            inputs=[
                io.Image.Input("image", tooltip="The whole picture, or a batch of them."),
                io.Mask.Input("mask", tooltip="What is to be drawn anew, of the size of the picture."),
                io.Int.Input(
                    "margin",
                    default=64,
                    min=0,
                    max=MOST_MARGIN,
                    tooltip="px around the mask that are cut out with it, from which the model sees where it draws.",
                ),
            ],
            outputs=[
                io.Image.Output(),
                io.Mask.Output(),
                io.Int.Output("x"),
                io.Int.Output("y"),
                io.Int.Output("width"),
                io.Int.Output("height"),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, mask: torch.Tensor, margin: int) -> io.NodeOutput:
        mask = mask.reshape(-1, *mask.shape[-2:])
        painted = (mask > 0).any(dim=0)
        if not painted.any():
            raise ValueError("the mask is empty; paint over what shall be drawn anew")
        height, width = image.shape[1:3]
        if mask.shape[1:] != (height, width):
            raise ValueError(
                f"the mask has {mask.shape[2]} x {mask.shape[1]} px and the picture {width} x {height}; "
                "give the mask of this picture, or scale both alike"
            )
        rows, columns = (painted.any(dim=axis).nonzero().flatten() for axis in (1, 0))
        bounds = [(int(found[0]) - margin, int(found[-1]) + 1 + margin) for found in (rows, columns)]
        least = max(high - low for low, high in bounds) // 2  # SANA knows no pictures that are narrower
        (y, tall), (x, wide) = (
            span(low, high, least, side) for (low, high), side in zip(bounds, (height, width), strict=True)
        )
        part = (slice(None), slice(y, y + tall), slice(x, x + wide))
        return io.NodeOutput(image[part], mask[part], x, y, wide, tall)


NODES = (SanaCropToMask,)
