"""What to draw: the settings that a caller gives, and what they come to for one model, with nothing left open."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .config import TransformerIdentity
from .sampling.guidance import Guidance
from .sampling.resolution import check_size, nearest_bucket
from .sampling.schedule import angle_sigmas, partial_sigmas, scm_angles, shift_sigma
from .sampling.solvers import SOLVERS
from .text.prompt import DIFFUSERS_INSTRUCTION, INSTRUCTION

DEFAULT_STEPS, SPRINT_STEPS = 20, 2
DEFAULT_STRENGTH = 0.5  # of an image to start from, without a mask
# Settings that Sprint, which has no guidance by a second evaluation and another schedule, has no use for.
NOT_OF_SPRINT = ("negative", "mask", "pag_scale", "pag_blocks", "guidance_interval", "solver", "flow_shift")
LARGE = 2  # times the pixels of the model's square, from which on an image does not suggest its own size
# Settings of a batch or a machine, and what is no JSON.
NOT_RECORDED = ("seed", "image", "mask", "control_image", "max_bytes")

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Settings:
    """What decides a batch of pictures, beside the model and the prompts. None: what the model or the rest suggest.

    Raises ValueError for an unknown solver or reference, a strength outside (0, 1], a mask or a strength below 1 without
    an image, and for a ControlNet a scale that is no number, a range that is not 0 <= from < to <= 1, or either without a
    control_image; `make_plan` checks sizes, steps and scales.
    """

    negative: str = ""
    height: int | None = None  # pixels
    width: int | None = None
    steps: int | None = None
    seed: int = 0  # of the first picture; the k-th has seed + k, so that the size of a batch changes no picture
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    pag_scale: float = 0.0
    pag_blocks: Sequence[int] | None = None
    # Whose rules. diffusers': prompts in lower case, an official instruction with other quotes, for the negative prompt a
    # mask of its own (`Guidance.mask_convention`), and a ControlNet that branches off before the first block
    reference: Literal["nvlabs", "diffusers"] = "nvlabs"
    solver: str = "flow_dpm"
    flow_shift: float | None = None
    instruction: str | None = INSTRUCTION  # the text put before the prompt; None: none
    image: Image.Image | None = None  # to start from; cut to the size of the picture
    mask: Image.Image | None = None  # of `image`: white is painted anew, black is kept
    # Share of the noise schedule to run, in (0, 1]; None: 0.5 for an image without a mask, else 1
    strength: float | None = None
    control_image: Image.Image | None = None  # for a ControlNet; cut to the size of the picture
    control_scale: float = 1.0  # of its corrections; 0: none
    control_from: float = 0.0  # where in the schedule it begins to act, as a share of it
    control_to: float = 1.0  # where it ends
    max_bytes: int | None = None  # bound on the working memory of the autoencoder

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is unknown; use one of {', '.join(SOLVERS)}")
        if self.reference not in ("nvlabs", "diffusers"):
            raise ValueError(f"reference is {self.reference!r}; use 'nvlabs' or 'diffusers'")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs the image that it is a mask of; give both")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.strength not in (None, 1) and self.image is None:
            raise ValueError(f"strength {self.strength} needs an image to start from; give both")
        if not math.isfinite(self.control_scale):
            raise ValueError(f"control_scale is {self.control_scale}; it must be a finite number, such as 1")
        if not 0 <= self.control_from < self.control_to <= 1:
            raise ValueError(
                f"control acts from {self.control_from} to {self.control_to}; these must be two rising numbers within 0 and 1"
            )
        alone = [name for name in ("control_scale", "control_from", "control_to") if name in self.changed]
        if alone and self.control_image is None:
            raise ValueError(f"{' and '.join(alone)} without a control_image has no effect; give both")

    @property
    def changed(self) -> dict[str, object]:
        """What differs from the defaults, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}

    @property
    def schedule_share(self) -> float:
        """The strength, or what the rest suggests: half of the schedule for an image without a mask, else all of it."""
        return _given(self.strength, DEFAULT_STRENGTH if self.image is not None and self.mask is None else 1.0)


