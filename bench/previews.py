"""How good linear previews are: python -m bench.previews. Writes results/previews.json.

Held-out captions are drawn by the demo model; each preview is compared with the decoded picture, shrunk to its size.
"""

import argparse

import torch
from torch.nn import functional as F

from sana.config import DOWNSAMPLE
from sana.networks.previews import SIDE, fit_preview
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.training.scenes import held_out_scenes

from .demo import latents
from .machine import write_result


@torch.no_grad()
def measure(pipeline: SanaPipeline, captions: int) -> dict[str, object]:
    """PSNR in dB of every preview, and of the cells' mean colours: what one colour a cell could reach at best."""
    autoencoder, scale = pipeline.autoencoder, pipeline.autoencoder.config.latent_scale
    preview = fit_preview(lambda image: autoencoder.encode(image) * scale)
    found: dict[str, list[float]] = {"linear": [], "one_colour": []}
    for latent in latents(pipeline, held_out_scenes(captions, seed=0), Settings()):
        picture = autoencoder.decode(latent[None] / scale).clamp(-1, 1)
        small = F.avg_pool2d(picture, DOWNSAMPLE // SIDE)
        cells = F.interpolate(F.avg_pool2d(picture, DOWNSAMPLE), scale_factor=SIDE)
        for name, shown in (("linear", preview(latent[None])), ("one_colour", cells)):
            found[name].append(float(-10 * torch.log10((shown - small).square().mean() / 4)))
    return {
        "captions": captions,
        **{name: {"mean": sum(each) / len(each), "worst": min(each)} for name, each in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.previews", description=__doc__)
    parser.add_argument("--captions", type=int, default=100)
    options = parser.parse_args()
    print(write_result("previews", measure(SanaPipeline.load("demo"), options.captions)))


if __name__ == "__main__":
    main()
