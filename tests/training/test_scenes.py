"""The drawn world: captions say what is drawn, the parts never mix, and things keep their distance."""

import re
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from sana.config import DOWNSAMPLE
from sana.training.scenes import (
    BACKGROUNDS,
    BORDER,
    COLOURS,
    GAP,
    KIND_SHARE,
    LATTICE,
    RESOLUTIONS,
    SHAPES,
    Kind,
    Look,
    Scene,
    Thing,
    caption,
    draw,
    held_out_scenes,
    meaning,
    sample_scene,
    shape_cover,
    split_of,
    texture_cover,
)

KINDS = get_args(Kind)
SIZES = (*RESOLUTIONS, (224, 288))


def sample(number: int, split: str = "train", seed: int = 0) -> list[Scene]:
    """Scenes of every kind and resolution in turn."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split, *SIZES[i // len(KINDS) % 4], KINDS[i % len(KINDS)]) for i in range(number)]


def looks_of(scene: Scene) -> tuple[Look, ...]:
    return tuple(thing.look for thing in scene.things)


def meaning_of(scene: Scene) -> str:
    return meaning(scene.kind, looks_of(scene), scene.relation)


def scene_of(kind: str, looks: list[Look], relation: str | None = None, background: str = "white") -> Scene:
    return Scene(kind, tuple(Thing(look, 0, 0, 60) for look in looks), relation, background, 256, 256)


def phrasings(scene: Scene) -> set[str]:
    rng = np.random.default_rng(0)
    return {caption(scene, rng) for _ in range(400)}


def pixels_of(picture: np.ndarray, thing: Thing) -> np.ndarray:
    return picture[thing.top : thing.top + thing.extent, thing.left : thing.left + thing.extent]


def gap(first: Thing, second: Thing) -> int:
    """Pixels between the squares of two things along the axis on which they are further apart."""
    starts = [(thing.left, thing.top) for thing in (first, second)]
    ends = [(thing.left + thing.extent, thing.top + thing.extent) for thing in (first, second)]
    return max(max(starts[1][axis] - ends[0][axis], starts[0][axis] - ends[1][axis]) for axis in (0, 1))


RED_CIRCLE, BLUE_SQUARE = Look("red", "circle"), Look("blue", "square")


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (
            scene_of("single", [Look("orange", "star")]),
            r"(a picture of |an image of |there is )?(an|one) orange star( on a white background|, white background)?",
        ),
        (
            scene_of("single", [Look("yellow", "ring", "large", "striped")], background="grey"),
            r"(a picture of |an image of |there is )?(a|one) large striped yellow ring( on a|,) grey background",
        ),
        (
            scene_of("count", [Look("green", "cross", "small")] * 3, background="light blue"),
            r"(a picture of |an image of |there are )?(three|3) small green crosses( on a|,) light blue background",
        ),
        (
            scene_of("count", [Look("black", "square")] * 2, background="mint"),
            r"(a picture of |an image of |there are )?(two|2) black squares( on a|,) mint background",
        ),
        (
            scene_of("relation", [RED_CIRCLE, BLUE_SQUARE], "left of", "cream"),
            r"(a picture of |an image of |there is )?(a red circle (to the )?left of a blue square|"
            r"a blue square (to the )?right of a red circle)( on a|,) cream background",
        ),
        (
            scene_of("relation", [Look("orange", "ring", texture="dotted"), BLUE_SQUARE], "above", "grey"),
            r"(a picture of |an image of |there is )?(a dotted orange ring (above|over) a blue square|"
            r"a blue square (below|under) a dotted orange ring)( on a|,) grey background",
        ),
        (
            scene_of("inside", [Look("orange", "circle", "small"), Look("blue", "square", "large")], "inside", "grey"),
            r"(a picture of |an image of |there is )?((an orange circle (inside|in) a blue square|"
            r"a blue square around an orange circle|a blue square with an orange circle inside)|"
            r"(a small orange circle (inside|in) a large blue square|"
            r"a large blue square around a small orange circle|a large blue square with a small orange circle inside))"
            r"( on a|,) grey background",
        ),
        (
            scene_of("pair", [RED_CIRCLE, BLUE_SQUARE], background="grey"),
            r"(a picture of |an image of |there is )?(a red circle and a blue square|a blue square and a red circle|"
            r"one red circle and one blue square|one blue square and one red circle)( on a|,) grey background",
        ),
    ],
)
def test_captions_are_english(scene: Scene, expected: str) -> None:
    found = phrasings(scene)
    assert len(found) >= 8
    assert not [text for text in found if not re.fullmatch(expected, text)]


def test_a_caption_never_fits_two_different_pictures() -> None:
    rng = np.random.default_rng(1)
    told: dict[str, tuple] = {}
    for scene in sample(4000):
        looks = looks_of(scene) if scene.relation else tuple(sorted(looks_of(scene), key=repr))
        shown = (looks, scene.relation, scene.background)
        assert told.setdefault(caption(scene, rng), shown) == shown


def test_about_half_of_the_captions_name_the_background() -> None:
    rng = np.random.default_rng(2)
    named = np.mean(["background" in caption(scene, rng) for scene in sample(2000)])
    assert 0.45 < named < 0.6


def test_no_meaning_occurs_in_both_parts() -> None:
    train, test = (
        {meaning_of(scene) for scene in sample(number, split)} for number, split in ((4000, "train"), (1000, "test"))
    )
    assert len(train) > 1500 and len(test) > 200
    assert not train & test


def test_meaning_does_not_depend_on_the_order_of_a_pair_but_on_that_of_a_relation() -> None:
    looks = (RED_CIRCLE, BLUE_SQUARE)
    assert meaning("pair", looks, None) == meaning("pair", looks[::-1], None)
    assert meaning("relation", looks, "left of") != meaning("relation", looks[::-1], "left of")
    assert meaning("count", (replace(RED_CIRCLE, size="small"),) * 3, None) == meaning("count", (RED_CIRCLE,) * 3, None)
    assert meaning("single", (replace(RED_CIRCLE, size="small"),), None) != meaning("single", (RED_CIRCLE,), None)


def test_a_tenth_of_each_number_of_things_is_held_out_and_covers_every_colour_and_shape() -> None:
    combinations = [(number, Look(colour, shape)) for number in (2, 3, 4) for colour in COLOURS for shape in SHAPES]
    held_out = [(number, look) for number, look in combinations if split_of("count", (look,) * number, None) == "test"]
    assert 0.07 < len(held_out) / len(combinations) < 0.13
    assert {number for number, _ in held_out} == {2, 3, 4}
    assert {look.colour for _, look in held_out} == set(COLOURS)
    assert {look.shape for _, look in held_out} == set(SHAPES)


def test_the_split_never_moves() -> None:
    """The demo model was trained on this split; another hash would put its training scenes into the benchmark."""
    assert split_of("count", (Look("red", "triangle"),) * 3, None) == "test"
    assert split_of("count", (Look("red", "circle"),) * 3, None) == "train"


def test_kinds_occur_with_their_shares() -> None:
    rng = np.random.default_rng(3)
    kinds = [sample_scene(rng, "train", 256, 256).kind for _ in range(2000)]
    for kind, share in KIND_SHARE.items():
        assert abs(kinds.count(kind) / 2000 - share) < 0.04  # four standard deviations


def test_the_same_seed_gives_the_same_scene_caption_and_picture() -> None:
    for first, second in zip(sample(20, seed=5), sample(20, seed=5), strict=True):
        assert first == second
        assert np.array_equal(draw(first), draw(second))
        assert caption(first, np.random.default_rng(1)) == caption(second, np.random.default_rng(1))


def test_held_out_scenes_are_even_and_all_unseen() -> None:
    examples = held_out_scenes(75, seed=1)
    assert examples == held_out_scenes(75, seed=1) != held_out_scenes(75, seed=2)
    assert len({example.caption for example in examples}) == 75
    for example in examples:
        assert split_of(example.scene.kind, looks_of(example.scene), example.scene.relation) == "test"
    for kind in KINDS:
        for resolution in RESOLUTIONS:
            scenes = [example.scene for example in examples]
            assert sum(scene.kind == kind and (scene.height, scene.width) == resolution for scene in scenes) == 5


def test_things_keep_their_distance_from_the_edge_and_from_each_other() -> None:
    for scene in sample(2000, seed=6):
        for i, thing in enumerate(scene.things):
            assert BORDER <= thing.left <= scene.width - BORDER - thing.extent
            assert BORDER <= thing.top <= scene.height - BORDER - thing.extent
            if scene.relation != "inside":
                assert all(gap(thing, other) >= GAP for other in scene.things[:i])


def test_middles_lie_on_the_lattice() -> None:
    for thing in (thing for scene in sample(1000, seed=6) for thing in scene.things):
        assert (thing.left + thing.extent // 2) % LATTICE == (thing.top + thing.extent // 2) % LATTICE == 0


def test_the_inner_of_two_nested_things_is_in_the_middle_of_a_latent_cell() -> None:
    inner = [scene.things[0] for scene in sample(1000, seed=6) if scene.relation == "inside"]
    middles = {(thing.left + thing.extent // 2, thing.top + thing.extent // 2) for thing in inner}
    assert {place % DOWNSAMPLE for middle in middles for place in middle} == {DOWNSAMPLE // 2}
    assert len(middles) >= 20


def test_relations_are_clear() -> None:
    for scene in sample(2000, seed=7):
        if scene.relation in ("left of", "above"):
            first, second = scene.things if scene.relation == "left of" else map(transposed, scene.things)
            assert first.left + first.extent + GAP <= second.left
            assert first.top + first.extent // 2 == second.top + second.extent // 2


def transposed(thing: Thing) -> Thing:
    return replace(thing, left=thing.top, top=thing.left)


def test_a_nested_thing_touches_nothing_of_the_outer_one_but_its_middle() -> None:
    for scene in sample(1000, seed=8):
        if scene.relation == "inside":
            inner, outer = scene.things
            canvas = np.zeros((2, scene.height, scene.width))
            for layer, thing in zip(canvas, (inner, outer), strict=True):
                pixels_of(layer, thing)[:] = shape_cover(thing.look.shape, thing.extent)
            covered = canvas[1][canvas[0] > 0]
            assert covered.max() == 0 if outer.look.shape == "ring" else covered.min() == 1


def test_colours_are_exact_away_from_edges() -> None:
    for scene in sample(300, seed=9):
        picture = draw(scene)
        assert picture.shape == (scene.height, scene.width, 3) and picture.dtype == np.uint8
        outside = np.ones(picture.shape[:2], bool)
        for thing in scene.things:
            pixels_of(outside, thing)[shape_cover(thing.look.shape, thing.extent) > 0] = False
        assert (picture[outside] == BACKGROUNDS[scene.background]).all()
        inner = scene.things[0]
        whole = shape_cover(inner.look.shape, inner.extent) == 1
        tint = texture_cover(inner.look.texture, inner.extent)
        for share, colour in enumerate(COLOURS[inner.look.colour]):
            assert (pixels_of(picture, inner)[whole & (tint == share)] == colour).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_square_and_have_soft_edges(shape: str) -> None:
    cover = shape_cover(shape, 64)
    assert cover.shape == (64, 64) and cover.min() == 0 and cover.max() == 1
    assert 57 <= (cover.max(axis=0) > 0).sum() <= 64  # the square is drawn at 0.9 of its extent
    assert ((cover > 0) & (cover < 1)).any() or shape in ("square", "cross")  # these may end on whole pixels
    np.testing.assert_allclose(cover, cover[:, ::-1], atol=0.26)  # one sample in four per pixel row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", 256, 256), "split 'valid' is unknown; use one of 'train', 'test'"),
        (("train", 256, 256, "many"), "kind 'many' is unknown; use one of 'single', .*, None"),
        (("train", 160, 256), "height 160 is not a multiple of 32 px from 192 on; use 192"),
        (("train", 256, 250), "width 250 is not a multiple of 32 px from 192 on; use 224"),
    ],
)
def test_wrong_requests_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_scene(np.random.default_rng(0), *arguments)
