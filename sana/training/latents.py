"""Latents computed once, before a transformer is trained on them for many epochs."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..config import DOWNSAMPLE, LATENT_CHANNELS
from ..images import to_unit
from ..networks.autoencoder import DCAutoencoder
from ..saving import replacing
from .flow import FlowBatch
from .folder import read_computed
from .scenes import KIND_SHARE, RESOLUTIONS, Kind, Resolution, Scene, caption, draw, sample_scene


@dataclass(frozen=True)
class SceneLatents:
    """Latents of drawn training scenes. The scenes themselves are drawn from their number, so only latents are stored."""

    latents: dict[Resolution, Tensor]  # by (height, width) px, each (N, 32, H, W)
    seed: int

    @classmethod
    def prepare(
        cls, autoencoder: DCAutoencoder, path: Path, *, count: int, seed: int, device: torch.device
    ) -> "SceneLatents":
        """Read the file at path, or encode `count` scenes of each resolution and write it."""
        if not path.exists():
            encoded = {size_name(size): encode_scenes(autoencoder, size, count, seed, device) for size in RESOLUTIONS}
            with replacing(path) as unfinished:
                save_file(encoded, unfinished)
        shapes = {
            size_name(size): (count, LATENT_CHANNELS, size[0] // DOWNSAMPLE, size[1] // DOWNSAMPLE)
            for size in RESOLUTIONS
        }
        found = read_computed(path, shapes)
        return cls({size: found[size_name(size)] for size in RESOLUTIONS}, seed)

    @cached_property
    def numbers(self) -> dict[Resolution, dict[Kind, list[int]]]:
        """The numbers of the scenes of each kind."""
        found = {resolution: defaultdict(list) for resolution in self.latents}
        for resolution, latents in self.latents.items():
            for number in range(len(latents)):
                found[resolution][numbered_scene(self.seed, number, resolution).kind].append(number)
        return found

    def batch(
        self,
        step: int,
        process: int,
        *,
        size: int,
        shares: Mapping[Kind, float] = KIND_SHARE,
        layout_share: float = 0.0,
    ) -> FlowBatch:
        """Random scenes of one resolution, of every kind about the given share, with a random phrasing of each."""
        resolution = RESOLUTIONS[step % len(RESOLUTIONS)]
        rng = np.random.default_rng([self.seed, 1, step, process])
        by_kind = self.numbers[resolution]
        weights = np.array([shares[kind] for kind in by_kind])
        kinds = rng.choice(list(by_kind), size=size, p=weights / weights.sum())
        chosen = [by_kind[kind][rng.integers(len(by_kind[kind]))] for kind in kinds]
        captions = [caption(numbered_scene(self.seed, number, resolution), rng) for number in chosen]
        latents = self.latents[resolution][torch.tensor(chosen)].float()
        return FlowBatch(latents, captions, seed=int(rng.integers(2**31)), layout_share=layout_share)


def numbered_scene(seed: int, number: int, resolution: Resolution) -> Scene:
    """The training scene of this number."""
    return sample_scene(np.random.default_rng([seed, 0, number, *resolution]), "train", *resolution)


@torch.no_grad()
def encode_scenes(
    autoencoder: DCAutoencoder,
    resolution: Resolution,
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


def size_name(size: Resolution) -> str:
    return f"{size[0]}x{size[1]}"


def _chunks(count: int, batch: int) -> Iterator[range]:
    for start in range(0, count, batch):
        yield range(start, min(start + batch, count))
