"""How well the demo model draws what it is told: python -m bench.demo. Writes results/demo.json.

Every picture is of a held-out caption, whose combination never occurred in training, and is read by `scene_reader`.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sana.images import to_pixels, to_unit
from sana.pipeline import SanaPipeline, Settings
from sana.training.scenes import COLOURS, CaptionedScene, Scene, draw, held_out_scenes

from .machine import write_result
from .scene_reader import Judgement, judge

BATCH = 20
STEPS = (4, 8, 14, 20, 28, 50)
REFERENCE_STEPS = 200
SOLVERS = ("flow_dpm", "flow_euler")
GUIDANCE_SCALES = (1.0, 1.5, 3.0, 4.5)  # beside the default


@dataclass(frozen=True)
class Numbers:
    """How many captions each measurement takes."""

    captions: int = 300
    step_captions: int = 100  # for each number of steps
    error_captions: int = 30  # with REFERENCE_STEPS


def measure(pipeline: SanaPipeline, numbers: Numbers) -> dict[str, object]:
    """All that the command reports, as JSON values."""
    items = held_out_scenes(numbers.captions, seed=0)
    few = items[: numbers.step_captions]
    verdicts = judgements(pipeline, items, latents(pipeline, items, Settings()))
    return {
        "captions": len(items),
        "autoencoder_psnr_db": round(reconstruction_psnr(pipeline, items), 2),
        "accuracy": share_right(verdicts),
        "accuracy_by_kind": {kind: share_right(chosen) for kind, chosen in by_kind(items, verdicts).items()},
        **{
            f"accuracy_with_guidance_{scale:g}": accuracy(pipeline, items, Settings(guidance_scale=scale))
            for scale in GUIDANCE_SCALES
        },
        "accuracy_after_changing_one_word": accuracy(pipeline, list(recoloured(items)), Settings()),
        "step_captions": len(few),
        "error_captions": numbers.error_captions,
        "steps": steps_table(pipeline, few, numbers.error_captions),
    }


def accuracy(pipeline: SanaPipeline, items: Sequence[CaptionedScene], settings: Settings) -> dict[str, float]:
    """`share_right` of what the model draws."""
    return share_right(judgements(pipeline, items, latents(pipeline, items, settings)))


def judgements(pipeline: SanaPipeline, items: Sequence[CaptionedScene], drawn: Sequence[Tensor]) -> list[Judgement]:
    """What is right in the picture of each latent."""
    pairs = zip(items, drawn, strict=True)
    return [judge(item.scene, pipeline.pictures(latent[None])[0]) for item, latent in pairs]


def share_right(verdicts: Iterable[Judgement]) -> dict[str, float]:
    """Share that is right in each respect, in percent; a respect counts where the caption speaks of it."""
    found = defaultdict(list)
    for verdict in verdicts:
        for name, right in [*asdict(verdict).items(), ("everything", verdict.right)]:
            if right is not None:
                found[name].append(right)
    return {name: round(100 * float(np.mean(rights)), 1) for name, rights in found.items()}


def by_kind(items: Sequence[CaptionedScene], verdicts: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    """Verdicts by relation, or by kind of scene where there is none."""
    found = defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        found[item.scene.relation or item.scene.kind].append(verdict)
    return dict(found)


def latents(pipeline: SanaPipeline, items: Sequence[CaptionedScene], settings: Settings) -> list[Tensor]:
    """The latent (32, H, W) of every caption. The k-th of a batch of one size has the seed of the batch, its first number, + k."""
    found: dict[int, Tensor] = {}
    by_size = defaultdict(list)
    for i, item in enumerate(items):
        by_size[item.scene.height, item.scene.width].append(i)
    with tqdm(total=len(items), desc=f"{settings.solver}, {settings.steps or 20} steps", unit="picture") as bar:
        for (height, width), indices in by_size.items():
            for chosen in (indices[start : start + BATCH] for start in range(0, len(indices), BATCH)):
                sized = replace(settings, height=height, width=width, seed=settings.seed + chosen[0])
                for step in pipeline.sample([items[i].caption for i in chosen], sized):
                    last = step.next_x
                found.update(zip(chosen, last, strict=True))
                bar.update(len(chosen))
    return [found[i] for i in range(len(items))]


def steps_table(
    pipeline: SanaPipeline, items: Sequence[CaptionedScene], error_captions: int
) -> list[dict[str, object]]:
    """Accuracy, and relative distance of the first latents to those of many steps, by solver and number of steps."""
    exact = latents(pipeline, items[:error_captions], Settings(steps=REFERENCE_STEPS))
    rows = []
    for solver in SOLVERS:
        for steps in STEPS:
            settings = Settings(steps=steps, solver=solver)
            found = latents(pipeline, items, settings)
            errors = [float((x - y).norm() / y.norm()) for x, y in zip(found[:error_captions], exact, strict=True)]
            row = {"solver": solver, "steps": steps, "median_error": round(float(np.median(errors)), 4)}
            rows.append({**row, **share_right(judgements(pipeline, items, found))})
    return rows


def recoloured(items: Iterable[CaptionedScene]) -> Iterator[CaptionedScene]:
    """Single things and counts in another colour: the caption changes by one word, and the picture must follow."""
    names = list(COLOURS)
    for item in items:
        old = item.scene.things[0].look.colour
        if item.scene.kind not in ("single", "count") or old not in item.caption:
            continue
        new = names[(names.index(old) + 3) % len(names)]
        things = tuple(replace(thing, look=replace(thing.look, colour=new)) for thing in item.scene.things)
        yield CaptionedScene(replace(item.scene, things=things), re.sub(rf"\b{old}\b", new, item.caption, count=1))


def reconstruction_psnr(pipeline: SanaPipeline, items: Sequence[CaptionedScene]) -> float:
    """Mean peak signal-to-noise ratio in dB of drawn scenes that went through the autoencoder."""
    autoencoder = pipeline.autoencoder
    found = [psnr(draw(item.scene), reconstruct(autoencoder, item.scene)) for item in tqdm(items, desc="autoencoder")]
    return float(np.mean(found))


@torch.no_grad()
def reconstruct(autoencoder: torch.nn.Module, scene: Scene) -> np.ndarray:
    return to_pixels(autoencoder.decode(autoencoder.encode(to_unit(draw(scene)[None]))))[0]


def psnr(expected: np.ndarray, found: np.ndarray) -> float:
    """dB between two pictures (height, width, 3) uint8."""
    error = np.square(expected.astype(np.float64) - found).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def draw_sheet(pipeline: SanaPipeline, path: Path, columns: int = 6, rows: int = 3) -> list[str]:
    """The first held-out captions with seeds 0, 1, 2, ..., uncurated, as one picture. Returns the captions."""
    items = [item for item in held_out_scenes(6 * columns * rows, seed=0) if item.scene.height == item.scene.width]
    items = items[: columns * rows]
    side = items[0].scene.width
    sheet = Image.new("RGB", (columns * side, rows * side))
    for k, latent in enumerate(latents(pipeline, items, Settings())):
        sheet.paste(pipeline.pictures(latent[None])[0], (k % columns * side, k // columns * side))
    sheet.save(path, quality=90)
    return [item.caption for item in items]


def print_tables(result: dict[str, object]) -> None:
    """As Markdown."""
    print(f"\nAutoencoder: {result['autoencoder_psnr_db']} dB\n")
    names = [name for name in result if name.startswith("accuracy") and name != "accuracy_by_kind"]
    columns = list(result["accuracy"])
    print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    rows = {name.replace("_", " "): result[name] for name in names} | result["accuracy_by_kind"]
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(str(row.get(c, '')) for c in columns)} |")
    columns = list(result["steps"][0])
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in result["steps"]:
        print(f"| {' | '.join(str(row[c]) for c in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    for name, value in vars(Numbers()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--model", default="demo", help="checkpoint folder (default: demo)")
    parser.add_argument("--sheet", type=Path, help="write a sheet of pictures here instead of measuring")
    options = parser.parse_args()
    pipeline = SanaPipeline.load(options.model)
    if options.sheet:
        print("\n".join(draw_sheet(pipeline, options.sheet)))
        return
    result = measure(pipeline, Numbers(**{name: getattr(options, name) for name in vars(Numbers())}))
    print_tables(result)
    print(write_result("demo", result))


if __name__ == "__main__":
    main()
