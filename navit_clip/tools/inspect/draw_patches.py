"""Draws patches: an image on its own grid with holes where some were dropped, and a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from navit_clip.packed.images import ImagePatches

_COLOURS = ("#1f6feb", "#1a7f37", "#bc4c00", "#8250df", "#bf3989", "#9a6700")


def colour_of(number: int) -> str:
    """The colour of the picture of this number; they repeat."""
    return _COLOURS[number % len(_COLOURS)]


def patch_side(image: ImagePatches) -> int:
    """P, in pixels."""
    return math.isqrt(image.patches.shape[1] // 3)


def draw_on_grid(image: ImagePatches, blank: int) -> Image.Image:
    """An image's kept patches on their own grid, dropped ones left in a grey of 0 to 255."""
    rows, columns = image.grid
    side = patch_side(image)
    canvas = np.full((rows * side, columns * side, 3), blank, np.uint8)
    for patch, (y, x) in zip(image.patches, image.coords, strict=True):
        window = canvas[y * side : (y + 1) * side, x * side : (x + 1) * side]
        window[:] = patch.reshape(side, side, 3)
    return Image.fromarray(canvas)


def draw_stream(
    canvas: Image.Image,
    images: Sequence[ImagePatches],
    corner: tuple[int, int],
    columns: int,
    side: int,
    line_height: int,
) -> int:
    """Draws the patches of images one after another in lines, underlined in the image's colour.

    Args:
        canvas: Drawn on.
        images: In the stream's order; see `colour_of`.
        corner: Left and top pixel.
        columns: Patches per line.
        side: Pixels of a patch on the canvas; two more are left between neighbours.
        line_height: Pixels from line to line.

    Returns:
        The first row of pixels below.
    """
    draw = ImageDraw.Draw(canvas)
    cell = side + 2
    position = 0
    for number, image in enumerate(images):
        own = patch_side(image)
        for patch in image.patches:
            left = corner[0] + position % columns * cell
            top = corner[1] + position // columns * line_height
            tile = Image.fromarray(patch.reshape(own, own, 3)).resize((side, side))
            canvas.paste(tile, (left, top))
            line = (left, top + side + 1, left + cell - 1, top + side + 3)
            draw.rectangle(line, fill=colour_of(number))
            position += 1
    return corner[1] + -(-position // columns) * line_height
