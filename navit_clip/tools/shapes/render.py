"""Draws a scene and encodes it: the third step of the `shapes` data set.

Everything is Pillow drawing on small canvases, because a full-size array per object costs several
times as much. Shapes and textures are drawn at twice their size and reduced, for smooth edges.
"""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw

from navit_clip.tools.shapes.scene import BACKGROUNDS, COLOURS, PlacedObject, Scene

_ARM = 0.34
_CROSS = [(_ARM, 1), (_ARM, _ARM), (1, _ARM), (1, -_ARM), (_ARM, -_ARM), (_ARM, -1)]
# Corners [points, 2] of each shape but the ring, y pointing down, in any scale.
OUTLINES = {
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float),
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)], dtype=float),
    "cross": np.array(_CROSS + [(-x, -y) for x, y in _CROSS], dtype=float),
}

TEXTURE_SHADE = 0.6
COLOUR_JITTER = 10
MAX_TILT_DEGREES = 8.0
RING_HOLE = 0.6  # of the radius
SUPERSAMPLING = 2

PNG_SHARE = 0.2
JPEG_QUALITY = 90


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene in RGB at its size; shading, tilt and phase of textures are random."""
    image = _background(scene, rng)
    for placed in scene.objects:
        side = max(2, round(placed.side))
        silhouette = _silhouette(placed.attributes.shape, side, rng)
        fill = _fill(placed, side, rng)
        image.paste(fill, (round(placed.x - side / 2), round(placed.y - side / 2)), silhouette)
    return image


def encode(image: Image.Image, rng: np.random.Generator) -> tuple[bytes, str]:
    """The bytes and the extension of a JPEG or, with probability `PNG_SHARE`, of a PNG."""
    buffer = io.BytesIO()
    if rng.random() < PNG_SHARE:
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue(), "png"
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), "jpg"


def _background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The background's colour with a light gradient and soft blotches."""
    grid = np.linspace(-1.0, 1.0, 6)
    slope_y, slope_x = rng.uniform(-9.0, 9.0, 2)
    light = slope_y * grid[:, None] + slope_x * grid[None, :] + rng.normal(0.0, 3.0, (6, 6))
    pixels = np.array(BACKGROUNDS[scene.background]) + light[:, :, None]
    coarse = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return coarse.resize((scene.width, scene.height), Image.Resampling.BICUBIC)


def _fill(placed: PlacedObject, side: int, rng: np.random.Generator) -> Image.Image:
    """A square of the object's colour, with its texture in a darker shade of it."""
    base = np.array(COLOURS[placed.attributes.colour])
    base = base + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    colour = tuple(int(v) for v in np.clip(base, 0, 255))
    fill = Image.new("RGB", (side, side), colour)
    if placed.attributes.texture != "plain":
        shade = tuple(int(v * TEXTURE_SHADE) for v in colour)
        fill.paste(shade, (0, 0, side, side), _texture(placed.attributes.texture, side, rng))
    return fill


def _texture(texture: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A mask [side, side] of stripes, dots or checks, coarse relative to the object."""
    size = side * SUPERSAMPLING
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    if texture == "striped":
        angle = math.radians(45.0 * rng.integers(4) + rng.uniform(-8.0, 8.0))
        period, across = size / 2.7, (math.cos(angle), math.sin(angle))
        phase = rng.random()
        for k in range(-4, 5):
            middle = (k + phase) * period
            cx, cy = size / 2 + middle * across[0], size / 2 + middle * across[1]
            ends = [(cx - s * size * across[1], cy + s * size * across[0]) for s in (-1.0, 1.0)]
            draw.line(ends, fill=255, width=round(period / 2))
    else:
        spacing, radius, cell = size / 3.0, size / 9.5, size / 3.8
        phase_x, phase_y = rng.random(2)
        for row, column in itertools.product(range(-1, 5), repeat=2):
            if texture == "dotted":
                cx = (column + phase_x + 0.5 * (row % 2)) * spacing
                cy = (row + phase_y) * spacing
                draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
            elif (row + column) % 2 == 0:
                x, y = (column + phase_x) * cell, (row + phase_y) * cell
                draw.rectangle((x, y, x + cell, y + cell), fill=255)
    return mask.reduce(SUPERSAMPLING)


def _silhouette(shape: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A mask [side, side] of the shape, slightly tilted and touching two opposite edges."""
    size = side * SUPERSAMPLING
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    tilt = math.radians(rng.uniform(-MAX_TILT_DEGREES, MAX_TILT_DEGREES))
    if shape == "ring":
        middle = (size - 1) / 2
        hole = RING_HOLE * middle
        draw.ellipse((0, 0, size - 1, size - 1), fill=255)
        draw.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=0)
    else:
        rotation = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        points = OUTLINES[shape] @ rotation
        low, high = points.min(axis=0), points.max(axis=0)
        points = (points - (low + high) / 2) / (high - low).max() * (size - 1) + (size - 1) / 2
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    return mask.reduce(SUPERSAMPLING)
