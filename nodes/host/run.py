"""What one sampling run of the host knows of its texts, so that keys and values are computed once a run and not once a step."""

from collections.abc import Callable, Mapping
from typing import Literal

import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sana.transformer import TextContext

# Entries in transformer_options
RUN = "sana_run"  # the SamplingRun
REFERENCE = "sana_reference"  # whose mask the negative prompt gets, see `sana.guidance.Guidance`
IDENTITY_BLOCKS = "sana_identity_blocks"  # numbers of blocks whose self-attention is the identity
GUIDANCE_EMBED = "sana_guidance_embed"  # the guidance scale that a Sprint model is told
WRAPPER = "sana"

Conds = Mapping[str, list[dict[str, object]]]


class SamplingRun:
    """Text contexts of one run and the mask of its prompt. Nothing of it outlives the run."""

    def __init__(self, conds: Conds) -> None:
        masks = [cond["attention_mask"] for cond in conds.get("positive", []) if cond.get("attention_mask") is not None]
        lengths = {mask.shape[-1] for mask in masks}
        rows = [mask.reshape(-1, mask.shape[-1]) > 0 for mask in masks]
        two_prompts = "middle" in conds  # of core's Dual CFG Guider, for which number 1 is the second prompt
        # (L,) of all prompts together
        self.prompt_mask = torch.cat(rows).any(dim=0) if len(lengths) == 1 and not two_prompts else None
        # With hooks, the weights behind keys and values may change from step to step.
        self.keeps = not any("hooks" in cond for group in conds.values() for cond in group)
        self.contexts: dict[object, TextContext] = {}

    def context(self, key: object, make: Callable[[], TextContext]) -> TextContext:
        """The text context of this key, made when it is first asked for."""
        if not self.keeps or torch.is_grad_enabled():
            return make()
        if key not in self.contexts:
            self.contexts[key] = make()
        return self.contexts[key]

    def with_prompt_mask(self, mask: Tensor, cond_or_uncond: list[int]) -> Tensor:
        """The mask (B, L) of a batch of conditions, with that of the prompt for the negative ones, which have number 1."""
        if self.prompt_mask is None or self.prompt_mask.shape[0] != mask.shape[1]:
            return mask
        parts = mask.chunk(len(cond_or_uncond))
        prompt = self.prompt_mask.to(mask.device)
        return torch.cat(
            [prompt.expand_as(part) if kind == 1 else part for kind, part in zip(cond_or_uncond, parts, strict=True)]
        )


def follow_runs(patcher: ModelPatcher, reference: Literal["nvlabs", "diffusers"] = "nvlabs") -> None:
    """Let a model know its runs, and the mask convention to follow in them."""
    patcher.model_options["transformer_options"][REFERENCE] = reference
    outer = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patcher.remove_wrappers_with_key(outer, WRAPPER)
    patcher.add_wrapper_with_key(outer, WRAPPER, _outer_sample)


def _outer_sample(executor: comfy.patcher_extension.WrapperExecutor, *arguments: object, **named: object) -> Tensor:
    guider = executor.class_obj
    if guider.model_patcher.model.identity.config.guidance_embed and getattr(guider, "cfg", 1) != 1:
        raise ValueError(
            f"SANA-Sprint takes its guidance as an input, and no negative prompt: set cfg to 1, not {guider.cfg:g}, or use "
            "SANA Sprint sampler"
        )
    options = guider.model_options["transformer_options"]  # a copy that the host made for this run
    options[RUN] = SamplingRun(guider.conds)
    try:
        return executor(*arguments, **named)
    finally:
        del options[RUN]
