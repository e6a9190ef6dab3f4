"""Reads a picture of the drawn world and compares it with what a caption asks for, by colour and geometry alone.

Pixels take the name of the nearest colour of `sana.training.scenes` in Oklab, connected pixels of one name become
things, and the outline of a thing is compared with the drawn shapes. No network, and nothing learned.
"""

from dataclasses import astuple, dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from sana.training.scenes import BACKGROUNDS, COLOURS, SHAPES, Look, Scene, Things, shape_cover

NAMES = (*COLOURS, *BACKGROUNDS)
# RGB of every colour, its tint, and every background; and the place of their names in NAMES
ENTRIES = np.array([*(rgb for pair in COLOURS.values() for rgb in pair), *BACKGROUNDS.values()])
ENTRY_NAMES = np.array([*np.arange(len(COLOURS)).repeat(2), *range(len(COLOURS), len(NAMES))], np.uint8)

CORE_SIDE = 5  # px; the core of a region is where the square of this side has its name alone
LEAST_CORE = 0.15  # share of a region's pixels in its core; soft edges and noise have less
LEAST_AREA = 100  # px; less is noise (the smallest drawn thing has 720)
MOST_COLOUR_ERROR = 0.1  # Oklab distance beyond which a colour has no name
# Intersection over union with a drawn shape, below which an outline has no name. Compact shapes overlap more by chance
# (a circle with a square 0.83), thin ones lose more to a wobbly edge.
LEAST_OVERLAP = {"circle": 0.9, "square": 0.86, "triangle": 0.78, "star": 0.72, "cross": 0.78, "ring": 0.76}
SMALL_ALLOWANCE = 0.04  # off LEAST_OVERLAP for small things: a wobble of 1 px weighs more in them
LEAST_LEAD = 0.04  # by which the best overlap must exceed the second
SIZE_LIMITS = (56, 86)  # px across, between small and medium, medium and large: midway between the drawn sizes
LEAST_CONTRAST = 0.095  # Oklab distance from what is around it, below which a region is an uneven colour, not a thing
LEAST_TINT = 0.06  # share of tinted pixels from which on a thing is not plain
LEAST_STRIPED = 0.42  # share of the tint's variance that averaging along the stripes keeps
LEAST_HOLE = 0.3  # share of the surroundings' name in what a thing encloses, from which on it is a hole
MOST_REGIONS = 16  # the largest ones are looked at; any picture with so many is wrong
OUTLINE_SIDE, OUTLINE_AREA = 64, 900  # px, of the square in which outlines are compared, and of an outline in it
RGB_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
CONES_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


@dataclass(frozen=True)
class FoundThing:
    """What was read of one thing; None stands for something the drawn world does not have.

    box: (left, top, right, bottom) px, the last two excluded; area: px; within: index of the thing around this one.
    outline, own, tinted: (bottom - top, right - left) bool: the outline, the thing's own pixels, and those in its tint.
    """

    colour: str | None
    shape: str | None
    size: str
    texture: str
    box: tuple[int, int, int, int]
    area: int
    within: int | None
    outline: np.ndarray = field(compare=False, repr=False)
    own: np.ndarray = field(compare=False, repr=False)
    tinted: np.ndarray = field(compare=False, repr=False)

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) px, of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Reading:
    background: str | None
    things: tuple[FoundThing, ...]


@dataclass(frozen=True)
class Judgement:
    """Which parts of a caption a picture shows; relation is None where the caption states none."""

    background: bool
    count: bool
    colour: bool
    shape: bool
    size: bool
    texture: bool
    relation: bool | None

    @property
    def right(self) -> bool:
        return False not in astuple(self)


@dataclass(frozen=True)
class _Region:
    """Connected pixels of one name. mask, filled: (height, width) bool, without and with the pixels it encloses."""

    name: int  # place in NAMES
    mask: np.ndarray
    filled: np.ndarray


