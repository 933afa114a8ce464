"""Draws one packed batch: how full it is, some of its samples, and their patches in the stream."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.evaluation.gallery import wrap_text
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches

_COLOURS = ("#1f6feb", "#1a7f37", "#bc4c00", "#8250df", "#bf3989", "#9a6700")
_WIDTH, _MARGIN = 1460, 30
_INNER = _WIDTH - 2 * _MARGIN
_COLUMNS, _ROWS = 6, 3
_CELL = _INNER // _COLUMNS
_THUMB = _CELL - 18  # most pixels of a picture's side
_MOST_ZOOM, _LEAST_ZOOM = 2.5, 0.5
_LINES, _LINE = 3, 18
_BAR = 26
_LEAST_CELL = 8  # pixels of a patch below which lines between patches would hide the photo
_TILES, _STREAM_HEIGHT = (18, 12, 8), 640
_TEXT, _FAINT, _PAPER = "#1f2328", "#656d76", "#ffffff"
_BLANK, _GRID = 246, "#d0d7de"  # a dropped patch is an empty cell, unlike any grey of a photo
_OTHERS = ("#d0d7de", "#e6eaef")  # segments of other samples, alternating


class DrawnSample(NamedTuple):
    """One sample of a batch.

    Attributes:
        id: ``shard/key``.
        image: Kept patches and the grid.
        text: The caption that was tokenised, or names of classes.
        tokens: Number of its tokens in each packed stream.
        segments: Number of its segment in each packed stream.
    """

    id: str
    image: ImagePatches
    text: str
    tokens: dict[str, int]
    segments: dict[str, int]


def pairs_of(
    batch: Batch[PairInputs], caption: Callable[[Sequence[int]], str]
) -> list[DrawnSample]:
    """The pairs of a packed batch on the host, in the order of the image stream.

    `caption` makes text of token ids again.
    """
    inputs = batch.inputs
    streams: dict[str, Any] = {"image": inputs.images, "text": inputs.texts}
    pairs = []
    for i, name in enumerate(batch.ids):
        segments = {stream: int(packed.order[i]) for stream, packed in streams.items()}
        tokens = {own: streams[own].segments.lengths[at] for own, at in segments.items()}
        text = caption(inputs.texts.caption(i))
        pairs.append(DrawnSample(name, inputs.images.image(i), text, tokens, segments))
    return sorted(pairs, key=lambda pair: pair.segments["image"])


def draw_batch(batch: BatchCounts, samples: Sequence[DrawnSample], title: str) -> Image.Image:
    """Draws a batch of samples in the order of the image stream."""
    shown = _choose(samples)
    canvas = Image.new("RGB", (_WIDTH, 4000), _PAPER)
    y = _draw_head(canvas, batch, samples, title, shown)
    y = _draw_gallery(canvas, shown, y)
    y = _draw_patches(canvas, shown, y)
    return canvas.crop((0, 0, _WIDTH, y + _MARGIN))


def _choose(samples: Sequence[DrawnSample]) -> list[DrawnSample]:
    """Pairs spread evenly over the batch, from the shortest image to the longest."""
    count = min(_COLUMNS * _ROWS, len(samples))
    step = (len(samples) - 1) / max(1, count - 1)
    return [samples[round(i * step)] for i in range(count)]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def draw_on_grid(image: ImagePatches, blank: int) -> Image.Image:
    """An image's kept patches on their own grid, dropped ones left in a grey of 0 to 255."""
    (rows, columns), side = image.grid, image.patch_size
    canvas = np.full((rows * side, columns * side, 3), blank, np.uint8)
    for patch, (y, x) in zip(image.patches, image.coords, strict=True):
        window = canvas[y * side : (y + 1) * side, x * side : (x + 1) * side]
        window[:] = patch.reshape(side, side, 3)
    return Image.fromarray(canvas)


def _write(
    canvas: Image.Image, corner: tuple[int, int], text: str, size: int, colour: str = _TEXT
) -> None:
    font = ImageFont.load_default(size)
    ImageDraw.Draw(canvas).text(corner, text, fill=colour, font=font)


def _draw_head(
    canvas: Image.Image,
    batch: BatchCounts,
    samples: Sequence[DrawnSample],
    title: str,
    shown: Sequence[DrawnSample],
) -> int:
    what = "pairs" if "text" in batch.streams else "images"
    _write(canvas, (_MARGIN, 22), f"One packed batch of {title}: {batch.examples:,} {what}", 26)
    y = 62
    if len(shown) < batch.examples:
        each = "every stream" if len(batch.streams) > 1 else "the stream"
        note = f"Every sample is a segment of {each}; coloured are the {len(shown)} below"
        _write(canvas, (_MARGIN, y), note, 15, _FAINT)
        y += 30
    for name, counts in batch.streams.items():
        dropped = counts.tokens_before_drop - counts.tokens
        line = (
            f"{name.capitalize()} stream: {counts.tokens:,} of {counts.budget:,} tokens used, "
            f"{1 - counts.tokens / counts.budget:.2%} padding"
        )
        if dropped:
            line += f" ({dropped:,} of {counts.tokens_before_drop:,} patches were dropped)"
        _write(canvas, (_MARGIN, y), line, 17)
        numbers = {sample.segments[name]: number for number, sample in enumerate(shown)}
        in_order = sorted(samples, key=lambda sample: sample.segments[name])
        lengths = [sample.tokens[name] for sample in in_order]
        _draw_bar(canvas, y + 26, lengths, counts.budget, numbers)
        y += 26 + _BAR + 16
    return y


