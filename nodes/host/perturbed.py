"""Perturbed-attention guidance (arXiv 2403.17377) for SANA, whose self-attention core's node does not reach by itself."""

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sana.sampling.guidance import Guidance, check_blocks
from .run import IDENTITY_BLOCKS


def perturb_attention(
    patcher: ModelPatcher, scale: float, blocks: list[int], low: float = 0.0, high: float = 1.0
) -> None:
    """Add scale times the difference to a prediction whose self-attention is the identity in `blocks`.

    It acts at noise levels between low and high, as guidance does. Raises ValueError for a block that does not exist.
    """
    interval = Guidance(interval=(low, high))
    check_blocks(blocks, patcher.model.identity.config.depth)

    def guide(arguments: dict[str, object]) -> Tensor:
        denoised, sigma = arguments["denoised"], arguments["sigma"]
        if not interval.acts_at(float(sigma.max())):
            return denoised
        options = arguments["model_options"]
        inner = {**options["transformer_options"], IDENTITY_BLOCKS: frozenset(blocks)}
        (perturbed,) = comfy.samplers.calc_cond_batch(
            arguments["model"],
            [arguments["cond"]],
            arguments["input"],
            sigma,
            {**options, "transformer_options": inner},
        )
        return denoised + scale * (arguments["cond_denoised"] - perturbed)

    patcher.set_model_sampler_post_cfg_function(guide)
