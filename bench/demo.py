"""How well the demo model draws what it is told: python -m bench.demo. Writes results/demo.json.

Every picture is of a held-out caption, whose combination never occurred in training, or of one with a word changed, and is read
by `scene_reader`.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sana.config import DEFAULT_GUIDANCE_SCALE
from sana.images import to_pixels, to_unit
from sana.pipeline import SanaPipeline
from sana.plan import DEFAULT_STEPS, Settings
from sana.training.scenes import COLOURS, SHAPES, CaptionedScene, Scene, draw, held_out_scenes, plural_ending

from .machine import write_result
from .scene_reader import Judgement, judge

BATCH = 20
STEPS = (4, 8, 14, 20, 28, 50)
REFERENCE_STEPS = 200
SOLVERS = ("flow_dpm", "flow_euler")
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.5)
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above", "over": "under", "under": "over"}
CHANGES = ("colour", "shape", "relation")  # words to change


@dataclass(frozen=True)
class Numbers:
    """How many captions each measurement takes."""

    captions: int = 300
    step_captions: int = 100  # for each number of steps
    error_captions: int = 30  # with REFERENCE_STEPS


def measure(pipeline: SanaPipeline, numbers: Numbers) -> dict[str, object]:
    """All that the command reports, as JSON values."""
    items, others = (held_out_scenes(numbers.captions, seed=seed) for seed in (0, 1))
    few = items[: numbers.step_captions]
    verdicts = by_guidance(pipeline, items)
    usual = verdicts[f"{pipeline.identity.guidance_scale:g}"]
    return {
        **essentials(pipeline, items, usual),
        "accuracy_by_guidance": shares_right(verdicts),
        "accuracy_by_guidance_of_other_captions": shares_right(by_guidance(pipeline, others)),
        "accuracy_after_changing_one_word": {word: accuracy_of_changed(pipeline, items, word) for word in CHANGES},
        "step_captions": len(few),
        "error_captions": numbers.error_captions,
        "steps": steps_table(pipeline, few, numbers.error_captions, STEPS),
        "steps_with_guidance_of_released_models": steps_table(
            pipeline, few, numbers.error_captions, STEPS[:4], DEFAULT_GUIDANCE_SCALE
        ),
    }


def measure_briefly(pipeline: SanaPipeline, captions: int) -> dict[str, object]:
    """The part of `measure` that says how good a model is, in a tenth of the time."""
    items = held_out_scenes(captions, seed=0)
    return essentials(pipeline, items, judgements(pipeline, items, latents(pipeline, items, Settings())))


def essentials(
    pipeline: SanaPipeline, items: Sequence[CaptionedScene], verdicts: Sequence[Judgement]
) -> dict[str, object]:
    """The autoencoder, and the accuracy of pictures drawn with the model's own guidance."""
    return {
        "captions": len(items),
        "guidance_scale": pipeline.identity.guidance_scale,
        "autoencoder_psnr_db": round(reconstruction_psnr(pipeline, items), 2),
        "accuracy": share_right(verdicts),
        "accuracy_by_kind": shares_right(by_kind(items, verdicts)),
    }


def by_guidance(pipeline: SanaPipeline, items: Sequence[CaptionedScene]) -> dict[str, list[Judgement]]:
    """Verdicts with each of GUIDANCE_SCALES and with the model's own."""
    scales = sorted({*GUIDANCE_SCALES, pipeline.identity.guidance_scale})
    drawn = {scale: latents(pipeline, items, Settings(guidance_scale=scale)) for scale in scales}
    return {f"{scale:g}": judgements(pipeline, items, found) for scale, found in drawn.items()}


def accuracy_of_changed(pipeline: SanaPipeline, items: Sequence[CaptionedScene], word: str) -> dict[str, float]:
    """Accuracy of the captions that have such a word, with the word changed and the seeds as they were."""
    new = [changed(item, word) for item in items]
    drawn = latents(pipeline, [after or before for before, after in zip(items, new, strict=True)], Settings())
    chosen = [(item, latent) for item, latent in zip(new, drawn, strict=True) if item]
    return {"captions": len(chosen), **share_right(judgements(pipeline, *zip(*chosen, strict=True)))}


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