def _draw_bar(
    canvas: Image.Image, y: int, lengths: Sequence[int], budget: int, numbers: dict[int, int]
) -> None:
    """The whole stream as one bar, a box per segment; what is left of the budget stays empty."""
    draw = ImageDraw.Draw(canvas)
    end = 0
    for segment, length in enumerate(lengths):
        left, end = end, end + length
        number = numbers.get(segment)
        colour = _OTHERS[segment % 2] if number is None else _colour(number)
        x = _MARGIN + left * _INNER // budget
        # Even a segment of less than a pixel is seen if it is one of those shown below.
        right = max(_MARGIN + end * _INNER // budget - 1, x)
        draw.rectangle((x, y, right, y + _BAR), fill=colour)
    draw.rectangle((_MARGIN, y, _MARGIN + _INNER - 1, y + _BAR), outline=_FAINT)


def _draw_gallery(canvas: Image.Image, shown: Sequence[DrawnSample], y: int) -> int:
    sides = [max(sample.image.grid) * sample.image.patch_size for sample in shown]
    zoom = min(_MOST_ZOOM, max(_LEAST_ZOOM, _THUMB / max(sides)))
    # One long strip would make all the others too small to see.
    zooms = [min(zoom, _THUMB / side) for side in sides]
    title = "Images from few patches to many" + (", at one scale" if len(set(zooms)) == 1 else "")
    if any(sample.tokens["image"] < sample.image.tokens_before_drop for sample in shown):
        title += "; empty cells are dropped patches"
    _write(canvas, (_MARGIN, y), title, 17)
    y += 34
    draw = ImageDraw.Draw(canvas)
    for first in range(0, len(shown), _COLUMNS):
        line = range(first, min(first + _COLUMNS, len(shown)))
        pictures = {number: _picture(shown[number], zooms[number]) for number in line}
        tallest = max(picture.height for picture in pictures.values())
        for number, picture in pictures.items():
            left = _MARGIN + (number - first) * _CELL
            top = y + tallest - picture.height
            canvas.paste(picture, (left + 3, top))
            box = (left, top - 3, left + picture.width + 5, top + picture.height + 2)
            draw.rectangle(box, outline=_colour(number), width=3)
            _draw_caption(canvas, shown[number], number, left, y + tallest + 10)
        y += tallest + 10 + (_LINES + 1) * _LINE + 22
    return y


def _picture(sample: DrawnSample, zoom: float) -> Image.Image:
    """The image on its grid, with thin lines between the patches."""
    rows, columns = sample.image.grid
    side = sample.image.patch_size * zoom
    size = (max(1, round(columns * side)), max(1, round(rows * side)))
    picture = draw_on_grid(sample.image, _BLANK).resize(size, Image.Resampling.LANCZOS)
    if side < _LEAST_CELL:
        return picture
    draw = ImageDraw.Draw(picture)
    for column in range(1, columns):
        draw.line((round(column * side), 0, round(column * side), size[1]), fill=_GRID)
    for row in range(1, rows):
        draw.line((0, round(row * side), size[0], round(row * side)), fill=_GRID)
    return picture


def _draw_caption(canvas: Image.Image, sample: DrawnSample, number: int, left: int, y: int) -> None:
    whole = sample.image.tokens_before_drop
    kept = sample.tokens["image"]
    size = f"{kept} patches" if kept == whole else f"{kept} of {whole} patches"
    if "text" in sample.tokens:
        size += f" + {sample.tokens['text']} tokens"
    _write(canvas, (left, y), size, 14, _colour(number))
    wrapped = wrap_text(sample.text, ImageFont.load_default(14), _CELL - 24, _LINES)
    for line, text in enumerate(wrapped, start=1):
        _write(canvas, (left, y + line * _LINE), text, 14)


def _draw_patches(canvas: Image.Image, shown: Sequence[DrawnSample], y: int) -> int:
    """The patches of the samples shown as they lie in the stream, as many as there is room for."""
    images = [sample.image for sample in shown]
    ends = list(itertools.accumulate(len(image.patches) for image in images))
    for tile in _TILES:
        columns, line = _INNER // (tile + 2), tile + 8
        fitting = max(1, bisect_right(ends, columns * (_STREAM_HEIGHT // line)))
        if fitting == len(images):
            break
    which = "all" if fitting == len(images) else f"the first {fitting}"
    title = f"Their patches as the image tower reads them: {which} end to end, underlined by colour"
    _write(canvas, (_MARGIN, y), title, 17)
    y += 32
    draw, position = ImageDraw.Draw(canvas), 0
    for number, image in enumerate(images[:fitting]):
        side = image.patch_size
        for patch in image.patches:
            left = _MARGIN + position % columns * (tile + 2)
            top = y + position // columns * line
            picture = Image.fromarray(patch.reshape(side, side, 3)).resize((tile, tile))
            canvas.paste(picture, (left, top))
            box = (left, top + tile + 1, left + tile + 1, top + tile + 3)
            draw.rectangle(box, fill=_colour(number))
            position += 1
    return y + -(-position // columns) * line
