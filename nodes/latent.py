"""Empty latents in the sizes SANA was trained on."""

import torch
from comfy_api.latest import io

from ..sana.config import DOWNSAMPLE, LATENT_CHANNELS
from ..sana.sampling.resolution import LARGEST_SIDE, check_size, nearest_bucket

CATEGORY = "SANA/latent"
FREE = "width x height below"
BASE_SIZES = (512, 1024, 2048, 4096)
ASPECTS = {
    "1:1": 1.0,
    "4:3": 4 / 3,
    "3:2": 3 / 2,
    "16:9": 16 / 9,
    "21:9": 21 / 9,
    "3:4": 3 / 4,
    "2:3": 2 / 3,
    "9:16": 9 / 16,
    "9:21": 9 / 21,
}


def sizes() -> dict[str, tuple[int, int]]:
    """(height, width) in pixels by what the list shows, width first as everywhere in the host."""
    found = {}
    for base in BASE_SIZES:
        for name, aspect in ASPECTS.items():
            height, width = nearest_bucket(base, int(base * aspect), base)
            found[f"{base} px, {name} ({width} x {height})"] = (height, width)
    return found


class EmptySanaLatentImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {"default": 1024, "min": DOWNSAMPLE, "max": LARGEST_SIDE, "step": DOWNSAMPLE}
        return io.Schema(
            node_id="EmptySanaLatentImage",
            display_name="Empty SANA latent",
            category=CATEGORY,
            search_aliases=["empty latent image", "resolution", "size", "aspect ratio", "width", "height"],
            description="An empty latent of a size SANA was trained on, or of any size in steps of 32 pixels.",
            inputs=[
                io.Combo.Input(
                    "size",
                    options=[FREE, *sizes()],
                    default=FREE,
                    tooltip="A trained size in pixels, width x height, or your own.",
                ),
                io.Int.Input("width", tooltip="Pixels, a multiple of 32, when size says so.", **side),
                io.Int.Input("height", tooltip="Pixels, a multiple of 32, when size says so.", **side),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures to draw at once."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, size: str, width: int, height: int, batch_size: int) -> io.NodeOutput:
        height, width = sizes().get(size, (height, width))
        check_size(height, width)
        shape = (batch_size, LATENT_CHANNELS, height // DOWNSAMPLE, width // DOWNSAMPLE)
        return io.NodeOutput({"samples": torch.zeros(shape), "downscale_ratio_spacial": DOWNSAMPLE})


NODES = (EmptySanaLatentImage,)
