"""The best of several pictures, by how well they fit a prompt."""

import torch
from comfy_api.latest import io
from PIL import Image

from .host.report import reported
from .model_files import folder_names, part_path
from .pixels import to_pixels

FOLDER = "clip_vision"


class SanaBestPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaBestPictures",
            display_name="Best pictures by CLIP",
            category="SANA/image",
            search_aliases=["best of n", "clip score", "rank images", "select image", "choose best"],
            description="Scores pictures of any model against a prompt and passes the best of them on.",
            inputs=[
                io.Image.Input("images", tooltip="A batch of pictures, of any model."),
                io.String.Input(
                    "prompt", multiline=True, tooltip="What they should show. CLIP reads its first 77 tokens."
                ),
                io.Combo.Input(
                    "clip",
                    options=folder_names(FOLDER),
                    tooltip="A folder of a whole CLIP model of transformers in models/clip_vision, text encoder and tokenizer included.",
                ),
                io.Int.Input(
                    "keep", default=1, min=1, max=4096, tooltip="How many pictures to pass on, the best first."
                ),
            ],
            outputs=[io.Image.Output(), io.Float.Output("scores", is_output_list=True)],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, images: io.Image.Type, prompt: str, clip: str, keep: int) -> io.NodeOutput:
        if not prompt.strip():
            raise ValueError("the prompt is empty; write what the pictures should show")
        if not len(images):
            raise ValueError("there are no pictures to choose from; connect at least one")
        from ..sana.training.scoring import TOGETHER, Scorer  # which takes seconds to import transformers

        scorer = Scorer(part_path(FOLDER, clip))
        found: list[torch.Tensor] = []
        for group in images.split(TOGETHER):
            pictures = [Image.fromarray(to_pixels(image)) for image in group]
            found += scorer.score(pictures, [[prompt]] * len(pictures))
        scores, order = torch.cat(found).sort(descending=True, stable=True)
        best = scores[:keep].tolist()
        told = ", ".join(
            f"{score:.1f} (picture {number + 1})" for score, number in zip(best, order.tolist(), strict=False)
        )
        return reported(images[order[:keep]], best, text=told)


NODES = (SanaBestPictures,)
