"""Small random examples and every variant of the model, for tests of the packed model."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

from navit_clip.models.position import PositionConfig
from navit_clip.packed.images import ImagePatches

POOLINGS = ("map", "mean", "cls", "last")
FACTORISED = [
    PositionConfig("factorised", coordinates, embedding, combine, table_side=9)
    for coordinates, embedding, combine in itertools.product(
        ("absolute", "fractional"),
        ("learned", "sinusoidal", "fourier"),
        ("sum", "product", "stack"),
    )
]
POSITIONS = [
    *FACTORISED,
    PositionConfig("learned_2d", table_side=9),
    PositionConfig("learned_1d", table_side=4),
]


def position_name(config: PositionConfig) -> str:
    """For a test's id."""
    if config.kind != "factorised":
        return config.kind
    return f"{config.coordinates}-{config.embedding}-{config.combine}"


def random_image(
    seed: int, grid: tuple[int, int], *, patch_size: int = 2, keep: int | None = None
) -> ImagePatches:
    """An image of random pixels; with `keep`, only so many of its patches, chosen at random."""
    rng = np.random.default_rng(seed)
    rows, columns = grid
    count = rows * columns
    patches = rng.integers(0, 256, (count, 3 * patch_size**2), dtype=np.uint8)
    coords = np.stack(np.divmod(np.arange(count), columns), axis=1).astype(np.int32)
    kept = np.sort(rng.permutation(count)[: count if keep is None else keep])
    return ImagePatches(patches[kept], coords[kept], grid)


def random_caption(seed: int, length: int, *, vocab_size: int = 11) -> list[int]:
    """A caption of random ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def randomise(module: nn.Module, seed: int, std: float = 0.2) -> None:
    """Moves every parameter off its first value: zeros and ones would hide a missing term."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
