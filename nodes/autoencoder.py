"""Pictures to latents and back, within a bound on memory. The host's own VAE nodes give the same pixels."""

from comfy_api.latest import io

from ..sana.networks.memory import GIB
from .host.vae import SanaVAE

CATEGORY = "SANA/latent"


def vae_input() -> io.Vae.Input:
    return io.Vae.Input("vae", tooltip="The VAE of Load SANA or Load DC-AE.")


def memory_input() -> io.Float.Input:
    return io.Float.Input(
        "max_memory",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.1,
        tooltip="Working memory in GiB, beside the weights and the picture. 0: what is free. Less is slower, never different.",
    )


def bound(max_memory: float) -> int | None:
    return int(max_memory * GIB) or None


def check_vae(vae: object) -> None:
    if not isinstance(vae, SanaVAE):
        raise ValueError(
            "this VAE is not a DC-AE; connect the VAE of Load SANA or Load DC-AE, or use the node for other VAEs"
        )


class DCAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCAEEncode",
            display_name="DC-AE encode",
            category=CATEGORY,
            search_aliases=["vae encode", "dc-ae", "image to latent", "tiled encode"],
            description="Picture to latent, exact at any size within the memory you allow.",
            inputs=[
                io.Image.Input("pixels", tooltip="Sides are cut to multiples of 32 pixels."),
                vae_input(),
                memory_input(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels: io.Image.Type, vae: SanaVAE, max_memory: float) -> io.NodeOutput:
        check_vae(vae)
        return io.NodeOutput({"samples": vae.encode(pixels, max_bytes=bound(max_memory))})


class DCAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCAEDecode",
            display_name="DC-AE decode",
            category=CATEGORY,
            search_aliases=["vae decode", "dc-ae", "latent to image", "tiled decode"],
            description="Latent to picture, exact at any size within the memory you allow, without tiles or seams.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent of a SANA model, 32 channels."),
                vae_input(),
                memory_input(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, object], vae: SanaVAE, max_memory: float) -> io.NodeOutput:
        check_vae(vae)
        return io.NodeOutput(vae.decode(samples["samples"], max_bytes=bound(max_memory)))


NODES = (DCAEEncode, DCAEDecode)