@dataclass(frozen=True)
class _NamedPicture:
    """names: (height, width) place in NAMES of each pixel's region; entries, errors: the place of its own colour in
    ENTRIES and the Oklab distance to it; ground: the background's place in NAMES; regions: everything else.
    """

    names: np.ndarray
    entries: np.ndarray
    errors: np.ndarray
    ground: int
    regions: tuple[_Region, ...]

    def around(self, region: _Region) -> _Region | None:
        """The smallest region that encloses this one, None: the background."""
        others = [i for i in self.regions if i is not region and i.filled[region.mask].mean() > 0.95]
        return min(others, key=lambda other: other.filled.sum(), default=None)

    def name_around(self, region: _Region) -> int:
        """The most frequent name in the 2 px around a region: within a ring, the name of what fills its hole."""
        rim = ndimage.maximum_filter(region.filled, 5) & ~region.filled
        names = self.names[rim]
        return int(np.bincount(names).argmax()) if names.size else self.ground

    def seen_through(self, region: _Region) -> bool:
        """Whether this is what lies behind a ring: it has the name of what surrounds the region around it."""
        around = self.around(region)
        return around is not None and region.name == self.name_around(around)


def judge(scene: Scene, image: Image.Image | np.ndarray) -> Judgement:
    """Compares a picture with what the caption of a scene says; where the scene put its things does not matter.

    image: (height, width, 3) uint8 RGB or a PIL image, of any size. Each thing asked for is paired with the found thing
    most like it. A property is right if everything asked for has a partner and all partners agree in it; found things
    left over are errors of the count alone.
    """
    reading = read(image)
    partners = _pair(scene.things, reading.things)
    pairs = [(thing.look, found) for thing, found in zip(scene.things, partners, strict=True) if found]
    complete = {thing.look for thing in scene.things} == {look for look, _ in pairs}
    agree = {
        name: complete and all(getattr(look, name) == getattr(found, name) for look, found in pairs)
        for name in ("colour", "shape", "size", "texture")
    }
    return Judgement(
        background=reading.background == scene.background,
        count=len(reading.things) == len(scene.things),
        relation=_holds(scene.relation, partners, reading.things) if scene.relation else None,
        **agree,
    )


def read(image: Image.Image | np.ndarray) -> Reading:
    """Background and things of a picture, (height, width, 3) uint8 RGB or a PIL image; else ValueError."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image is {pixels.dtype} of shape {pixels.shape}; give uint8 of shape (height, width, 3)")
    picture = _name_pixels(ndimage.uniform_filter(pixels, (3, 3, 1)))
    things = [region for region in picture.regions if not picture.seen_through(region)]
    background = NAMES[picture.ground] if NAMES[picture.ground] in BACKGROUNDS else None
    return Reading(background, tuple(_describe(picture, region, things) for region in things))


def _name_pixels(pixels: np.ndarray) -> _NamedPicture:
    """Names the pixels twice: with all names, then with those alone that fill a square of CORE_SIDE somewhere.

    The second pass takes away the foreign names that lie between two colours on a soft edge.
    """
    red, green, blue = np.moveaxis(pixels.astype(np.int32) >> 3, 2, 0)
    codes = red << 10 | green << 5 | blue
    distances = _oklab_distances()
    names = ENTRY_NAMES[distances.argmin(axis=1)][codes]
    present = np.bincount(names[_is_core(names)], minlength=len(NAMES))[ENTRY_NAMES] > 0
    distances = np.where(present, distances, np.inf) if present.any() else distances
    entries = distances.argmin(axis=1)[codes]
    names = ENTRY_NAMES[entries]
    ground = int(np.bincount(np.concatenate([names[0], names[-1], names[:, 0], names[:, -1]])).argmax())
    ids, part_names = _solid_parts(names, ground)
    ids = _merge_pale_parts(ids, _oklab_grid()[codes])
    largest = np.flatnonzero(np.bincount(ids.ravel())[1:])[:MOST_REGIONS] + 1
    masks = [(int(part_names[part]), ids == part) for part in largest]
    regions = tuple(_Region(name, mask, _fill(mask)) for name, mask in masks)
    return _NamedPicture(part_names[ids], entries, distances[codes, entries], ground, regions)


def _solid_parts(names: np.ndarray, ground: int) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts of one name: (height, width) number of each pixel's part, and (parts,) the name of each part.

    Part 0 is the background in all its pieces; the others come in falling order of area. Pieces without enough of a
    core join the nearest part.
    """
    core = _is_core(names)
    ids = np.full(names.shape, -1)
    parts = []
    for name in np.flatnonzero(np.bincount(names[core])).tolist():
        labels, _ = ndimage.label(names == name)
        areas = np.bincount(labels.ravel())
        cores = np.bincount(labels[core], minlength=len(areas))
        solid = (cores > LEAST_CORE * areas) & (areas >= LEAST_AREA) & (np.arange(len(areas)) > 0)
        if name == ground:
            ids[solid[labels]] = 0
        else:
            parts += [(areas[label], name, labels == label) for label in np.flatnonzero(solid)]
    parts.sort(key=lambda part: -part[0])
    for number, (_, _, mask) in enumerate(parts, 1):
        ids[mask] = number
    part_names = np.array([ground, *(name for _, name, _ in parts)])
    if ids.max() < 0:
        return np.zeros_like(ids), part_names
    if ids.min() == 0:
        return ids, part_names
    rows, columns = ndimage.distance_transform_edt(ids < 0, return_distances=False, return_indices=True)
    return ids[rows, columns], part_names


