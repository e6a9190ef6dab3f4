"""Pictures with captions to train on."""

from pathlib import Path

import numpy as np
from PIL import Image

from sana.training.scenes import caption, draw, sample_scene


def draw_pictures(folder: Path, count: int) -> None:
    """Drawn scenes of two shapes in turn, as 0.png with 0.txt and so on."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        scene = sample_scene(rng, "train", *((256, 256), (192, 320))[i % 2])
        Image.fromarray(draw(scene)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption(scene, rng))
