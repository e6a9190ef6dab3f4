"""The nodes of ComfyUI-Sana: a thin layer that connects `sana/` to ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import (
    answers,
    autoencoder,
    choosing,
    controlnet,
    crop,
    enhancement,
    grids,
    latent,
    loaders,
    preview,
    sampling,
    text,
    training,
)
from .host.breakdown import contained
from .host.other_packs import refuse_old_prompts, tell_of_other_packs
from .host.register import register
from .host.routes import serve
from .model_files import adopt_downloads

TOPICS = (
    loaders,
    text,
    enhancement,
    latent,
    sampling,
    autoencoder,
    preview,
    choosing,
    controlnet,
    grids,
    crop,
    training,
)
NODES = tuple(node for topic in TOPICS for node in topic.NODES)


class SanaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [contained(node) for node in NODES]


async def comfy_entrypoint() -> SanaExtension:
    """Called by the host once, when it loads the pack."""
    register()
    adopt_downloads()
    refuse_old_prompts()
    tell_of_other_packs([node.__name__ for node in NODES])
    serve("/sana/tokens", answers.tokens)
    serve("/sana/sizes", answers.sizes)
    return SanaExtension()
