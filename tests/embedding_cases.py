"""Images and texts for the Python API, and their vectors one by one by hand."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from navit_clip import NaViTCLIP
from navit_clip.data.sizing import fit_grid
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.texts import pack_texts

PATCH, BUDGET = 8, 12  # of the model in conftest
RNG = np.random.default_rng(0)
SIZES = [
    (1, 1), (1, 300), (300, 1), (8, 8), (7, 9), (90, 31),
    *(tuple(RNG.integers(1, 120, 2)) for _ in range(17)), (40, 60),
]  # fmt: skip
ARRAYS = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
GOOD = ARRAYS[-1]
TEXTS = ["a red square", "", "blue", "a photo of a green circle on the left " * 3, "red"]


def by_hand(
    model: NaViTCLIP, pixels: np.ndarray, max_tokens: int = BUDGET, square: bool = False
) -> torch.Tensor:
    """One image: resized by Pillow, cut by loops, alone in its stream."""
    height, width, _ = pixels.shape
    rows, columns = fit_grid(height, width, PATCH, max_tokens, 16)
    if square:
        rows = columns = math.isqrt(max_tokens)
    resized = np.asarray(
        Image.fromarray(pixels).resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    )
    coords = [(row, column) for row in range(rows) for column in range(columns)]
    patches = [
        resized[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].reshape(-1)
        for r, c in coords
    ]
    image = ImagePatches(np.stack(patches), np.array(coords, dtype=np.int32), (rows, columns))
    with torch.no_grad():
        return model.image_projection(model.image(pack_images([image])))[0]


def text_by_hand(model: NaViTCLIP, text: str) -> torch.Tensor:
    assert model.tokenizer is not None
    with torch.no_grad():
        ids = model.tokenizer.encode(text, model.config.text.context_length)
        return model.text_projection(model.text(pack_texts([ids])))[0]
