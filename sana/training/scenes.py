"""The drawn world of the demo model: coloured shapes on a plain background, each with an exact caption.

A scene is sampled, then drawn and captioned; all three depend on nothing but the numbers stored in it. About a tenth of
the combinations is held out: `split_of` hashes what a scene means, and `sample_scene` never crosses that line.
Knows numpy, Pillow and the size of a latent cell only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import product
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw

from ..config import DOWNSAMPLE

T = TypeVar("T")
Kind = Literal["single", "count", "relation", "inside", "pair"]
Split = Literal["train", "test"]
Resolution = tuple[int, int]  # (height, width) px

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# name: (colour, tint of its stripes and dots), RGB. Two entries of different names are at least 0.10 apart in Oklab.
COLOURS = {
    "red": ((222, 25, 48), (150, 10, 30)),
    "orange": ((252, 138, 20), (205, 92, 0)),
    "yellow": ((252, 218, 30), (208, 184, 0)),
    "green": ((30, 150, 65), (95, 200, 110)),
    "blue": ((40, 90, 220), (105, 155, 250)),
    "purple": ((115, 45, 165), (160, 100, 215)),
    "pink": ((250, 120, 190), (205, 70, 145)),
    "black": ((25, 25, 30), (88, 88, 96)),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (174, 174, 178),
    "cream": (252, 226, 178),
    "light blue": (165, 208, 252),
    "mint": (160, 234, 200),
}
TEXTURES = ("plain", "striped", "dotted")
EXTENTS = {"small": 44, "medium": 68, "large": 104}  # px across
OUTER_EXTENT = 120  # px across of a thing around another
OUTER_SHAPES = ("circle", "square", "triangle", "ring")  # those with room for another thing
LATTICE = 16  # px; middles of things are multiples of it, so that few latents look alike but mean different things
BORDER = 8  # px kept free at the edge of the picture
GAP = 12  # px between two things
SMALLEST_SIDE = 192  # px; the fullest scene needs this much
RESOLUTIONS = ((256, 256), (192, 320), (320, 192))  # (height, width) px; other multiples of 32 work too

KIND_SHARE = {"single": 0.1, "count": 0.2, "relation": 0.2, "inside": 0.27, "pair": 0.23}
BACKGROUND_SHARE = {"white": 0.6, "grey": 0.1, "cream": 0.1, "light blue": 0.1, "mint": 0.1}
WHITE_MENTIONED = 0.2  # share of white backgrounds the caption names; the others are always named
TEXTURE_SHARE = {"plain": 0.7, "striped": 0.15, "dotted": 0.15}  # single things show each texture equally often
COUNT_SIZES = {2: ("small", "medium", "medium", "large"), 3: ("small", "medium"), 4: ("small", "medium")}
TWO_SIZES = ("medium medium",) * 6 + ("small medium", "medium small", "small large", "large small")
HELD_OUT_SHARE = 0.1
HELD_OUT_SALT = 181  # chosen so that the few counts held out still cover every colour, shape and number

NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
RELATIONS = {  # {a} is things[0]
    "left of": ("{a} left of {b}", "{a} to the left of {b}", "{b} right of {a}", "{b} to the right of {a}"),
    "above": ("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}"),
    "inside": ("{a} inside {b}", "{a} in {b}", "{b} with {a} inside", "{b} around {a}"),
}
BACKGROUND_ENDINGS = (" on a {} background", " on a {} background", ", {} background")
FRAMES = ("{}", "{}", "{}", "a picture of {}", "an image of {}", "there {be} {}")


@dataclass(frozen=True)
class Look:
    """What a caption says of one thing. An unmentioned size is medium, an unmentioned texture plain."""

    colour: str
    shape: str
    size: str = "medium"
    texture: str = "plain"


@dataclass(frozen=True)
class Thing:
    """A look with its place: the square of `extent` px that holds it, from its left upper corner (left, top) in px."""

    look: Look
    left: int
    top: int
    extent: int


Looks = tuple[Look, ...]
Things = tuple[Thing, ...]


@dataclass(frozen=True)
class Scene:
    """Things on a background, px. With a relation, things[0] is left of, above or inside things[1].

    In a nested scene the sizes follow from the relation (small in large), so a caption may leave them out.
    """

    kind: Kind
    things: Things
    relation: str | None
    background: str
    height: int
    width: int


@dataclass(frozen=True)
class CaptionedScene:
    scene: Scene
    caption: str


def meaning(kind: Kind, looks: Looks, relation: str | None) -> str:
    """The combination that is held out as a whole, the same for every phrasing and every place of the things.

    Size and texture count for single things only: a held-out count, pair or relation is held out in all of them.
    """
    names = [f"{look.colour} {look.shape}" for look in looks]
    if kind == "single":
        return f"{names[0]}, {looks[0].size}, {looks[0].texture}"
    if kind == "count":
        return f"{len(looks)} {names[0]}"
    if kind == "pair":
        return " and ".join(sorted(names))
    return f" {relation} ".join(names)


def split_of(kind: Kind, looks: Looks, relation: str | None) -> Split:
    """The part a combination belongs to, from a hash that is stable over machines and versions."""
    digest = sha256(f"{HELD_OUT_SALT} {meaning(kind, looks, relation)}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


def sample_scene(rng: np.random.Generator, split: Split, height: int, width: int, kind: Kind | None = None) -> Scene:
    """A random scene of the given part; height, width: px; kind None: drawn with KIND_SHARE.

    Raises ValueError for an unknown split or kind, and for a side below 192 px or not a multiple of 32.
    """
    _check(split, height, width, kind)
    kind = kind or _draw_from(rng, KIND_SHARE)
    looks, relation = _sample_looks(rng, kind)
    while split_of(kind, looks, relation) != split:
        looks, relation = _sample_looks(rng, kind)
    background = _draw_from(rng, BACKGROUND_SHARE)
    return Scene(kind, _arrange(rng, looks, relation, (height, width)), relation, background, height, width)


def held_out_scenes(number: int, seed: int) -> list[CaptionedScene]:
    """The benchmark: test scenes (thousands at most) with captions, kinds and resolutions in turn, no caption twice."""
    rng = np.random.default_rng(seed)
    kinds = get_args(Kind)
    found: dict[str, Scene] = {}
    while len(found) < number:
        height, width = RESOLUTIONS[len(found) // len(kinds) % len(RESOLUTIONS)]
        scene = sample_scene(rng, "test", height, width, kinds[len(found) % len(kinds)])
        found.setdefault(caption(scene, rng), scene)
    return [CaptionedScene(scene, text) for text, scene in found.items()]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the phrasings that say exactly what the scene shows, in lower case and without a full stop."""
    text = _pick(rng, FRAMES).format(_subject(scene, rng), be="are" if scene.kind == "count" else "is")
    if scene.background == "white" and rng.random() >= WHITE_MENTIONED:
        return text
    return text + _pick(rng, BACKGROUND_ENDINGS).format(scene.background)


