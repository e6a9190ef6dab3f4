"""Small pictures of latents, without decoding them."""

from comfy_api.latest import io, ui

from .host.preview import preview_pictures


class SanaPreviewLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaPreviewLatent",
            display_name="Preview SANA latent",
            category="SANA/latent",
            search_aliases=["preview image", "taesd", "taesana", "quick decode", "thumbnail"],
            description="Shows what is in a latent within moments, without decoding it.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent of a SANA model, 32 channels."),
                io.Model.Input("model", tooltip="The SANA model it is of, which knows how its latents look."),
            ],
            outputs=[io.Image.Output()],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: io.Latent.Type, model: io.Model.Type) -> io.NodeOutput:
        pictures = preview_pictures(model, samples["samples"])
        return io.NodeOutput(pictures, ui=ui.PreviewImage(pictures, cls=cls))


NODES = (SanaPreviewLatent,)
