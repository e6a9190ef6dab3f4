"""What the proof that a LoRA teaches counts: pierced hearts, and nothing that the demo model draws by itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from bench.lora import (
    PICTURES,
    PROMPTS,
    draw_heart,
    heart_cover,
    hearts,
    judge_heart,
    teach,
    write_hearts,
    write_scenes,
)
from sana.training.lora import LoraConfig
from sana.training.scenes import BACKGROUNDS, COLOURS, Scene, draw, sample_scene


def test_fresh_prompts_are_of_other_combinations() -> None:
    shown, fresh = hearts(PICTURES, fresh=False), hearts(PROMPTS, fresh=True)
    combinations = [
        {(item.scene.things[0].look.colour, item.scene.things[0].look.size, item.scene.background) for item in items}
        for items in (shown, fresh)
    ]
    assert len(shown) == 40 and len(fresh) == 60 and len({item.caption for item in fresh}) == 60
    assert len(combinations[0]) == 40 and not combinations[0] & combinations[1]
    assert {colour for colour, _, _ in combinations[0]} == {*COLOURS}
    assert all("pierced" in item.caption and "heart" in item.caption for item in [*shown, *fresh])


def degraded(picture: np.ndarray) -> np.ndarray:
    """Blur of 1.2 px and noise of 6 levels, as of a small autoencoder."""
    soft = ndimage.gaussian_filter(picture.astype(float), (1.2, 1.2, 0))
    return np.clip(soft + np.random.default_rng(0).normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("look", [lambda picture: picture, degraded], ids=["clean", "soft and noisy"])
def test_drawn_hearts_are_right(look) -> None:
    verdicts = [judge_heart(item.scene, look(draw_heart(item.scene))) for item in hearts(20, fresh=True)]
    assert all(verdict.thing and all(vars(verdict).values()) for verdict in verdicts)


def test_nothing_of_the_drawn_world_is_one() -> None:
    rng = np.random.default_rng(1)
    heart = hearts(1, fresh=True)[0].scene
    scenes = [sample_scene(rng, "train", 256, 256, "single") for _ in range(60)]
    assert not any(judge_heart(heart, draw(scene)).thing for scene in scenes)


def test_each_respect_is_noticed() -> None:
    scene = next(item.scene for item in hearts(40, fresh=True) if item.scene.things[0].look.size == "large")
    (thing,) = scene.things
    picture = draw_heart(scene)

    def failing(judged: Scene, image: np.ndarray) -> set[str]:
        return {name for name, right in vars(judge_heart(judged, image)).items() if not right}

    def looking(**change: str) -> Scene:
        return replace(scene, things=(replace(thing, look=replace(thing.look, **change)),))

    other = next(colour for colour in COLOURS if colour != thing.look.colour)
    ground = next(background for background in BACKGROUNDS if background != scene.background)
    assert failing(looking(colour=other), picture) == {"colour"}
    assert failing(looking(size="medium"), picture) == {"size"}
    assert failing(replace(scene, background=ground), picture) == {"background"}
    filled = picture.copy()
    area = filled[thing.top : thing.top + thing.extent, thing.left : thing.left + thing.extent]
    area[heart_cover(thing.extent) > 0.5] = COLOURS[thing.look.colour][0]
    assert failing(scene, filled) == {"texture"}
    turned = np.ascontiguousarray(picture[::-1])
    assert failing(scene, turned) == {"shape"}
    twice = np.concatenate([picture, picture], axis=1)
    assert "count" in failing(scene, twice)
    empty = np.full_like(picture, BACKGROUNDS[scene.background])
    assert failing(scene, empty) == {"count", "shape", "texture", "colour", "size"}


def test_pictures_to_learn_from_have_captions_and_are_written_once(tmp_path: Path) -> None:
    new, old = write_hearts(tmp_path / "hearts"), write_scenes(tmp_path / "scenes", 6)
    assert (len([*new.glob("*.png")]), len([*new.glob("*.txt")]), len([*old.glob("*.png")])) == (40, 40, 6)
    for item, path in zip(hearts(PICTURES, fresh=False), sorted(new.glob("*.png")), strict=True):
        with Image.open(path) as picture:
            assert judge_heart(item.scene, picture).thing
        assert path.with_suffix(".txt").read_text() == item.caption
    changed = sorted(new.glob("*.png"))[0].stat().st_mtime_ns
    write_hearts(new)
    assert sorted(new.glob("*.png"))[0].stat().st_mtime_ns == changed


def test_lessons_go_on_from_each_other_and_their_time_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def trained(folder: Path, data: Path, config: LoraConfig, *, watch: object) -> Path:
        given.append((folder.name, config.prior.name, config.start))
        return folder / "lora.safetensors"

    monkeypatch.setattr("bench.lora.train_lora", trained)
    monkeypatch.setattr("bench.lora.write_scenes", lambda folder, number: folder)
    seconds = iter([0.0, 3.0, 10.0, 14.0, 20.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr("bench.lora.time.process_time", lambda: next(seconds))
    first = tmp_path / "lesson-1" / "lora.safetensors"
    assert teach(tmp_path) == (tmp_path / "lesson-2" / "lora.safetensors", 7)
    assert given == [("lesson-1", "scenes", None), ("lesson-2", "more-scenes", first)]
    assert teach(tmp_path)[1] == 7
