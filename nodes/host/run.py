"""What one sampling run of the host knows of its texts, so that keys and values are computed once a run and not once a step."""

from collections.abc import Callable
from typing import Literal

import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from torch import Tensor

from ...sana.networks.transformer import TextContext
from .conds import Conds, with_areas_in_cells, with_prompt_mask

# Entries in transformer_options
RUN = "sana_run"  # the SamplingRun
MASK_CONVENTION = "sana_mask_convention"  # of the negative prompt, see `sana.sampling.guidance.Guidance`
IDENTITY_BLOCKS = "sana_identity_blocks"  # numbers of blocks whose self-attention is the identity
GUIDANCE_EMBED = "sana_guidance_embed"  # the guidance scale that a Sprint model is told
WRAPPER = "sana"


class SamplingRun:
    """Text contexts and warnings of one run. Nothing of it outlives the run."""

    def __init__(self, conds: Conds) -> None:
        # With hooks, the weights behind keys and values may change from step to step.
        self.keeps = not any("hooks" in cond for group in conds.values() for cond in group)
        self.contexts: dict[object, TextContext] = {}
        self.told: set[str] = set()  # warnings, each of which a run gives once

    def context(self, key: object, make: Callable[[], TextContext]) -> TextContext:
        """The text context of this key, made when it is first asked for."""
        if not self.keeps or torch.is_grad_enabled():
            return make()
        if key not in self.contexts:
            self.contexts[key] = make()
        return self.contexts[key]


def follow_runs(patcher: ModelPatcher, convention: Literal["nvlabs", "diffusers"] = "nvlabs") -> None:
    """Let a model know its runs, and the mask convention to follow in them."""
    patcher.model_options["transformer_options"][MASK_CONVENTION] = convention
    outer = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patcher.remove_wrappers_with_key(outer, WRAPPER)
    patcher.add_wrapper_with_key(outer, WRAPPER, _outer_sample)


def _outer_sample(executor: comfy.patcher_extension.WrapperExecutor, *arguments: object, **named: object) -> Tensor:
    guider = executor.class_obj
    _check_guidance(guider)
    guider.conds = with_areas_in_cells(guider.conds, arguments[0].shape[-2:])  # of the noise
    options = guider.model_options["transformer_options"]  # a copy that the host made for this run
    if options.get(MASK_CONVENTION) == "nvlabs":
        guider.conds = with_prompt_mask(guider.conds)
    options[RUN] = SamplingRun(guider.conds)
    try:
        return executor(*arguments, **named)
    finally:
        del options[RUN]


def _check_guidance(guider: CFGGuider) -> None:
    """Raises ValueError for guidance between two prompts with Sprint, which has learned it."""
    if guider.model_patcher.model.identity.config.guidance_embed and getattr(guider, "cfg", 1) != 1:
        raise ValueError(
            "SANA-Sprint takes its guidance as an input, and no negative prompt: "
            f"set cfg to 1, not {guider.cfg:g}, or use SANA Sprint sampler"
        )