def shares_right(verdicts: Mapping[str, Iterable[Judgement]]) -> dict[str, dict[str, float]]:
    return {name: share_right(chosen) for name, chosen in verdicts.items()}


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
    with tqdm(
        total=len(items), desc=f"{settings.solver}, {settings.steps or DEFAULT_STEPS} steps", unit="picture"
    ) as bar:
        for (height, width), indices in by_size.items():
            for chosen in (indices[start : start + BATCH] for start in range(0, len(indices), BATCH)):
                sized = replace(settings, height=height, width=width, seed=settings.seed + chosen[0])
                for step in pipeline.sample([items[i].caption for i in chosen], sized):
                    last = step.next_x
                found.update(zip(chosen, last, strict=True))
                bar.update(len(chosen))
    return [found[i] for i in range(len(items))]


def steps_table(
    pipeline: SanaPipeline,
    items: Sequence[CaptionedScene],
    error_captions: int,
    numbers: Sequence[int],
    guidance_scale: float | None = None,
) -> list[dict[str, object]]:
    """Accuracy by solver and number of steps, and relative distance of the first latents to Flow-DPM-Solver's of many."""
    settings = Settings(guidance_scale=guidance_scale)
    exact = latents(pipeline, items[:error_captions], replace(settings, steps=REFERENCE_STEPS))
    rows = []
    for solver in SOLVERS:
        for steps in numbers:
            found = latents(pipeline, items, replace(settings, steps=steps, solver=solver))
            errors = [float((x - y).norm() / y.norm()) for x, y in zip(found[:error_captions], exact, strict=True)]
            row = {"solver": solver, "steps": steps, "median_error": round(float(np.median(errors)), 5)}
            rows.append({**row, **share_right(judgements(pipeline, items, found))})
    return rows


def changed(item: CaptionedScene, word: str) -> CaptionedScene | None:
    """The caption with its colour, shape or relation word changed, and what it then asks for; None if it has no such word.

    Colours and shapes are those of single things and of counts. The new combination may be one of the training.
    """
    scene, look = item.scene, item.scene.things[0].look
    if word == "relation":
        found = re.search(rf"\b({'|'.join(OPPOSITES)})\b", item.caption)
        if not found:
            return None
        text = item.caption[: found.start()] + OPPOSITES[found[0]] + item.caption[found.end() :]
        return CaptionedScene(replace(scene, things=scene.things[::-1]), text)
    if scene.kind not in ("single", "count"):
        return None
    old, names = getattr(look, word), list(COLOURS) if word == "colour" else SHAPES
    new = names[(names.index(old) + 3) % len(names)]
    things = tuple(replace(thing, look=replace(look, **{word: new})) for thing in scene.things)
    text = re.sub(rf"\b{old}(es|s)?\b", lambda end: new + plural_ending(new) if end[1] else new, item.caption, count=1)
    return CaptionedScene(replace(scene, things=things), with_articles(text))


def with_articles(text: str) -> str:
    """The text with "a" or "an" as the next letter asks for."""
    return re.sub(r"\ban? (\w)", lambda found: ("an " if found[1] in "aeiou" else "a ") + found[1], text)


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    for name, value in vars(Numbers()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--model", default="demo", help="checkpoint folder (default: demo)")
    parser.add_argument("--brief", action="store_true", help="the autoencoder and the accuracy alone, in a few minutes")
    parser.add_argument("--sheet", type=Path, help="write a sheet of pictures here instead of measuring")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: the one in results/ that docs/demo-model.md shows)"
    )
    options = parser.parse_args()
    pipeline = SanaPipeline.load(options.model)
    if options.sheet:
        print("\n".join(draw_sheet(pipeline, options.sheet)))
        return
    if options.brief:
        result = measure_briefly(pipeline, options.captions)
        print(write_result("demo-brief", result, options.out))
        return
    result = measure(pipeline, Numbers(**{name: getattr(options, name) for name in vars(Numbers())}))
    print(write_result("demo", result, options.out), "(python -m bench.tables writes its tables)", sep="\n")


if __name__ == "__main__":
    main()
