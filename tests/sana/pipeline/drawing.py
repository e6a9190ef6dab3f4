"""What the tests of pipelines draw, and from what."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana.pipeline import SanaPipeline
from sana.plan import Settings

HEIGHT, WIDTH = 64, 96
SIZE = {"height": HEIGHT, "width": WIDTH}


def sample(pipeline: SanaPipeline, prompt: str | list[str], batch_size: int = 1, **options: object) -> Tensor:
    """The latent that sampling ends at."""
    *_, last = pipeline.sample(prompt, Settings(**{**SIZE, **options}), batch_size=batch_size)
    return last.next_x


def count_evaluations(pipeline: SanaPipeline) -> list[int]:
    """The batch size of every evaluation of the transformer from now on."""
    evaluations: list[int] = []

    def velocity(x: Tensor, *arguments: object, **options: object) -> Tensor:
        evaluations.append(len(x))
        return pipeline.transformer.velocity(x, *arguments, **options)

    pipeline.velocity = velocity
    return evaluations


def drawn(*seeds: int) -> Tensor:
    """The noise of pictures with these seeds."""
    shape = (1, 32, HEIGHT // 32, WIDTH // 32)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def encoded(pipeline: SanaPipeline, picture: Image.Image) -> Tensor:
    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    return pipeline.autoencoder.encode(image) * pipeline.autoencoder.config.latent_scale


def picture(seed: int = 0) -> Image.Image:
    """Smooth coloured noise."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def half_mask() -> Image.Image:
    """White, to be painted anew, in the right two thirds: two of three columns of the latent."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (32, 0, WIDTH, HEIGHT))
    return mask


STARTS = {
    "noise": {},
    "picture": {"image": picture(), "strength": 0.6},
    "mask": {"image": picture(), "mask": half_mask()},
}
