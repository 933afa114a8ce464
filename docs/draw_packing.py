"""Draws docs/packing.png: the front of one training batch, patch by patch, as the tower sees it.

``python docs/draw_packing.py --shards data/shapes/train --output docs/packing.png``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from navit_clip.data.budgets import Budgets
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.mixture import Mixture
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.packed.images import ImagePatches
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tools.inspect.draw_patches import colour_of, draw_on_grid, draw_stream
from navit_clip.tools.inspect.packing_efficiency import measure_packing

PATCH, TILE, COLUMNS, ROWS = 16, 24, 36, 8
WIDTH = COLUMNS * (TILE + 2) + 40


def draw(images: Sequence[ImagePatches]) -> Image.Image:
    """The images of a batch on their own grids, and below them the stream they make."""
    canvas = Image.new("RGB", (WIDTH, 1200), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    draw.text((20, 14), "Images at their own size and shape, some patches dropped", "#1f2328", font)
    x, y, tallest = 20, 46, 0
    for i, image in enumerate(images):
        picture = draw_on_grid(image, blank=225)
        if x + picture.width > WIDTH - 20:
            x, y, tallest = 20, y + tallest + 14, 0
        canvas.paste(picture, (x, y))
        box = (x - 2, y - 2, x + picture.width + 1, y + picture.height + 1)
        draw.rectangle(box, outline=colour_of(i), width=2)
        x, tallest = x + picture.width + 14, max(tallest, picture.height)
    y += tallest + 22
    tokens = sum(len(image.patches) for image in images)
    text = f"One stream: {tokens} tokens of {len(images)} images, no padding between them"
    draw.text((20, y), text, "#1f2328", font)
    bottom = draw_stream(canvas, images, (20, y + 32), COLUMNS, TILE, TILE + 8)
    return canvas.crop((0, 0, WIDTH, bottom + 12))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = DataConfig(
        train=args.shards,
        resolution=ResolutionConfig(min_side=64, max_side=160, max_tokens=100),
        drop=DropConfig(kind="beta", rate=0.25, max_rate=0.6),
        budget=Budgets({"image": COLUMNS * ROWS, "text": 1024}, max_examples=64),
        shuffle_buffer=1,
        workers=0,
    )
    build = PairBuilder(
        {"txt": 1.0}, config.resolution, config.drop, OpenClipTokenizer(), 32, PATCH, 64, seed=7
    )
    pairs = measure_packing(Mixture.find(config), build, config, pairs=1).pairs
    draw([pair.image for pair in pairs]).quantize(128).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
