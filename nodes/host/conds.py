"""What a run of the host makes of its conditions before it starts: masks of negative prompts, and areas in cells."""

from collections.abc import Mapping, Sequence

import torch

from ...sana.config import DOWNSAMPLE
from .padding import complete_mask

AREA_UNIT = 8  # pixels, of the host's areas

# Groups of conditions of the host's guiders
PROMPTS = ("positive", "middle")  # the latter of Dual CFG Guider
UNCONDITIONAL = ("empty_negative_prompt", "negative")  # the first that there is: Perp-Neg Guider has both

Cond = Mapping[str, object]
Conds = Mapping[str, list[Cond]]


def with_prompt_mask(conds: Conds) -> Conds:
    """The conditions of a run, in which every negative prompt has the mask of the prompts: what counts in any of them.

    A negative prompt that is longer than a prompt keeps its own mask. The masks are set before the run because guiders
    differ in the order in which they evaluate their conditions, and because the host makes further conditions out of
    these for parts of the picture.
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
    """The conditions of a run, with areas in cells of the latent, whose sides are (H, W), and within it.

    The host gives an area as (height, width, y, x) in units of 8 px, or as ("percentage", height, width, y, x) in shares
    of the picture.
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
