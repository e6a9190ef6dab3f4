"""What one sampling run of the host knows of its texts, so that keys and values are computed once a run and not once a step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sana.config import DOWNSAMPLE
from ...sana.networks.transformer import TextContext
from .padding import complete_mask

# Entries in transformer_options
RUN = "sana_run"  # the SamplingRun
REFERENCE = "sana_reference"  # whose mask the negative prompt gets, see `sana.guidance.Guidance`
IDENTITY_BLOCKS = "sana_identity_blocks"  # numbers of blocks whose self-attention is the identity
GUIDANCE_EMBED = "sana_guidance_embed"  # the guidance scale that a Sprint model is told
WRAPPER = "sana"

AREA_UNIT = 8  # pixels, of the host's areas

# Groups of conditions of the host's guiders
PROMPTS = ("positive", "middle")  # the latter of Dual CFG Guider
UNCONDITIONAL = ("empty_negative_prompt", "negative")  # the first that there is: Perp-Neg Guider has both

Cond = Mapping[str, object]
Conds = Mapping[str, list[Cond]]


class SamplingRun:
    """Text contexts of one run. Nothing of it outlives the run."""

    def __init__(self, conds: Conds) -> None:
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


def with_prompt_mask(conds: Conds) -> Conds:
    """The conditions of a run, with the mask of all prompts together for the unconditional ones.

    In its conditions, because guiders differ in the order in which they evaluate them, and the host makes more of them for
    parts of the picture. Texts longer than a prompt keep their own mask.
    """
    prompts = [cond for name in PROMPTS for cond in conds.get(name, []) if "cross_attn" in cond]
    masks = [complete_mask(cond["cross_attn"], cond.get("attention_mask")) for cond in prompts]
    length = min((mask.shape[1] for mask in masks), default=0)
    unconditional = next((name for name in UNCONDITIONAL if name in conds), None)

    def masked(cond: Cond) -> Cond:
        if "cross_attn" not in cond or cond["cross_attn"].shape[1] > length:
            return cond
        batch, rows = cond["cross_attn"].shape[:2]
        shared = torch.cat([mask[:, :rows] for mask in masks]).amax(dim=0)
        return {**cond, "attention_mask": shared.expand(batch, -1)}

    return {name: [masked(c) for c in group] if name == unconditional else group for name, group in conds.items()}


def with_areas_in_cells(conds: Conds, sides: Sequence[int]) -> Conds:
    """The conditions of a run, with areas within the latent, whose sides are (H, W).

    The host has areas as (height, width, y, x) in units of 8 px, or after a word in shares of the picture.
    """

    def in_cells(cond: Cond) -> Cond:
        if "area" not in cond:
            return cond
        shares = cond["area"][0] == "percentage"
        numbers = cond["area"][1:] if shares else cond["area"]
        middle = len(numbers) // 2  # areas of videos have more before height and y
        units = sides if shares else [AREA_UNIT / DOWNSAMPLE] * 2
        sizes = [max(1, round(size * unit)) for size, unit in zip(numbers[middle - 2 : middle], units, strict=True)]
        starts = [min(side - 1, round(at * unit)) for at, unit, side in zip(numbers[-2:], units, sides, strict=True)]
        return {**cond, "area": (*sizes, *starts)}

    return {name: [in_cells(cond) for cond in group] for name, group in conds.items()}


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
    guider.conds = with_areas_in_cells(guider.conds, arguments[0].shape[-2:])  # of the noise
    options = guider.model_options["transformer_options"]  # a copy that the host made for this run
    if options.get(REFERENCE) == "nvlabs":
        guider.conds = with_prompt_mask(guider.conds)
    options[RUN] = SamplingRun(guider.conds)
    try:
        return executor(*arguments, **named)
    finally:
        del options[RUN]