@dataclass(frozen=True, eq=False)
class Plan:
    """Settings resolved for one model: everything that decides a batch of pictures, before anything is computed."""

    settings: Settings  # what it was made from
    variant: str  # of the model
    prompts: tuple[str, ...]  # of each picture, as they were given
    seeds: tuple[int, ...]  # of each picture
    height: int  # pixels
    width: int
    steps: int  # of the whole schedule, of which `sigmas` may be a part
    sigmas: Tensor  # noise levels to visit, (step_count + 1,) falling to 0
    guidance: Guidance
    control_levels: tuple[float, float]  # noise levels, the lower first, between which a ControlNet acts
    texts: tuple[str, ...]  # what is encoded of each prompt, after the instruction
    instruction: str | None
    negative: str | None  # what is encoded to be led away from; None: nothing is

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, px."""
        return self.height, self.width

    @property
    def step_count(self) -> int:
        """How many steps sampling takes."""
        return len(self.sigmas) - 1

    def record(self, k: int = 0) -> dict[str, object]:
        """Everything needed to draw the k-th picture again with the same model, as JSON values.

        Its prompt, seed, steps, guidance and size, and what else differs from the defaults of `Settings`.
        """
        record: dict[str, object] = {"prompt": self.prompts[k], "seed": self.seeds[k], "model": self.variant}
        record["steps"] = self.steps
        record.update((name, value) for name, value in self.settings.changed.items() if name not in NOT_RECORDED)
        record.update((name, "given") for name in ("image", "control_image") if name in self.settings.changed)
        return {**record, "guidance_scale": self.guidance.scale, "height": self.height, "width": self.width}


def make_plan(prompts: Sequence[str], settings: Settings, identity: TransformerIdentity, downsample: int) -> Plan:
    """What settings come to for a model, and for one picture of each prompt.

    downsample: pixels of a side of a latent's cell. Raises ValueError if there is no prompt, for values out of range,
    and for settings that Sprint does not take.
    """
    if not prompts:
        raise ValueError("there is no picture to draw; ask for at least one")
    sprint, diffusers = identity.config.guidance_embed, settings.reference == "diffusers"
    unused = [name for name in NOT_OF_SPRINT if sprint and name in settings.changed]
    if unused:
        raise ValueError(f"Sprint models do not take {' and '.join(unused)}; leave that out, or use another SANA model")
    height, width = _size(settings, identity.base_size, downsample)
    steps = _given(settings.steps, SPRINT_STEPS if sprint else DEFAULT_STEPS)
    guidance = _guidance(settings, identity)
    negative = None if sprint or guidance.scale == 1 else settings.negative
    instruction = settings.instruction
    if diffusers and instruction == INSTRUCTION:
        instruction = DIFFUSERS_INSTRUCTION
    return Plan(
        settings=settings,
        variant=identity.variant,
        prompts=tuple(prompts),
        seeds=tuple(settings.seed + k for k in range(len(prompts))),
        height=height,
        width=width,
        steps=steps,
        sigmas=_sprint_sigmas(settings, steps) if sprint else _flow_sigmas(settings, steps, identity.flow_shift),
        guidance=guidance,
        control_levels=_control_levels(settings, identity.flow_shift),
        texts=tuple(prompt.lower() if diffusers else prompt for prompt in prompts),
        instruction=instruction,
        negative=negative.lower() if negative and diffusers else negative,
    )


def _size(settings: Settings, base_size: int, downsample: int) -> tuple[int, int]:
    """Height and width of the pictures, px. Raises ValueError for sizes no model takes.

    An image suggests its own, or if it is large the size nearest in shape among those the model was trained on. So does one
    for a ControlNet, where there is no image to start from.
    """
    suggested = (base_size, base_size)
    image = settings.control_image if settings.image is None else settings.image
    if image is not None:
        width, height = image.size
        suggested = tuple(max(downsample, side // downsample * downsample) for side in (height, width))
        if height * width > LARGE * base_size**2:
            suggested = nearest_bucket(height, width, base_size)
    height, width = _given(settings.height, suggested[0]), _given(settings.width, suggested[1])
    check_size(height, width, downsample)
    return height, width


def _guidance(settings: Settings, identity: TransformerIdentity) -> Guidance:
    return Guidance(
        _given(settings.guidance_scale, identity.guidance_scale),
        settings.guidance_interval,
        settings.pag_scale,
        frozenset(_given(settings.pag_blocks, (identity.config.perturbed_block,))),
        settings.reference,
    )


def _flow_sigmas(settings: Settings, steps: int, suggested_shift: float) -> Tensor:
    """The grid of the solver. A part of a schedule is cut from one grid for all solvers, as the host cuts it."""
    flow_shift = _given(settings.flow_shift, suggested_shift)
    if settings.schedule_share == 1:
        return SOLVERS[settings.solver].sigmas(steps, flow_shift)
    return partial_sigmas(steps, flow_shift, settings.schedule_share)


def _control_levels(settings: Settings, suggested_shift: float | None) -> tuple[float, float]:
    """Where on the schedule a ControlNet acts, as the host has it: of levels that fall evenly, shifted by the flow shift."""
    shift = _given(settings.flow_shift, suggested_shift or 1.0)  # Sprint, which has none, takes no ControlNet
    shares = torch.tensor([1 - settings.control_to, 1 - settings.control_from], dtype=torch.float64)
    low, high = shift_sigma(shares, shift).tolist()
    return low, high


def _sprint_sigmas(settings: Settings, steps: int) -> Tensor:
    """The grid of Sprint. With an image, the first levels are left out: diffusers pipeline_sana_sprint_img2img.py."""
    return angle_sigmas(scm_angles(steps)[int(max(steps - steps * settings.schedule_share, 0)) :])


def _given(value: Setting | None, suggested: Setting) -> Setting:
    return suggested if value is None else value