def plural_ending(shape: str) -> str:
    return "es" if shape == "cross" else "s"


def draw(scene: Scene) -> np.ndarray:
    """The picture, (height, width, 3) uint8 RGB. Edges are anti-aliased; elsewhere colours are those of the tables."""
    picture = np.full((scene.height, scene.width, 3), BACKGROUNDS[scene.background], np.uint8)
    for thing in reversed(scene.things):  # the inner of two nested things comes last
        colour, tint = np.array(COLOURS[thing.look.colour], np.float32)
        cover = shape_cover(thing.look.shape, thing.extent)[..., None]
        paint = colour + (tint - colour) * texture_cover(thing.look.texture, thing.extent)[..., None]
        area = picture[thing.top : thing.top + thing.extent, thing.left : thing.left + thing.extent]
        area[:] = np.rint(area + (paint - area) * cover)
    return picture


@lru_cache(maxsize=1024)
def shape_cover(shape: str, extent: int) -> np.ndarray:
    """Share of each pixel inside the shape, (extent, extent) float32 in [0, 1], from 4x4 samples per pixel."""
    side = 4 * extent
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    else:
        pen.polygon(((_outline(shape) + 1) * side / 2 - 0.5).ravel().tolist(), fill=255)
    if shape == "ring":
        rim = round(0.22 * side)
        pen.ellipse((rim, rim, side - 1 - rim, side - 1 - rim), fill=0)
    return np.asarray(image.reduce(4), np.float32) / 255


