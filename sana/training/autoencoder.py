"""Training of a DC-AE by reconstruction: images in, the same images out, through 32 numbers per 32x32 px."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..config import DOWNSAMPLE
from ..images import to_pixels, to_unit
from ..networks.autoencoder import DCAutoencoder
from .scenes import RESOLUTIONS, draw, sample_scene


@dataclass(frozen=True)
class ImageBatch:
    images: Tensor  # (B, 3, height, width) in [-1, 1]
    seed: int  # of the noise on the latents

    def __len__(self) -> int:
        return len(self.images)


class ReconstructionObjective(nn.Module):
    """Pixel and edge errors, and latents that suit a diffusion model.

    latent_noise: largest standard deviation of noise on the scaled latents, so that the decoder forgives small errors of
    the transformer. moments_weight: of the pull of every latent channel to mean 0 and standard deviation 1 after scaling.
    """

    def __init__(self, autoencoder: DCAutoencoder, latent_noise: float = 0.15, moments_weight: float = 0.02) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_noise = latent_noise
        self.moments_weight = moments_weight

    def forward(self, batch: ImageBatch) -> Tensor:
        scale = self.autoencoder.config.latent_scale
        images = batch.images.to(next(self.parameters()).device)
        latent = self.autoencoder.encoder(images).float() * scale
        generator = torch.Generator(latent.device).manual_seed(batch.seed)
        strength = torch.rand(len(latent), 1, 1, 1, generator=generator, device=latent.device) * self.latent_noise
        noisy = latent + strength * torch.randn(latent.shape, generator=generator, device=latent.device)
        out = self.autoencoder.decoder(noisy / scale).float()
        return reconstruction_error(out, images) + self.moments_weight * moments_error(latent)


def reconstruction_error(out: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared errors of pixels, and absolute errors of differences between neighbouring pixels."""
    error = out - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 5.0 * error.square().mean() + edges


def moments_error(latent: Tensor) -> Tensor:
    """Squared distance of every channel of a scaled latent (B, C, H, W) from mean 0 and standard deviation 1."""
    deviation, mean = torch.std_mean(latent, dim=(0, 2, 3))
    return mean.square().mean() + (deviation - 1).square().mean()


def initialise(network: nn.Module, seed: int) -> None:
    """Weights to start from: fan-in scaled for layers, ones and zeros for norms, and small outputs of residual branches."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("weight"):
            nn.init.constant_(parameter, 0.5 if ".norm" in name else 1.0)
        else:
            nn.init.zeros_(parameter)


def whole_scenes(step: int, process: int, *, size: int, seed: int = 1) -> ImageBatch:
    """A batch of drawn training scenes, of one resolution."""
    rng = np.random.default_rng([seed, step, process])
    resolution = RESOLUTIONS[step % len(RESOLUTIONS)]
    return ImageBatch(
        to_unit(np.stack([draw(sample_scene(rng, "train", *resolution)) for _ in range(size)])), seed=step
    )


def scene_crops(step: int, process: int, *, size: int, side: int, seed: int = 1) -> ImageBatch:
    """A batch of squares, `side` px, each with at least a corner of a thing: most of a whole scene is background.

    They are cut at multiples of DOWNSAMPLE, where the cells of a latent begin.
    """
    rng = np.random.default_rng([seed, step, process])
    resolution = RESOLUTIONS[step % len(RESOLUTIONS)]
    crops = []
    for _ in range(size):
        scene = sample_scene(rng, "train", *resolution)
        thing = scene.things[int(rng.integers(len(scene.things)))]
        corner = []
        for start, length in ((thing.top, scene.height), (thing.left, scene.width)):
            low, high = max(0, start - side + 16), min(length - side, start + thing.extent - 16)
            corner.append(DOWNSAMPLE * int(rng.integers(-(-low // DOWNSAMPLE), high // DOWNSAMPLE, endpoint=True)))
        crops.append(draw(scene)[corner[0] : corner[0] + side, corner[1] : corner[1] + side])
    return ImageBatch(to_unit(np.stack(crops)), seed=step)


def reconstruction_sheet(objective: nn.Module, batch: ImageBatch) -> Image.Image:
    """Originals above, reconstructions below."""
    autoencoder = objective.autoencoder
    images = batch.images.to(next(autoencoder.parameters()).device)
    with torch.no_grad():
        out = autoencoder.decode(autoencoder.encode(images))
    rows = [np.concatenate(list(to_pixels(row)), axis=1) for row in (images, out)]
    return Image.fromarray(np.concatenate(rows, axis=0))
