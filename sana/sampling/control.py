"""A transformer with a ControlNet beside it, which a denoiser takes in the place of the transformer."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TransformerConfig
from ..networks.controlnet import SanaControlNet
from ..networks.transformer import Modulation, SanaTransformer, TextContext
from .solvers import Denoiser

Contexts = tuple[TextContext, TextContext]  # of the transformer and of the ControlNet


@dataclass(frozen=True, eq=False)
class ControlledTransformer:
    """A transformer whose tokens a ControlNet corrects, with the names that a denoiser asks a transformer for.

    image: latent (1, 32, H, W) of the picture that guides; scale: of the corrections. own_start: the ControlNet branches off
    before the first block, with time and tokens by its own weights, and corrects one block later: diffusers'
    SanaControlNetPipeline; else after it, as in NVlabs' graph (`networks/controlnet.py`).
    run: a compiled `transformer.velocity`.
    """

    transformer: SanaTransformer
    controlnet: SanaControlNet
    image: Tensor
    scale: float
    own_start: bool = False
    run: Callable[..., Tensor] | None = None

    @property
    def config(self) -> TransformerConfig:
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def scale_shift_table(self) -> Tensor:
        return self.transformer.scale_shift_table

    def modulation(self, timestep: Tensor) -> Modulation:
        """As `SanaTransformer.modulation`; its time is that of the ControlNet."""
        own = self.transformer.modulation(timestep)
        return own._replace(time=self.controlnet.time(timestep)) if self.own_start else own

    def text_context(self, text: Tensor, text_mask: Tensor | None = None) -> Contexts:
        """As `SanaTransformer.text_context`, for both."""
        return self.transformer.text_context(text, text_mask), self.controlnet.text_context(text, text_mask)

    def velocity(
        self, x: Tensor, modulation: Modulation, contexts: Contexts, *, identity_blocks: Collection[int] = ()
    ) -> Tensor:
        """As `SanaTransformer.velocity`, with what `modulation` and `text_context` give here."""
        image = self.image.to(x.dtype).expand(len(x), -1, -1, -1)

        def control(tokens: Tensor) -> list[Tensor | None]:
            start = self.controlnet.embed(x) if self.own_start else tokens
            corrections = [self.scale * part for part in self.controlnet(start, image, modulation, contexts[1])]
            return [None, *corrections] if self.own_start else corrections

        run = self.run or self.transformer.velocity
        return run(x, modulation, contexts[0], identity_blocks=identity_blocks, control=control)


def within(levels: tuple[float, float], inside: Denoiser, outside: Denoiser) -> Denoiser:
    """A denoiser at noise levels from the lower to the higher of two, both included, and another one elsewhere."""
    low, high = levels

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return (inside if low <= float(sigma) <= high else outside)(x, sigma)

    return denoise