@lru_cache(maxsize=1024)
def texture_cover(texture: str, extent: int) -> np.ndarray:
    """Share of the tint in each pixel, (extent, extent) float32 in [0, 1]. Patterns have a fixed pitch in px."""
    y, x = np.mgrid[:extent, :extent].astype(np.float32) - (extent - 1) / 2
    if texture == "striped":  # diagonal, 10 px of colour and 10 px of tint
        distance = np.abs((x + y) / np.sqrt(2) % 20 - 10) - 5
    elif texture == "dotted":  # dots 11 px wide, 20 px apart, every second row moved by half
        row = np.round(y / 17)
        distance = np.hypot((x - row % 2 * 10 + 10) % 20 - 10, y - row * 17) - 5.5
    else:
        return np.zeros((extent, extent), np.float32)
    return np.clip(0.5 - distance, 0, 1)


def _outline(shape: str) -> np.ndarray:
    """Corners (x, y) of a polygon in [-1, 1], y downwards, (corners, 2)."""
    if shape == "square":
        return 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":  # equilateral
        return np.array([(0, -0.866), (1, 0.866), (-1, 0.866)])
    if shape == "cross":
        quarter_turn = np.array([(0, 1), (-1, 0)])
        arm = np.array([(-0.34, -1), (0.34, -1), (0.34, -0.34)])
        return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)])
    turns = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.45, 1.0) / np.sin(0.4 * np.pi)
    return np.stack([radii * np.sin(turns), 0.1 - radii * np.cos(turns)], axis=1)


