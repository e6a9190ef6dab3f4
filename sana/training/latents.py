"""Latents computed once, before a transformer is trained on them for many epochs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..autoencoder import DCAutoencoder
from .autoencoder import to_unit
from .flow import FlowBatch
from .scenes import RESOLUTIONS, Scene, caption, draw, sample_scene


@dataclass(frozen=True)
class SceneLatents:
    """Latents of drawn training scenes. The scenes themselves are drawn from their number, so only latents are stored."""

    latents: dict[tuple[int, int], Tensor]  # by (height, width) px, each (N, 32, H, W)
    seed: int

    @classmethod
    def prepare(
        cls, autoencoder: DCAutoencoder, path: Path, *, count: int, seed: int, device: torch.device
    ) -> "SceneLatents":
        """Read the file at path, or encode `count` scenes of each resolution and write it."""
        if not path.exists():
            encoded = {size_name(size): encode_scenes(autoencoder, size, count, seed, device) for size in RESOLUTIONS}
            save_file(encoded, path)
        with safe_open(path, framework="pt") as file:
            return cls({size: file.get_tensor(size_name(size)) for size in RESOLUTIONS}, seed)

    def batch(self, step: int, process: int, *, size: int) -> FlowBatch:
        """Random scenes of one resolution, with a random phrasing of each."""
        resolution = RESOLUTIONS[step % len(RESOLUTIONS)]
        stored = self.latents[resolution]
        rng = np.random.default_rng([self.seed, 1, step, process])
        chosen = rng.integers(len(stored), size=size)
        captions = [caption(numbered_scene(self.seed, int(i), resolution), rng) for i in chosen]
        return FlowBatch(stored[torch.from_numpy(chosen)].float(), captions, seed=int(rng.integers(2**31)))


def numbered_scene(seed: int, number: int, resolution: tuple[int, int]) -> Scene:
    """The training scene of this number."""
    return sample_scene(np.random.default_rng([seed, 0, number, *resolution]), "train", *resolution)


@torch.no_grad()
def encode_scenes(
    autoencoder: DCAutoencoder,
    resolution: tuple[int, int],
    count: int,
    seed: int,
    device: torch.device,
    batch: int = 32,
) -> Tensor:
    """Scaled latents (count, 32, H, W) float16 of the first `count` scenes of a resolution."""
    parts = []
    for numbers in tqdm(list(_chunks(count, batch)), desc=f"encoding {size_name(resolution)}"):
        pictures = np.stack([draw(numbered_scene(seed, number, resolution)) for number in numbers])
        with torch.autocast(device.type, torch.bfloat16):
            latents = autoencoder.encode(to_unit(pictures).to(device)) * autoencoder.config.latent_scale
        parts.append(latents.half().cpu())
    return torch.cat(parts)


def size_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _chunks(count: int, batch: int) -> Iterator[range]:
    for start in range(0, count, batch):
        yield range(start, min(start + batch, count))
