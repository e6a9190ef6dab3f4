"""What a plan gives to the transformer: its texts and its pictures, encoded."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import to_cells, to_mask, to_tensor
from .networks.autoencoder import DCAutoencoder, encode_within_memory
from .plan import Plan
from .sampling.guidance import Condition
from .text.text_encoder import GemmaTextEncoder


class Inputs(NamedTuple):
    """Of one plan. image, control: latents (1, 32, H, W) of its pictures; None: it has none, or they are encoded later."""

    cond: Condition
    uncond: Condition | None = None
    image: Tensor | None = None
    control: Tensor | None = None

    def to(self, device: torch.device) -> "Inputs":
        conditions = (part and Condition(*(tensor.to(device) for tensor in part)) for part in self[:2])
        latents = (None if latent is None else latent.to(device) for latent in self[2:])
        return Inputs(*conditions, *latents)


def encode_texts(text_encoder: GemmaTextEncoder, plan: Plan) -> tuple[Condition, Condition | None]:
    """The prompts and the negative prompt. A prompt of several pictures is encoded once."""
    distinct = list(dict.fromkeys(plan.texts))
    text, text_mask = text_encoder(distinct, plan.instruction)
    rows = [distinct.index(prompt) for prompt in plan.texts]
    cond = Condition(text[rows], text_mask[rows])
    if plan.negative is None:
        return cond, None
    text, text_mask = text_encoder([plan.negative], None)
    return cond, Condition(text.expand_as(cond.text), text_mask.expand_as(cond.text_mask))


def encode_picture(autoencoder: DCAutoencoder, picture: Image.Image, plan: Plan, device: torch.device) -> Tensor:
    """The latent (1, 32, H, W) of a picture at the size of the plan's, by an encoder on this device."""
    image = to_tensor(picture, *plan.size).to(device)
    latent = encode_within_memory(autoencoder, image, plan.settings.max_bytes)
    return latent * autoencoder.config.latent_scale


def latent_mask(plan: Plan, like: Tensor) -> Tensor:
    """The mask at the size of a latent: (1, 1, H, W) in [0, 1]. It is cut as the image is, and keeps every pixel."""
    whole = to_mask(plan.settings.mask)
    width = min(whole.width, max(1, round(whole.height * plan.width / plan.height)))
    height = min(whole.height, max(1, round(whole.width * plan.height / plan.width)))
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    cut = whole.crop((left, top, left + width, top + height))
    mask = torch.from_numpy(np.asarray(cut).copy())[None, None].float().div(255)
    return to_cells(mask, *like.shape[-2:]).to(like)
