"""Guidance: how the velocities of several text conditions become one denoised latent.

A function here takes a transformer and what it is conditioned on, and returns the `Denoiser` that a solver asks.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..networks.transformer import Modulation, SanaTransformer, TextContext
from .control import ControlledTransformer
from .solvers import Denoiser

GUIDANCE_EMBED_SCALE = 0.1  # NVlabs/Sana diffusion/model/nets/sana_multi_scale.py, SanaMSCM, cfg_embed_scale

MaskConvention = Literal["nvlabs", "diffusers"]
Velocity = Callable[..., Tensor]  # `SanaTransformer.velocity`, or the same compiled


class Condition(NamedTuple):
    """An encoded text: text (B, L, C), text_mask (B, L) bool."""

    text: Tensor
    text_mask: Tensor


@dataclass(frozen=True)
class Guidance:
    """How strongly to follow the prompt, and how.

    Raises ValueError for a scale that is no number, an interval that is not 0 <= low < high <= 1, and an unknown
    convention.
    """

    scale: float = 4.5  # w in uncond + w * (cond - uncond); 1: no guidance, one evaluation a step
    interval: tuple[float, float] = (0.0, 1.0)  # it acts at noise levels strictly between; 1 includes pure noise
    perturbed_scale: float = 0.0  # of perturbed-attention guidance (arXiv 2403.17377); 0: off
    perturbed_blocks: frozenset[int] = frozenset({8})  # whose self-attention becomes the identity
    mask_convention: MaskConvention = "nvlabs"  # the negative prompt gets the prompt's mask, or (diffusers) its own

    def __post_init__(self) -> None:
        for name, value in (("guidance_scale", self.scale), ("pag_scale", self.perturbed_scale)):
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be a finite number, such as 4.5")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance acts from {low} to {high}; these must be two rising numbers within 0 and 1")
        if self.mask_convention not in ("nvlabs", "diffusers"):
            raise ValueError(f"mask_convention is {self.mask_convention!r}; use 'nvlabs' or 'diffusers'")

    def acts_at(self, sigma: float) -> bool:
        low, high = self.interval
        return low < sigma and (sigma < high or high == 1)


def check_blocks(blocks: Collection[int], depth: int) -> None:
    """Raises ValueError for a number of a block that a transformer of this depth does not have."""
    unknown = sorted(set(blocks) - set(range(depth)))
    if unknown:
        raise ValueError(f"block {unknown[0]} does not exist; the transformer has blocks 0 to {depth - 1}")


def guided_denoiser(
    transformer: SanaTransformer | ControlledTransformer,
    cond: Condition,
    uncond: Condition | None,
    guidance: Guidance,
    *,
    sigmas: Tensor | None = None,
    velocity: Velocity | None = None,
) -> Denoiser:
    """Classifier-free and perturbed-attention guidance (arXiv 2207.12598; 2403.17377).

    uncond: needed unless the scale is 1. sigmas: noise levels that will be asked for, whose modulation is then computed at
    once. velocity: a compiled `transformer.velocity`. Raises ValueError for a missing uncond or an unknown block.
    """
    if guidance.perturbed_scale:
        check_blocks(guidance.perturbed_blocks, transformer.config.depth)
    if guidance.scale != 1 and uncond is None:
        raise ValueError("guidance needs a negative prompt, which may be empty; or set guidance_scale to 1")
    velocity = velocity or transformer.velocity
    batch = len(cond.text)
    single = transformer.text_context(cond.text.to(transformer.dtype), cond.text_mask)
    both = single if guidance.scale == 1 else _joint_context(transformer, cond, uncond, guidance.mask_convention)
    modulation_at = _modulations(transformer, sigmas)

    def evaluate(x: Tensor, modulation: Modulation, context: TextContext, identity_blocks: frozenset[int]) -> Tensor:
        return velocity(x.to(transformer.dtype), modulation, context, identity_blocks=identity_blocks).float()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        acts, modulation = guidance.acts_at(float(sigma)), modulation_at(sigma)
        if acts and guidance.scale != 1:
            v_uncond, v_cond = evaluate(torch.cat([x, x]), modulation, both, frozenset()).split(batch)
            v = v_uncond + guidance.scale * (v_cond - v_uncond)
        else:
            v = v_cond = evaluate(x, modulation, single, frozenset())
        if acts and guidance.perturbed_scale:
            v = v + guidance.perturbed_scale * (v_cond - evaluate(x, modulation, single, guidance.perturbed_blocks))
        return x - float(sigma) * v

    return denoise


def scm_denoiser(
    transformer: SanaTransformer, cond: Condition, guidance_scale: float, *, velocity: Velocity | None = None
) -> Denoiser:
    """The denoiser of Sprint, in the scale of a flow (arXiv 2503.09641, section 3.1).

    The network takes sigma itself as its time, and the guidance scale as an input.
    """
    velocity = velocity or transformer.velocity
    context = transformer.text_context(cond.text.to(transformer.dtype), cond.text_mask)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        one = torch.ones(1, device=x.device)
        modulation = transformer.modulation(float(sigma) * one, GUIDANCE_EMBED_SCALE * guidance_scale * one)
        return x - float(sigma) * velocity(x.to(transformer.dtype), modulation, context).float()

    return denoise


def inpainting_denoiser(denoise: Denoiser, clean: Tensor, noise: Tensor, mask: Tensor) -> Denoiser:
    """Keep a latent where mask is 0 and sample where it is 1; in between, mix.

    clean, noise: (B, C, H, W); mask: (B, 1, H, W) in [0, 1]. Before each evaluation the kept part is put at the noise level
    of the step, after it, it is put back.
    """

    def masked(x: Tensor, sigma: Tensor) -> Tensor:
        known = torch.lerp(clean, noise, float(sigma))
        return torch.lerp(clean, denoise(torch.lerp(known, x, mask), sigma), mask)

    return masked


def _joint_context(
    transformer: SanaTransformer, cond: Condition, uncond: Condition, convention: MaskConvention
) -> TextContext:
    """Both conditions as one batch, uncond first."""
    # NVlabs/Sana sana_multi_scale.py repeats the prompt's mask over the unconditional half, as in training.
    uncond_mask = cond.text_mask if convention == "nvlabs" else uncond.text_mask
    text = torch.cat([uncond.text, cond.text]).to(transformer.dtype)
    return transformer.text_context(text, torch.cat([uncond_mask, cond.text_mask]))


def _modulations(transformer: SanaTransformer, sigmas: Tensor | None) -> Callable[[Tensor], Modulation]:
    """Modulation by noise level, of batch 1; those of a known schedule are computed together."""
    device = transformer.scale_shift_table.device
    known: dict[float, Modulation] = {}
    if sigmas is not None:
        table = transformer.modulation(1000 * sigmas.to(device))
        known = {float(sigma): table.at(i) for i, sigma in enumerate(sigmas)}

    def at(sigma: Tensor) -> Modulation:
        found = known.get(float(sigma))
        return transformer.modulation(1000 * sigma.reshape(1).to(device)) if found is None else found

    return at
