"""Batches as NaViT's recipe makes them, without photos: random pixels and ids of its lengths."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair, PairInputs
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches
from navit_clip.tasks.contrastive import ContrastiveTask

_LEAST_PATCHES, _MOST_PATCHES = 4, 16  # of a side: 64 to 256 pixels
_WORDS, _MOST_WORDS = 13.3, 24
# Of the Beta distribution of dropped patches, between 0 and 0.9 with a mean of 0.53.
_DROP_SHAPE, _MOST_DROP = (1.374, 0.959), 0.9


def draw_lengths(
    image_tokens: int, text_tokens: int, seed: int = 0
) -> tuple[list[tuple[int, tuple[int, int]]], list[int]]:
    """Lengths that fill two streams: kept patches and grid of each image, tokens of each caption.

    Sides ~ U(64, 256) pixels, 53% of the patches dropped on average, captions of 14 tokens.
    """
    rng = np.random.default_rng(seed)
    images: list[tuple[int, tuple[int, int]]] = []
    captions: list[int] = []
    image_total = text_total = 0
    while True:
        side = rng.uniform(_LEAST_PATCHES, _MOST_PATCHES)
        aspect = float(np.clip(np.exp(rng.normal(0.2, 0.35)), 0.4, 2.5))
        rows, columns = (max(1, round(side * aspect**power)) for power in (-0.5, 0.5))
        kept = max(1, round(rows * columns * (1 - _MOST_DROP * rng.beta(*_DROP_SHAPE))))
        words = int(np.clip(round(rng.lognormal(math.log(_WORDS), 0.32)), 3, _MOST_WORDS))
        if image_total + kept > image_tokens or text_total + words > text_tokens:
            return images, captions
        image_total, text_total = image_total + kept, text_total + words
        images.append((kept, (rows, columns)))
        captions.append(words)


def draw_batch(
    task: ContrastiveTask, image_tokens: int, text_tokens: int, seed: int
) -> Batch[PairInputs]:
    """One batch that fills both budgets, in page-locked memory where there is a GPU to copy to."""
    model = task.config.model
    tokenizer = SimpleNamespace(vocab_size=model.text.vocab_size)
    build = task.build_samples(cast(Any, tokenizer), seed)
    rng = np.random.default_rng(seed)
    pixels = 3 * model.image.patch_size**2
    pairs = []
    lengths = zip(*draw_lengths(image_tokens, text_tokens, seed), strict=True)
    for number, ((kept, grid), words) in enumerate(lengths):
        keep = np.sort(rng.permutation(grid[0] * grid[1])[:kept])
        coords = np.stack(np.divmod(keep, grid[1]), 1).astype(np.int32)
        patches = rng.integers(0, 256, (kept, pixels), dtype=np.uint8)
        ids = rng.integers(0, model.text.vocab_size, words).tolist()
        image = ImagePatches(patches, coords, grid)
        pairs.append(Pair(str(number), Origin(0, 0, 0, 0), image, ids, seed))
    inputs = build.collate(pairs, (image_tokens, text_tokens))
    return Batch(inputs, tuple(pair.id for pair in pairs), BatchCounts(len(pairs)))
