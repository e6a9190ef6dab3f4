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
        prompts = [cond for cond in conds.get("positive", []) if "cross_attn" in cond]
        masks = [complete_mask(cond["cross_attn"], cond.get("attention_mask")) > 0 for cond in prompts]
        length = min((mask.shape[1] for mask in masks), default=0)
        two_prompts = "middle" in conds  # of core's Dual CFG Guider, for which number 1 is the second prompt
        # (L,) of all prompts together
        self.prompt_mask = torch.cat([mask[:, :length] for mask in masks]).any(0) if masks and not two_prompts else None
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
        if self.prompt_mask is None or self.prompt_mask.shape[0] < mask.shape[1]:
            return mask
        parts = mask.chunk(len(cond_or_uncond))
        prompt = self.prompt_mask[: mask.shape[1]].to(mask.device)
        return torch.cat(
            [prompt.expand_as(part) if kind == 1 else part for kind, part in zip(cond_or_uncond, parts, strict=True)]
        )


def complete_mask(text: Tensor, mask: Tensor | None) -> Tensor:
    """A mask (B, L) for text (B, L, C): rows beyond the mask at hand count unless they are zero.

    Core's ConditioningConcat joins texts but not masks, and a scheduled CLIP gives none.
    """
    known = torch.zeros(len(text), 0) if mask is None else mask.reshape(-1, mask.shape[-1]).float()
    found = (text[:, known.shape[-1] :] != 0).any(dim=-1).to(known)
    return torch.cat([known, found], dim=1)


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
