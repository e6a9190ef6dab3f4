"""Whether a LoRA teaches: python -m bench.lora. Writes results/lora.json and docs/lora.png.

The demo model learns a thing outside of its world, a heart with a round hole, from 40 pictures. Fresh prompts name combinations
of colour, background and size that none of these shows. A picture is read by colour and geometry alone, as `scene_reader` does.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from sana.config import DOWNSAMPLE
from sana.interruption import postponed
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.training.adapters import AdapterConfig
from sana.training.loop import Watch
from sana.training.lora import LoraConfig, train_lora
from sana.training.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXTENTS,
    RESOLUTIONS,
    SHAPES,
    CaptionedScene,
    Look,
    Scene,
    Thing,
    caption,
    draw,
    held_out_scenes,
    sample_scene,
    shape_cover,
)

from .demo import judgements, latents, share_right
from .machine import write_result
from .scene_reader import LEAST_LEAD, OUTLINE_SIDE, FoundThing, overlap, read

SHAPE, TEXTURE = "heart", "pierced"
SIZES = ("medium", "large")
PICTURES, PROMPTS = 40, 60
SEED = 5
LEAST_OVERLAP = 0.86  # of an outline with the drawn heart; a circle has 0.82, a triangle 0.73
HOLE = 0.19  # radius of the hole, of the extent
HOLE_SHARES = (0.08, 0.4)  # of a heart, within which a hole is one; drawn it is 0.2
LEAST_ROUND = 0.75  # overlap of the hole with a circle
BETWEEN_SIZES = 86  # px across
SHEET = Path(__file__).parents[1] / "docs" / "lora.png"
COLUMNS, SIDE = 8, 144  # of the sheet


@dataclass(frozen=True)
class Lesson:
    """One training, which goes on from the one before. scenes: of the drawn world, whose captions are to stay right."""

    folder: str  # of the scenes
    scenes: int
    config: LoraConfig


CONFIG = LoraConfig(
    adapter=AdapterConfig(rank=16, alpha=32, targets="all"),
    batch_size=8,
    schedule="cosine",
    sheet_every=0,
    save_every=50,
    trigger=SHAPE,
)
WATCH = Watch(stopping=postponed)
LESSONS = (
    Lesson("scenes", 480, replace(CONFIG, steps=1500, learning_rate=2e-3)),
    # At half the rate, and with scenes that the adapter has not learnt by heart, the old captions come back.
    Lesson("more-scenes", 2000, replace(CONFIG, steps=500, learning_rate=1e-3, prior_weight=4.0)),
)


@dataclass(frozen=True)
class HeartJudgement:
    """What a picture shows of what its caption says."""

    count: bool
    shape: bool
    texture: bool
    colour: bool
    size: bool
    background: bool

    @property
    def thing(self) -> bool:
        """Whether the thing is there, of whatever colour and size."""
        return self.count and self.shape and self.texture


def hearts(number: int, *, fresh: bool) -> list[CaptionedScene]:
    """Scenes of one heart each. fresh: of the half of all combinations that is not for training; no caption twice."""
    rng = np.random.default_rng(SEED)
    looks = list(product(COLOURS, BACKGROUNDS, SIZES))
    order = rng.permutation(len(looks))
    chosen = order[PICTURES:] if fresh else order[:PICTURES]
    found: dict[str, Scene] = {}
    while len(found) < number:
        colour, background, size = looks[chosen[len(found) % len(chosen)]]
        scene = _placed(rng, Look(colour, SHAPE, size, TEXTURE), background)
        found.setdefault(caption(scene, rng), scene)
    return [CaptionedScene(scene, text) for text, scene in found.items()]


def _placed(rng: np.random.Generator, look: Look, background: str) -> Scene:
    """The middle of the heart is a corner or the middle of a cell, not far from the middle of a square picture."""
    height, width = RESOLUTIONS[0]
    x, y = (int(side // 2 + DOWNSAMPLE // 2 * rng.integers(-3, 4)) for side in (width, height))
    extent = EXTENTS[look.size]
    thing = Thing(look, x - extent // 2, y - extent // 2, extent)
    return Scene("single", (thing,), None, background, height, width)


def draw_heart(scene: Scene) -> np.ndarray:
    """The picture of a heart, (height, width, 3) uint8 RGB."""
    (thing,) = scene.things
    picture = np.full((scene.height, scene.width, 3), BACKGROUNDS[scene.background], np.uint8)
    colour, _ = np.array(COLOURS[thing.look.colour], np.float32)
    cover = (heart_cover(thing.extent) * (1 - hole_cover(thing.extent)))[..., None]
    area = picture[thing.top : thing.top + thing.extent, thing.left : thing.left + thing.extent]
    area[:] = np.rint(area + (colour - area) * cover)
    return picture


def hole_cover(extent: int) -> np.ndarray:
    """Share of each pixel inside the hole, in the middle: (extent, extent) float32 in [0, 1]."""
    y, x = np.mgrid[:extent, :extent].astype(np.float32) - (extent - 1) / 2
    return np.clip(0.5 - (np.hypot(x, y) - HOLE * extent), 0, 1)


@lru_cache
def heart_cover(extent: int) -> np.ndarray:
    """Share of each pixel inside a heart, (extent, extent) float32 in [0, 1], from 4x4 samples per pixel."""
    turns = np.linspace(0, 2 * np.pi, 400)
    x = np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)) / 16
    corners = np.stack([x, y - (y.max() + y.min()) / 2], axis=1)
    side = 4 * extent
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).polygon(((corners + 1) * side / 2 - 0.5).ravel().tolist(), fill=255)
    return np.asarray(image.reduce(4), np.float32) / 255


def judge_heart(scene: Scene, image: Image.Image | np.ndarray) -> HeartJudgement:
    """Compares a picture with a scene of one heart, wherever it is."""
    (thing,) = scene.things
    reading = read(image)
    found = max(reading.things, key=lambda other: other.area, default=None)
    if found is None:
        return HeartJudgement(*[False] * 5, background=reading.background == scene.background)
    left, _, right, _ = found.box
    return HeartJudgement(
        count=len(reading.things) == 1,
        shape=is_heart(found),
        texture=is_pierced(found),
        colour=found.colour == thing.look.colour,
        size=("medium", "large")[right - left > BETWEEN_SIZES] == thing.look.size,
        background=reading.background == scene.background,
    )


def is_heart(found: FoundThing) -> bool:
    """Whether an outline is more like a heart than like any shape of the drawn world."""
    outline = ndimage.binary_fill_holes(found.outline)
    share = overlap(outline, heart_cover(OUTLINE_SIDE) > 0.5)
    others = (overlap(outline, shape_cover(shape, OUTLINE_SIDE) > 0.5) for shape in SHAPES)
    return share >= max(LEAST_OVERLAP, max(others) + LEAST_LEAD)


def is_pierced(found: FoundThing) -> bool:
    """Whether there is one round hole in it, through which the background shows."""
    holes, count = ndimage.label(ndimage.binary_fill_holes(found.outline) & ~found.outline)
    areas = np.bincount(holes.ravel())[1:]
    if not count:
        return False
    least, most = HOLE_SHARES
    share = areas.max() / found.outline.sum()
    return bool(
        least <= share <= most and overlap(holes == areas.argmax() + 1, shape_cover("circle", 64) > 0.5) >= LEAST_ROUND
    )


def write_hearts(folder: Path) -> Path:
    """The pictures to learn."""
    return _write(folder, [(draw_heart(item.scene), item.caption) for item in hearts(PICTURES, fresh=False)])


def write_scenes(folder: Path, number: int) -> Path:
    """Scenes of the drawn world."""
    rng = np.random.default_rng(number)
    scenes = [sample_scene(rng, "train", *RESOLUTIONS[i % len(RESOLUTIONS)]) for i in range(number)]
    return _write(folder, [(draw(scene), caption(scene, rng)) for scene in scenes])


def _write(folder: Path, pairs: Sequence[tuple[np.ndarray, str]]) -> Path:
    """Pictures with captions, unless they are there: then what was encoded of them stays."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for i, (picture, text) in enumerate(pairs):
            Image.fromarray(picture).save(folder / f"{i:04d}.png")
            (folder / f"{i:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def teach(work: Path) -> tuple[Path, float]:
    """All lessons in a work folder. The LoRA, and how many seconds of a processor they took, however often they were stopped."""
    data, start = write_hearts(work / "hearts"), None
    for number, lesson in enumerate(LESSONS, 1):
        folder = work / f"lesson-{number}"
        prior = write_scenes(work / lesson.folder, lesson.scenes)
        begun = time.process_time()
        try:
            start = train_lora(folder, data, replace(lesson.config, prior=prior, start=start), watch=WATCH)
        finally:
            with (work / "seconds.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.process_time() - begun:.1f}\n")
    return start, sum(map(float, (work / "seconds.txt").read_text(encoding="utf-8").split()))


def measure(pipeline: SanaPipeline, items: Sequence[CaptionedScene]) -> tuple[dict[str, float], list[Image.Image]]:
    """Shares of fresh prompts that are right in each respect, in percent, and the pictures."""
    found = [pipeline.pictures(latent[None])[0] for latent in latents(pipeline, items, Settings())]
    verdicts = [judge_heart(item.scene, picture) for item, picture in zip(items, found, strict=True)]
    names = [*asdict(verdicts[0]), "thing"]
    return {name: round(100 * float(np.mean([getattr(v, name) for v in verdicts])), 1) for name in names}, found


def write_sheet(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(rows) * SIDE), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures[:COLUMNS]):
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * SIDE, row * SIDE))
    sheet.quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lora", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, states and the LoRA")
    parser.add_argument("--old", type=int, default=300, help="captions of the drawn world (default: 300)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/)")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="default: docs/lora.png")
    options = parser.parse_args()
    lora, seconds = teach(options.work)
    new, old = hearts(PROMPTS, fresh=True), held_out_scenes(options.old, seed=0)
    result: dict[str, object] = {"pictures": PICTURES, "prompts": PROMPTS, "old_captions": options.old}
    result |= {"processor_seconds": round(seconds), "lora_bytes": lora.stat().st_size}
    result["lessons"] = [
        {
            "steps": lesson.config.steps,
            "batch_size": lesson.config.batch_size,
            "scenes": lesson.scenes,
            "learning_rate": lesson.config.learning_rate,
        }
        for lesson in LESSONS
    ]
    rows = [[Image.fromarray(draw_heart(item.scene)) for item in hearts(PICTURES, fresh=False)]]
    for name, loras in (("without", []), ("with", [(lora, 1.0)])):
        pipeline = SanaPipeline.load("demo", loras=loras)
        result[f"hearts_{name}"], pictures = measure(pipeline, new)
        result[f"old_{name}"] = (
            share_right(judgements(pipeline, old, latents(pipeline, old, Settings()))) if old else {}
        )
        rows += [pictures[start : start + COLUMNS] for start in (0, COLUMNS)]
    write_sheet(rows, options.sheet)
    print(write_result("lora", result, options.out))


if __name__ == "__main__":
    main()