def _merge_pale_parts(ids: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Gives parts of little contrast to the part around. ids: of _solid_parts; colours: (height, width, 3) Oklab."""
    areas = np.maximum(np.bincount(ids.ravel()), 1)
    sums = [np.bincount(ids.ravel(), channel.ravel()) for channel in np.moveaxis(colours, 2, 0)]
    means = np.stack(sums, axis=1) / areas[:, None]
    merged = ids.copy()
    for part in reversed(range(1, len(areas))):  # from the smallest, which may lie in a larger one
        rim = merged[ndimage.maximum_filter(merged == part, 3) & (merged != part)]
        around = np.bincount(rim, minlength=1).argmax()
        if np.linalg.norm(means[part] - means[around]) < LEAST_CONTRAST:
            merged[merged == part] = around
    return merged


def _is_core(names: np.ndarray) -> np.ndarray:
    """Where the square of CORE_SIDE px around a pixel has one name only."""
    return ndimage.minimum_filter(names, CORE_SIDE) == ndimage.maximum_filter(names, CORE_SIDE)


def _fill(mask: np.ndarray) -> np.ndarray:
    """The mask with everything it encloses: all that is not connected to the outside."""
    labels, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    return labels[1:-1, 1:-1] != labels[0, 0]


def _describe(picture: _NamedPicture, region: _Region, things: list[_Region]) -> FoundThing:
    """Colour and texture of the region's own pixels, shape and size of its outline."""
    outline = _outline(picture, region)
    rows, columns = ndimage.find_objects(outline.astype(np.uint8))[0]
    outline, own = outline[rows, columns], region.mask[rows, columns]
    name, shape = NAMES[region.name], _name_shape(outline)
    tinted = picture.entries[rows, columns] % 2 == 1
    named = name in COLOURS and np.median(picture.errors[region.mask]) <= MOST_COLOUR_ERROR
    around = picture.around(region)
    return FoundThing(
        colour=name if named else None,
        shape=shape,
        size=_name_size(outline, shape),
        texture=_name_texture(tinted, own),
        box=(columns.start, rows.start, columns.stop, rows.stop),
        area=int(own.sum()),
        within=next((i for i, thing in enumerate(things) if thing is around), None),
        outline=outline,
        own=own,
        tinted=tinted,
    )


def _outline(picture: _NamedPicture, region: _Region) -> np.ndarray:
    """(height, width) bool. What a region encloses belongs to it, unless that is the surroundings, as in a ring."""
    enclosed = region.filled & ~region.mask
    surroundings = enclosed & (picture.names == picture.name_around(region))
    return region.mask if surroundings.sum() > LEAST_HOLE * enclosed.sum() else region.filled


def _name_shape(outline: np.ndarray) -> str | None:
    """The drawn shape that overlaps most when both have the same middle and area. outline: (height, width) bool."""
    overlaps = {name: overlap(outline, shape_cover(name, OUTLINE_SIDE) > 0.5) for name in SHAPES}
    second, best = sorted(overlaps, key=overlaps.__getitem__)[-2:]
    least = LEAST_OVERLAP[best] - (SMALL_ALLOWANCE if _name_size(outline, best) == "small" else 0)
    return best if overlaps[best] >= max(least, overlaps[second] + LEAST_LEAD) else None


def overlap(outline: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two outlines, (height, width) bool of any sizes, with the same middle and area."""
    first, second = _scale(outline), _drawn_outline(other.tobytes(), other.shape)
    return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())


def _name_size(outline: np.ndarray, shape: str | None) -> str:
    """Size class of the square that holds the drawn shape of this area, its hole included."""
    share = _fill(shape_cover(shape, OUTLINE_SIDE) > 0.5).mean() if shape else 0.5
    return ("small", "medium", "large")[np.searchsorted(SIZE_LIMITS, np.sqrt(_fill(outline).sum() / share))]


def _name_texture(tinted: np.ndarray, mask: np.ndarray) -> str:
    """Stripes run from lower left to upper right, so they stay when averaged along that diagonal; dots do not."""
    y, x = np.nonzero(ndimage.binary_erosion(mask, iterations=4))
    tint = tinted[y, x].astype(float)
    if tint.size == 0 or not LEAST_TINT < tint.mean() < 1 - LEAST_TINT:
        return "plain"
    means = np.bincount(x + y, tint) / np.maximum(np.bincount(x + y), 1)
    return "striped" if means[x + y].var() > LEAST_STRIPED * tint.var() else "dotted"


def _holds(relation: str, partners: list[FoundThing | None], things: tuple[FoundThing, ...]) -> bool:
    """Left of, above: boxes apart along that axis (3 px may overlap), centres further apart along it than across."""
    first, second = partners
    if first is None or second is None:
        return False
    if relation == "inside":
        return first.within is not None and things[first.within] is second
    axis = 0 if relation == "left of" else 1
    offset = np.subtract(second.centre, first.centre)
    return bool(second.box[axis] >= first.box[axis + 2] - 3 and offset[axis] > abs(offset[1 - axis]))


def _pair(things: Things, found: tuple[FoundThing, ...]) -> list[FoundThing | None]:
    """The partner of each thing asked for: as many pairs as possible, alike in colour first, then in shape."""
    unlike = np.array([[_unlikeness(thing.look, other) for other in found] for thing in things])
    rows, columns = linear_sum_assignment(unlike.reshape(len(things), len(found)))
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [found[chosen[i]] if i in chosen else None for i in range(len(things))]


def _unlikeness(look: Look, found: FoundThing) -> int:
    weights = {"colour": 8, "shape": 4, "size": 2, "texture": 1}
    return sum(weight for name, weight in weights.items() if getattr(look, name) != getattr(found, name))


def _scale(outline: np.ndarray) -> np.ndarray:
    """An outline in the middle of a square, with OUTLINE_AREA when its hole, which blur narrows, is filled.

    Returns (OUTLINE_SIDE, OUTLINE_SIDE) float32 in [0, 1].
    """
    filled = _fill(outline)
    y, x = ndimage.center_of_mass(filled)
    step = np.sqrt(filled.sum() / OUTLINE_AREA)
    left, top = x + 0.5 - step * OUTLINE_SIDE / 2, y + 0.5 - step * OUTLINE_SIDE / 2
    image = Image.fromarray(outline.astype(np.uint8) * 255)
    sides, mapping = (OUTLINE_SIDE, OUTLINE_SIDE), (step, 0, left, 0, step, top)
    scaled = image.transform(sides, Image.Transform.AFFINE, mapping, Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.float32) / 255


@lru_cache
def _drawn_outline(cover: bytes, shape: tuple[int, int]) -> np.ndarray:
    """`_scale` of an outline that is compared with many others."""
    return _scale(np.frombuffer(cover, bool).reshape(shape))


@lru_cache
def _oklab_grid() -> np.ndarray:
    """Oklab of the RGB colours in steps of 8 per channel, (32768, 3)."""
    steps = np.arange(32) * 8 + 4
    return _oklab(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)).astype(np.float32)


@lru_cache
def _oklab_distances() -> np.ndarray:
    """Distance of each colour of the grid to each of ENTRIES, (32768, entries)."""
    return np.linalg.norm(_oklab_grid()[:, None] - _oklab(ENTRIES).astype(np.float32), axis=-1)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson 2020, "A perceptual color space for image processing". rgb: (..., 3) sRGB in [0, 255]."""
    encoded = np.maximum(rgb, 24) / 255  # Oklab stretches the differences between blacks
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ np.array(RGB_TO_CONES).T)
    return cones @ np.array(CONES_TO_OKLAB).T
