"""The reader finds what was drawn, also in a soft and noisy copy, and says no to everything else."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from bench import scene_reader
from bench.scene_reader import judge, read
from sana.training.scenes import (
    BACKGROUNDS,
    COLOURS,
    OUTER_SHAPES,
    RESOLUTIONS,
    SHAPES,
    Kind,
    Look,
    Scene,
    Thing,
    draw,
    sample_scene,
)

KINDS = get_args(Kind)


def sample(kind: str, number: int, seed: int = 0) -> list[Scene]:
    """Scenes of one kind in every resolution in turn, from both parts."""
    rng = np.random.default_rng(seed)
    return [
        sample_scene(rng, ("train", "test")[i % 2], *RESOLUTIONS[i % len(RESOLUTIONS)], kind) for i in range(number)
    ]


def one(look: Look, extent: int = 64) -> Scene:
    return Scene("single", (Thing(look, 80, 80, extent),), None, "white", 256, 256)


def degraded(picture: np.ndarray, seed: int) -> np.ndarray:
    """Blur of 1.2 px, noise of 6 levels, and a detour over 0.6 of the size: worse than a small autoencoder."""
    height, width = picture.shape[:2]
    soft = ndimage.gaussian_filter(picture.astype(float), (1.2, 1.2, 0))
    noisy = soft + np.random.default_rng(seed).normal(0, 6, picture.shape)
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    small = image.resize((int(0.6 * width), int(0.6 * height)), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", KINDS)
def test_clean_drawings_are_right(kind: str) -> None:
    right = [judge(scene, draw(scene)).right for scene in sample(kind, 100)]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_soft_and_noisy_drawings_are_right(kind: str) -> None:
    right = [judge(scene, degraded(draw(scene), seed)).right for seed, scene in enumerate(sample(kind, 25, seed=1))]
    assert np.mean(right) >= 0.97


def test_uneven_and_shifted_colours_are_tolerated() -> None:
    rng = np.random.default_rng(2)
    right = []
    for scene in (scene for kind in KINDS for scene in sample(kind, 5, seed=2)):
        uneven = ndimage.gaussian_filter(rng.normal(0, 1, (scene.height, scene.width, 3)), (6, 6, 0))
        picture = draw(scene) + rng.normal(0, 6, 3) + 6 * uneven / uneven.std()
        right.append(judge(scene, np.clip(picture, 0, 255).astype(np.uint8)).right)
    assert np.mean(right) >= 0.95


def other(value: str, values: tuple[str, ...]) -> str:
    return values[(values.index(value) + 1) % len(values)]


def with_looks(scene: Scene, change: Callable[[Look], Look]) -> Scene:
    """All equal things of a scene changed, or the first of two different ones."""
    first = scene.things[0].look
    things = (replace(thing, look=change(first)) if thing.look == first else thing for thing in scene.things)
    return replace(scene, things=tuple(things))


# For each field of a judgement, a scene that differs from the one given in that field.
CHANGES = {
    "background": lambda scene: replace(scene, background=other(scene.background, tuple(BACKGROUNDS))),
    "colour": lambda scene: with_looks(scene, lambda look: replace(look, colour=other(look.colour, tuple(COLOURS)))),
    "shape": lambda scene: with_looks(scene, lambda look: replace(look, shape=other(look.shape, SHAPES))),
    "size": lambda scene: with_looks(
        scene, lambda look: replace(look, size="large" if look.size == "small" else "small")
    ),
    "texture": lambda scene: with_looks(
        scene, lambda look: replace(look, texture=other(look.texture, ("plain", "striped", "dotted")))
    ),
    "count": lambda scene: replace(scene, things=(*scene.things, scene.things[0]), relation=None),
    "relation": lambda scene: replace(scene, things=scene.things[::-1]),
}


@pytest.mark.parametrize("field", CHANGES)
def test_wrong_pictures_are_rejected_in_the_field_that_is_wrong(field: str) -> None:
    kinds = ("relation", "inside") if field == "relation" else KINDS
    scenes = [scene for kind in kinds for scene in sample(kind, 5, seed=3)]
    judgements = [judge(CHANGES[field](scene), draw(scene)) for scene in scenes]
    assert np.mean([getattr(judgement, field) is False for judgement in judgements]) >= 0.98


@pytest.mark.parametrize("field", ["background", "colour", "shape", "size", "texture"])
def test_an_error_in_one_field_leaves_the_others_right(field: str) -> None:
    for scene in sample("single", 6, seed=4):
        judgement = judge(CHANGES[field](scene), draw(scene))
        assert replace(judgement, **{field: True}).right


def test_a_relation_is_judged_only_where_one_is_stated() -> None:
    for kind in KINDS:
        (scene,) = sample(kind, 1)
        assert (judge(scene, draw(scene)).relation is None) == (scene.relation is None)


def test_colour_and_shape_belong_together() -> None:
    scene = Scene(
        "pair",
        (Thing(Look("red", "circle"), 20, 80, 64), Thing(Look("blue", "square"), 160, 80, 64)),
        None,
        "white",
        256,
        256,
    )
    swapped = replace(
        scene,
        things=tuple(
            replace(thing, look=replace(thing.look, colour=colour))
            for thing, colour in zip(scene.things, ("blue", "red"), strict=True)
        ),
    )
    judgement = judge(scene, draw(swapped))
    assert judgement.count and not (judgement.colour and judgement.shape)


def test_a_missing_an_extra_and_a_merged_thing_are_count_errors() -> None:
    look = Look("green", "square")
    scene = Scene("count", (Thing(look, 20, 80, 64), Thing(look, 150, 80, 64)), None, "white", 256, 256)
    picture = draw(scene)
    missing, extra, merged, speck = (picture.copy() for _ in range(4))
    missing[:, 128:] = 255
    extra[200:214, 30:44] = COLOURS["red"][0]
    merged[105:120, 70:160] = COLOURS["green"][0]
    speck[200:205, 30:35] = COLOURS["red"][0]
    assert judge(scene, picture).right
    assert not any(judge(scene, wrong).count for wrong in (missing, extra, merged))
    assert not judge(scene, merged).shape
    assert judge(scene, speck).right


@pytest.mark.parametrize("outer", OUTER_SHAPES)
@pytest.mark.parametrize("inner", SHAPES)
def test_nested_things_are_read(inner: str, outer: str) -> None:
    lower = 17 if outer == "triangle" else 0
    things = (
        Thing(Look("yellow", inner, "small"), 108, 108 + lower, 40),
        Thing(Look("purple", outer, "large"), 68, 68, 120),
    )
    reading = read(draw(Scene("inside", things, "inside", "grey", 256, 256)))
    assert reading.background == "grey"
    assert {(thing.colour, thing.shape, thing.within) for thing in reading.things} == {
        ("purple", outer, None),
        ("yellow", inner, 0),
    }


def test_place_and_area_are_read() -> None:
    (thing,) = read(draw(one(Look("blue", "circle")))).things
    np.testing.assert_allclose(thing.box, (80, 80, 144, 144), atol=1)
    np.testing.assert_allclose(thing.centre, (112, 112), atol=1)
    assert abs(thing.area / (np.pi * 32**2) - 1) < 0.03  # the edge pixels go to one side or the other


def test_a_shape_that_is_none_of_the_six_has_no_name() -> None:
    rows, columns = np.mgrid[:256, :256] - 128
    outlines = {
        "diamond": np.abs(rows) + np.abs(columns) < 45,
        "bar": (np.abs(rows) < 20) & (np.abs(columns) < 50),
        "half circle": (np.hypot(rows, columns) < 45) & (rows < 0),
        "bite": (np.hypot(rows, columns) < 40) & (np.hypot(rows, columns - 30) > 25),
        "upside-down triangle": np.rot90(shape_mask("triangle"), 2),
        "cross on its side": ndimage.rotate(shape_mask("cross").astype(float), 45, reshape=False) > 0.5,
    }
    for name, outline in outlines.items():
        picture = np.full((256, 256, 3), 255, np.uint8)
        picture[outline] = COLOURS["blue"][0]
        assert [thing.shape for thing in read(picture).things] == [None], name


def shape_mask(shape: str) -> np.ndarray:
    return draw(one(Look("black", shape)))[..., 0] < 128


def test_a_colour_of_another_world_has_no_name() -> None:
    picture = np.full((256, 256, 3), 255, np.uint8)
    picture[90:150, 90:150] = (0, 210, 230)  # cyan
    assert [(thing.colour, thing.shape) for thing in read(picture).things] == [(None, "square")]


def test_pictures_without_things_and_of_noise_are_read() -> None:
    blank = np.full((256, 256, 3), BACKGROUNDS["mint"], np.uint8)
    assert read(Image.fromarray(blank)) == scene_reader.Reading("mint", ())
    assert not any([judge(one(Look("red", "circle")), blank).count, judge(one(Look("red", "circle")), blank).colour])
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    assert not judge(one(Look("red", "circle")), noise).right


def test_all_colours_are_far_enough_apart_to_be_told() -> None:
    oklab = scene_reader._oklab(scene_reader.ENTRIES)
    for i, k in combinations(range(len(oklab)), 2):
        if scene_reader.ENTRY_NAMES[i] != scene_reader.ENTRY_NAMES[k]:
            assert np.linalg.norm(oklab[i] - oklab[k]) > 0.1


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image is float64 of shape \(256, 256\); give uint8 of shape"):
        read(np.zeros((256, 256)))
