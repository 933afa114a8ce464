"""What a picture shows and where: the first step of the `shapes` data set.

A `Scene` holds one to three objects on a background. Attributes are drawn first, as `Description`,
because the splits accept or reject a scene by them alone; `lay_out` then chooses the image's size
and places the objects so that none overlaps and neighbours have a clear left/right/above/below.
`wording` and `render` read the result.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Names with their RGB values, all far apart but those of two backgrounds.
COLOURS = {
    "red": (222, 32, 38),
    "orange": (250, 132, 20),
    "yellow": (250, 222, 30),
    "lime": (150, 235, 30),
    "green": (28, 150, 60),
    "teal": (0, 110, 115),
    "cyan": (20, 205, 235),
    "blue": (40, 80, 225),
    "purple": (120, 40, 160),
    "magenta": (215, 20, 160),
    "pink": (255, 140, 190),
    "brown": (125, 70, 25),
}
BACKGROUNDS = {
    "white": (247, 247, 247),
    "grey": (140, 140, 140),
    "black": (18, 18, 18),
    "beige": (226, 204, 160),
    "mint": (178, 226, 196),
    "lavender": (200, 192, 240),
}
SHAPES = ("square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
CLASSES = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

TEXTURE_WEIGHTS = (0.49, 0.17, 0.17, 0.17)
OBJECT_COUNT_WEIGHTS = (0.7, 0.18, 0.12)
MIN_SIDE = 48
NEAR_SQUARE_ASPECT = 1.2
GAP = 0.025

# A pair is "left of" or "above" only if one axis clearly dominates the other.
DOMINANCE = 1.5

HELD_OUT_BUCKETS = 16


@dataclass(frozen=True)
class Style:
    """How large objects are in their pictures, and how long these.

    Attributes:
        sides: Object side as a fraction of sqrt(width * height), by number of objects and size.
            Within each number, and over all of them, the two words are far apart.
        units: Smallest and largest sqrt(width * height) in pixels.
        max_side: Most pixels of a side.
        max_aspect: Most that the long side is of the short one.
    """

    sides: dict[int, dict[str, tuple[float, float]]]
    units: tuple[float, float]
    max_side: int
    max_aspect: float


# As large as their number lets them be, since a shape is learnt from the few patches it covers. The
# smallest images still give an object enough pixels for its texture.
EASY = Style(
    sides={
        1: {"small": (0.39, 0.43), "large": (0.70, 0.78)},
        2: {"small": (0.30, 0.33), "large": (0.49, 0.53)},
        3: {"small": (0.27, 0.30), "large": (0.45, 0.48)},
    },
    units=(88.0, 224.0),
    max_side=320,
    max_aspect=3.0,
)
# A small mark in many tokens has about as many pixels as a large one in few, and cannot be read in
# those. Long strips leave little height to a mark, and squashed to a square little width.
HARD = Style(
    sides={
        1: {"small": (0.17, 0.20), "large": (0.29, 0.33)},
        2: {"small": (0.16, 0.19), "large": (0.28, 0.32)},
        3: {"small": (0.15, 0.18), "large": (0.26, 0.30)},
    },
    units=(96.0, 224.0),
    max_side=640,
    max_aspect=6.0,
)


class Attributes(NamedTuple):
    """One object in words: members of `SIZES`, `TEXTURES`, `COLOURS` and `SHAPES`."""

    size: str
    texture: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Description:
    """A scene in words.

    Attributes:
        background: Member of `BACKGROUNDS`.
        objects: One to three objects in any order; no two share both colour and shape, so that
            "the red circle" always names one of them.
    """

    background: str
    objects: tuple[Attributes, ...]

    def is_reserved(self) -> bool:
        """Whether these objects are kept for held-out sets, on whatever background.

        One in `HELD_OUT_BUCKETS` combinations of two or three objects is, by a hash that does not
        change between processes or Python versions. One-object scenes are never reserved: there are
        too few of them to keep any out of training.
        """
        if len(self.objects) == 1:
            return False
        text = ";".join(" ".join(attributes) for attributes in sorted(self.objects))
        return zlib.crc32(text.encode()) % HELD_OUT_BUCKETS == 0


@dataclass(frozen=True)
class PlacedObject:
    """An object and the square around it: centre `x`, `y` and `side` in pixels."""

    attributes: Attributes
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """A scene as it will be drawn; `width` and `height` in pixels."""

    width: int
    height: int
    background: str
    objects: tuple[PlacedObject, ...]


def relation(a: PlacedObject, b: PlacedObject) -> str | None:
    """Where `a` is as seen from `b`: left, right, above, below, or None if that is not clear."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= DOMINANCE * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= DOMINANCE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def sample_description(rng: np.random.Generator) -> Description:
    """Draws one to three objects of different classes on a background."""
    count = 1 + int(np.searchsorted(np.cumsum(OBJECT_COUNT_WEIGHTS)[:-1], rng.random(), "right"))
    classes = rng.choice(len(CLASSES), size=count, replace=False)
    return describe_classes(rng, classes)


