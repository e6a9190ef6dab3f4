"""Whether choosing captions by score teaches faster when some are wrong: python -m bench.captions. Writes results/captions.json.

The demo model learns other words: in all captions here, each colour goes by the name of the next one in `COLOURS`. Pictures of
the drawn world have four captions each, of which two say something wrong. A LoRA learns from them, on its way held-out captions
are drawn, and the pictures are read as by `bench.demo`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from sana.interruption import postponed
from sana.pipeline import SanaPipeline
from sana.plan import Settings
from sana.saving import write_json
from sana.training.adapters import AdapterConfig
from sana.training.captions import LIST, OWN, TURN, Caption, Choice
from sana.training.loop import Watch
from sana.training.lora import LoraConfig, train_lora
from sana.training.scenes import (
    COLOURS,
    NUMBERS,
    RESOLUTIONS,
    SHAPES,
    CaptionedScene,
    Look,
    Scene,
    caption,
    draw,
    held_out_scenes,
    sample_scene,
)

from .demo import judgements, latents, share_right
from .machine import write_result

KINDS = ("single", "count", "relation")
RIGHT, WRONG = 27.0, 24.0  # mean score of a caption that is right and of one that is not; the usual threshold is 25
CLEAR, NOISY = 1.0, 3.0  # standard deviations of scores around them
NAMES = (OWN, "second", "third", "fourth")  # of the captions of a picture
NEW = dict(zip(COLOURS, [*COLOURS][1:] + [*COLOURS][:1], strict=True))  # word for each colour
READING = r".*attn2\.to_(k|v)|.*caption_projection\.linear_\d"  # layers that see the text
SETTINGS = Settings(steps=8)
WATCH = Watch(stopping=postponed)


@dataclass(frozen=True)
class Numbers:
    """How much is trained and drawn."""

    pictures: int = 120
    captions: int = 40  # held out
    steps: tuple[int, ...] = (75, 150)  # after which they are drawn
    seeds: tuple[int, ...] = (0, 1, 2)  # of pictures, captions, scores and training


@dataclass(frozen=True)
class Trial:
    """Which captions lie beside the pictures, and which of them a step takes.

    kept: "all" captions of a picture, the "first", whatever it says, or the first that is "right". noise: standard deviation of
    the scores, in points; None: they are as far apart as clear ones, but by chance.
    """

    kept: str
    choice: Choice = TURN
    noise: float | None = CLEAR

    @property
    def name(self) -> str:
        if self.choice is TURN:
            return "turn" if self.kept == "all" else self.kept
        scores = {CLEAR: "clear", NOISY: "noisy", None: "useless"}[self.noise]
        return f"{self.choice.way}-{scores}"


TRIALS = (
    *(Trial(kept) for kept in ("right", "first", "all")),
    *(Trial("all", Choice(way), noise) for noise in (CLEAR, NOISY, None) for way in ("best", "score")),
)
CONFIG = LoraConfig(
    adapter=AdapterConfig(rank=16, alpha=32, targets=READING),
    batch_size=8,
    learning_rate=3e-3,
    warmup=20,
    sheet_every=0,
    save_every=1000,
    dtype="float32",
)


@dataclass(frozen=True)
class Told:
    """A picture with its captions, and which of them are right."""

    scene: Scene
    texts: tuple[str, ...]
    right: tuple[bool, ...]


def pictures_to_learn(number: int, seed: int) -> list[Told]:
    """Scenes of the training's part, each with as many captions as NAMES, of which half are right, in any order."""
    rng = np.random.default_rng([seed, 0])
    found = []
    for i in range(number):
        scene = sample_scene(
            rng, "train", *RESOLUTIONS[i % len(RESOLUTIONS)], KINDS[i // len(RESOLUTIONS) % len(KINDS)]
        )
        right = rng.permutation(np.arange(len(NAMES)) % 2 == 0).tolist()
        shown = [scene if each else misdescribed(rng, scene) for each in right]
        found.append(Told(scene, tuple(caption(in_new_words(each), rng) for each in shown), tuple(right)))
    return found


def held_out(number: int) -> list[CaptionedScene]:
    """Of the part that no training sees, with captions in the new words."""
    items = (item for item in held_out_scenes(2 * number, seed=0) if item.scene.kind in KINDS)
    rng = np.random.default_rng(0)
    return [CaptionedScene(item.scene, caption(in_new_words(item.scene), rng)) for item in islice(items, number)]


def in_new_words(scene: Scene) -> Scene:
    """The scene whose caption in the old words is the caption of this one in the new words."""
    return _with_looks(scene, [replace(look, colour=NEW[look.colour]) for look in _looks(scene)])


def misdescribed(rng: np.random.Generator, scene: Scene) -> Scene:
    """Another scene, whose caption is wrong for this one in one respect: a colour, a shape, the count or the places."""
    more = {"single": (), "count": ("count",), "relation": ("places",)}[scene.kind]
    respect = rng.choice(["colour", "shape", *more])
    if respect == "places":
        return replace(scene, things=scene.things[::-1])
    if respect == "count":
        number = rng.choice([number for number in NUMBERS if number != len(scene.things)])
        return replace(scene, things=scene.things[:1] * number)
    looks = _looks(scene)
    known = {getattr(look, respect) for look in looks}
    new = str(rng.choice([name for name in (COLOURS if respect == "colour" else SHAPES) if name not in known]))
    changed = range(len(looks)) if scene.kind == "count" else [rng.integers(len(looks))]
    return _with_looks(
        scene, [replace(look, **{respect: new}) if i in changed else look for i, look in enumerate(looks)]
    )


def _looks(scene: Scene) -> list[Look]:
    return [thing.look for thing in scene.things]


def _with_looks(scene: Scene, looks: Sequence[Look]) -> Scene:
    things = zip(scene.things, looks, strict=True)
    return replace(scene, things=tuple(replace(thing, look=look) for thing, look in things))


def captions_of(trial: Trial, told: Sequence[Told], seed: int) -> list[tuple[Caption, ...]]:
    """What lies beside each picture in a trial, with scores to two digits."""
    rng = np.random.default_rng([seed, 1])
    found = []
    for each in told:
        seen = rng.permutation(each.right) if trial.noise is None else np.array(each.right)
        scores = np.where(seen, RIGHT, WRONG) + rng.normal(0, 1, len(seen)) * (trial.noise or CLEAR)
        captions = [
            Caption(*parts) for parts in zip(NAMES, each.texts, scores.clip(0, 100).round(2).tolist(), strict=True)
        ]
        first = {"first": 0, "right": each.right.index(True)}.get(trial.kept)
        found.append(tuple(captions if first is None else captions[first : first + 1]))
    return found


def share_taken(trial: Trial, told: Sequence[Told], captions: Sequence[tuple[Caption, ...]]) -> float:
    """How many of the captions that steps take are right, in percent, on average."""
    shares = []
    for each, options in zip(told, captions, strict=True):
        weights = np.mean([trial.choice.weights(options, turn) for turn in range(len(options))], axis=0)
        right = dict(zip(NAMES, each.right, strict=True))
        shares.append(sum(weight * right[option.name] for weight, option in zip(weights, options, strict=True)))
    return round(100 * float(np.mean(shares)), 1)


def write_data(folder: Path, told: Sequence[Told], captions: Sequence[tuple[Caption, ...]]) -> Path:
    """Pictures with a list of their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (each, options) in enumerate(zip(told, captions, strict=True)):
        Image.fromarray(draw(each.scene)).save(folder / (name := f"{i:04d}.png"))
        lines += [json.dumps({"picture": name, **option._asdict()}) for option in options]
    (folder / LIST).write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(work: Path, trial: Trial, seed: int, numbers: Numbers) -> dict[str, object]:
    """One training: how many captions it took were right, and how many of the held-out ones are, after each of the steps.

    work: keeps what is done, so that a second call goes on.
    """
    folder = work / f"{seed}-{trial.name}"
    if (done := folder / "result.json").exists():
        return json.loads(done.read_text(encoding="utf-8"))
    told = pictures_to_learn(numbers.pictures, seed)
    captions = captions_of(trial, told, seed)
    data = write_data(work / "data" / f"{seed}-{trial.name}", told, captions)
    items = held_out(numbers.captions)
    result = {"trial": trial.name, "seed": seed, "taken": share_taken(trial, told, captions), "accuracy": {}}
    for steps in numbers.steps:
        config = replace(CONFIG, steps=steps, seed=seed, choice=trial.choice, cache=work / f"{seed}-states")
        lora = train_lora(folder, data, config, watch=WATCH)
        pipeline = SanaPipeline.load("demo", loras=[(lora, 1.0)])
        result["accuracy"][str(steps)] = share_right(judgements(pipeline, items, latents(pipeline, items, SETTINGS)))
    write_json(done, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.captions", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, states and LoRAs; goes on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=Numbers.seeds, help="default: 0 1 2")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: the one in results/)")
    options = parser.parse_args()
    numbers = Numbers(seeds=tuple(options.seeds))
    rows = [run(options.work, trial, seed, numbers) for seed in numbers.seeds for trial in TRIALS]
    print(write_result("captions", {**asdict(numbers), "rows": rows}, options.out))


if __name__ == "__main__":
    main()