def _check(split: str, height: int, width: int, kind: str | None) -> None:
    for name, value, known in (("split", split, get_args(Split)), ("kind", kind, (*get_args(Kind), None))):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(map(repr, known))}")
    for name, side in (("height", height), ("width", width)):
        if side < SMALLEST_SIDE or side % 32:
            usable = max(SMALLEST_SIDE, side // 32 * 32)
            raise ValueError(f"{name} {side} is not a multiple of 32 px from {SMALLEST_SIDE} on; use {usable}")


def _sample_looks(rng: np.random.Generator, kind: Kind) -> tuple[Looks, str | None]:
    """Looks and relation of a random combination of the whole space, held out or not."""
    if kind == "single":
        return (_sample_look(rng, _pick(rng, tuple(EXTENTS)), _pick(rng, TEXTURES)),), None
    if kind == "count":
        number = int(rng.integers(2, 5))
        return (_sample_look(rng, _pick(rng, COUNT_SIZES[number]), _draw_from(rng, TEXTURE_SHARE)),) * number, None
    if kind == "inside":
        outer = Look(_pick(rng, tuple(COLOURS)), _pick(rng, OUTER_SHAPES), "large")
        others = tuple(name for name in COLOURS if name != outer.colour)
        return (Look(_pick(rng, others), _pick(rng, SHAPES), "small"), outer), "inside"
    sizes = _pick(rng, TWO_SIZES).split()
    first, second = (_sample_look(rng, size, _draw_from(rng, TEXTURE_SHARE)) for size in sizes)
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = _sample_look(rng, second.size, second.texture)
    return (first, second), _pick(rng, ("left of", "above")) if kind == "relation" else None


def _sample_look(rng: np.random.Generator, size: str, texture: str) -> Look:
    """Small things are plain: there is no room for a pattern."""
    return Look(_pick(rng, tuple(COLOURS)), _pick(rng, SHAPES), size, "plain" if size == "small" else texture)


def _arrange(rng: np.random.Generator, looks: Looks, relation: str | None, resolution: Resolution) -> Things:
    """Gives the looks places on the lattice, at least BORDER from the edge and, unless nested, GAP from each other."""
    if relation == "inside":
        return _arrange_nested(rng, looks, resolution)
    if len(set(looks)) == 1:
        extent = EXTENTS[looks[0].size]
        middles = _scattered(rng, len(looks), extent, resolution)
        return tuple(_placed(look, x, y, extent) for look, (x, y) in zip(looks, middles, strict=True))
    return _arrange_two(rng, looks, relation, resolution)


def _arrange_nested(rng: np.random.Generator, looks: Looks, resolution: Resolution) -> Things:
    """The inner thing sits at the middle of the outer one, lower in a triangle, whose room is below its middle.

    Its own middle is that of a latent cell: the shape of a small thing is learnt far better there.
    """
    lower = LATTICE if looks[1].shape == "triangle" else 0
    height, width = resolution
    x = _pick(rng, [x for x in _lattice(OUTER_EXTENT, width) if x % DOWNSAMPLE == DOWNSAMPLE // 2])
    y = _pick(rng, [y for y in _lattice(OUTER_EXTENT, height) if (y + lower) % DOWNSAMPLE == DOWNSAMPLE // 2])
    return _placed(looks[0], x, y + lower, EXTENTS[looks[0].size]), _placed(looks[1], x, y, OUTER_EXTENT)


def _arrange_two(rng: np.random.Generator, looks: Looks, relation: str | None, resolution: Resolution) -> Things:
    """Two things apart along one axis, the first left of or above the second.

    With a relation they are in the middles of the two halves of the picture, as nearly as their sizes allow.
    """
    extents = [EXTENTS[look.size] for look in looks]
    horizontal = relation == "left of" or (relation is None and rng.random() < 0.5)
    breadth, length = resolution if horizontal else reversed(resolution)
    least = sum(extents) / 2 + GAP
    options = product(*(_lattice(extent, length) for extent in extents))
    apart = tuple((a, b) for a, b in options if b - a >= least)
    if relation is None:
        along = _pick(rng, apart)
        across = [_pick(rng, _lattice(extent, breadth)) for extent in extents]
    else:
        along = min(apart, key=lambda places: abs(places[0] - length / 4) + abs(places[1] - 3 * length / 4))
        across = [breadth // 2] * 2
    xs, ys = (along, across) if horizontal else (across, along)
    return tuple(_placed(*numbers) for numbers in zip(looks, xs, ys, extents, strict=True))


def _scattered(rng: np.random.Generator, number: int, extent: int, resolution: Resolution) -> list[tuple[int, int]]:
    """Middles (x, y) px of equal things, one after the other where there is room, from the start again if there is none."""
    height, width = resolution
    while True:
        free = list(product(_lattice(extent, width), _lattice(extent, height)))
        middles: list[tuple[int, int]] = []
        while free and len(middles) < number:
            x, y = _pick(rng, free)
            middles.append((x, y))
            free = [(a, b) for a, b in free if max(abs(a - x), abs(b - y)) >= extent + GAP]
        if len(middles) == number:
            return middles


def _lattice(extent: int, length: int) -> range:
    """Where along a side of `length` px the middle of a thing may be."""
    first = -(-(BORDER + extent // 2) // LATTICE) * LATTICE
    return range(first, length - first + 1, LATTICE)


def _placed(look: Look, x: int, y: int, extent: int) -> Thing:
    return Thing(look, x - extent // 2, y - extent // 2, extent)


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    """The noun phrase of all things, without the background."""
    looks = [thing.look for thing in scene.things]
    named_sizes = scene.relation != "inside" or rng.random() < 0.5
    phrases = [_describe(look, named_sizes) for look in looks]
    if scene.kind == "count":
        return f"{_pick(rng, NUMBERS[len(looks)])} {phrases[0]}{plural_ending(looks[0].shape)}"
    if scene.kind == "pair":
        phrases = [phrases[i] for i in rng.permutation(2)]
    if scene.relation is None and rng.random() < 0.2:
        return " and ".join(f"one {phrase}" for phrase in phrases)
    phrases = [f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}" for phrase in phrases]
    if scene.relation is None:
        return " and ".join(phrases)
    return _pick(rng, RELATIONS[scene.relation]).format(a=phrases[0], b=phrases[1])


def _describe(look: Look, named_size: bool) -> str:
    words = (look.size if named_size else "medium", look.texture, look.colour, look.shape)
    return " ".join(word for word in words if word not in ("medium", "plain"))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _draw_from(rng: np.random.Generator, shares: dict[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))