def describe_classes(rng: np.random.Generator, classes: Iterable[int]) -> Description:
    """Draws a background, and texture and size of an object of each of `CLASSES[classes]`."""
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    objects = []
    for index in classes:
        texture = str(rng.choice(TEXTURES, p=TEXTURE_WEIGHTS))
        objects.append(Attributes(SIZES[rng.integers(len(SIZES))], texture, *CLASSES[index]))
    return Description(background, tuple(objects))


def lay_out(description: Description, rng: np.random.Generator, style: Style = EASY) -> Scene:
    """Draws an image size that holds the objects, and places them inside and apart."""
    while True:
        width, height = _sample_size(style, rng)
        unit = math.sqrt(width * height)
        ranges = style.sides[len(description.objects)]
        sides = np.array([rng.uniform(*ranges[o.size]) for o in description.objects]) * unit
        centres = _place(sides, width, height, GAP * unit, rng)
        # Three large objects do not fit every aspect ratio; another image size will.
        if centres is not None:
            break
    placed = tuple(
        PlacedObject(attributes, float(x), float(y), float(side))
        for attributes, (x, y), side in zip(description.objects, centres, sides, strict=True)
    )
    return Scene(width, height, description.background, placed)


def _sample_size(style: Style, rng: np.random.Generator) -> tuple[int, int]:
    """Half of the images within 20% of square, half from there to the longest, either way up."""
    near_square, landscape = rng.random(2) < 0.5
    most = style.max_aspect
    low, high = (1.0, NEAR_SQUARE_ASPECT) if near_square else (NEAR_SQUARE_ASPECT, most)
    aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
    root = math.sqrt(aspect)
    smallest = max(style.units[0], MIN_SIDE * root)
    largest = min(style.units[1], style.max_side / root)
    unit = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    long, short = round(unit * root), round(unit / root)
    # Rounding must not push an image past the longest.
    long = min(long, int(most * short), style.max_side)
    return (long, short) if landscape else (short, long)


def _place(
    sides: np.ndarray, width: int, height: int, gap: float, rng: np.random.Generator
) -> np.ndarray | None:
    """Returns centres [objects, 2] in pixels, or None if the objects do not fit."""
    near_square = max(width, height) < NEAR_SQUARE_ASPECT * min(width, height)
    along_x = bool(rng.random() < 0.5) if near_square else width > height
    long, short = (width, height) if along_x else (height, width)
    layouts = [_one_row, _two_rows] if len(sides) == 3 else [_one_row]
    if near_square and rng.random() < 0.5:
        layouts.reverse()
    for layout in layouts:
        centres = layout(sides, long, short, gap, rng)
        if centres is not None:
            return centres if along_x else centres[:, ::-1]
    return None


def _one_row(
    sides: np.ndarray, long: int, short: int, gap: float, rng: np.random.Generator
) -> np.ndarray | None:
    """All objects one after the other on the long axis; centres [objects, 2] as (long, short)."""
    along = _spread(sides, long, gap, rng)
    room = short - 2 * gap - sides
    if along is None or room.min() < 0:
        return None
    offset = rng.uniform(-0.5, 0.5, len(sides)) * room
    if len(sides) > 1:
        # Pulled to the middle line until neighbours are clearly beside each other.
        steps = np.maximum(np.abs(np.diff(offset)), 1e-9)
        offset *= min(1.0, 0.99 * float((np.diff(along) / steps).min()) / DOMINANCE)
    return np.stack([along, short / 2 + offset], axis=1)


def _two_rows(
    sides: np.ndarray, long: int, short: int, gap: float, rng: np.random.Generator
) -> np.ndarray | None:
    """Two of three objects in one row, the third in the other; centres [3, 2] as (long, short)."""
    row_sides = np.array([sides[:2].max(), sides[2]])
    order = [0, 1] if rng.random() < 0.5 else [1, 0]
    rows = _spread(row_sides[order], short, gap, rng)
    pair, third = _spread(sides[:2], long, gap, rng), _spread(sides[2:], long, gap, rng)
    if rows is None or pair is None or third is None:
        return None
    return np.stack([np.concatenate([pair, third]), rows[order][[0, 0, 1]]], axis=1)


def _spread(
    sides: np.ndarray, length: int, gap: float, rng: np.random.Generator
) -> np.ndarray | None:
    """Centres of intervals `sides` long, in order, with at least `gap` around each."""
    slack = length - sides.sum() - gap * (len(sides) + 1)
    if slack < 0:
        return None
    before = np.diff(np.sort(rng.random(len(sides))), prepend=0.0) * slack
    return np.cumsum(before + gap + sides) - sides / 2
