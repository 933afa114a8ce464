"""Draws docs/packing.png: the front of one training batch, patch by patch, as the tower sees it.

``python docs/draw_packing.py --shards data/shapes/train --output docs/packing.png``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from navit_clip.data.config import DataConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.reader import Reader
from navit_clip.data.sample import PairBuilder
from navit_clip.data.shards import expand_shards
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.data.tokenizer import OpenClipTokenizer
from navit_clip.packing import Budgets, ImagePatches

PATCH, ZOOM, COLUMNS, ROWS = 16, 1.5, 36, 8
CELL = int(PATCH * ZOOM) + 2
COLOURS = ("#1f6feb", "#1a7f37", "#bc4c00", "#8250df", "#bf3989", "#9a6700")


def place(image: ImagePatches) -> Image.Image:
    """An image's kept patches on their own grid, dropped ones left grey."""
    rows, columns = image.grid
    canvas = np.full((rows * PATCH, columns * PATCH, 3), 225, np.uint8)
    for patch, (y, x) in zip(image.patches, image.coords, strict=True):
        window = canvas[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        window[:] = patch.reshape(PATCH, PATCH, 3)
    return Image.fromarray(canvas)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = DataConfig(
        resolution=ResolutionConfig(min_side=64, max_side=160, max_tokens=100),
        drop=DropConfig(kind="beta", rate=0.25, max_rate=0.6),
        budget=Budgets(image_tokens=COLUMNS * ROWS, text_tokens=1024, max_pairs=64),
        shuffle_buffer=1,
    )
    build = PairBuilder(config, OpenClipTokenizer(), 32, PATCH, 64, seed=7)
    batch = next(Reader(expand_shards(args.shards), build, 0, 1).batches())
    packed = batch.images
    lengths = packed.segments.lengths[: packed.segments.num_examples]
    spans = zip(packed.patches.split(packed.segments.lengths), lengths, strict=False)
    coords = packed.coords.split(packed.segments.lengths)
    images = [
        ImagePatches(patches.numpy(), coords[i].numpy(), tuple(packed.grids[i].tolist()))
        for i, (patches, _) in enumerate(spans)
        if i < len(lengths)
    ]

    width = COLUMNS * CELL + 40
    canvas = Image.new("RGB", (width, 1200), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    draw.text((20, 14), "Images at their own size and shape, some patches dropped", "#1f2328", font)
    x, y, tallest = 20, 46, 0
    for i, image in enumerate(images):
        picture = place(image)
        if x + picture.width > width - 20:
            x, y, tallest = 20, y + tallest + 14, 0
        canvas.paste(picture, (x, y))
        box = (x - 2, y - 2, x + picture.width + 1, y + picture.height + 1)
        draw.rectangle(box, outline=COLOURS[i % len(COLOURS)], width=2)
        x, tallest = x + picture.width + 14, max(tallest, picture.height)
    y += tallest + 22
    text = f"One stream: {sum(lengths)} tokens of {len(images)} images, no padding between them"
    draw.text((20, y), text, "#1f2328", font)
    y += 32
    place_in_stream = 0
    for i, image in enumerate(images):
        for patch in image.patches:
            left = 20 + place_in_stream % COLUMNS * CELL
            top = y + place_in_stream // COLUMNS * (CELL + 6)
            side = CELL - 2
            tile = Image.fromarray(patch.reshape(PATCH, PATCH, 3)).resize((side, side))
            canvas.paste(tile, (left, top))
            line = (left, top + side + 1, left + CELL - 1, top + side + 3)
            draw.rectangle(line, fill=COLOURS[i % len(COLOURS)])
            place_in_stream += 1
    bottom = y + -(-place_in_stream // COLUMNS) * (CELL + 6) + 12
    canvas.crop((0, 0, width, bottom)).quantize(128).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
