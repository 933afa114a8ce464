"""Mixup and CutMix of the images of one batch, each with another one of the same grid.

When a batch is put together, on patches: an image keeps its own places and takes from the other
what lies there, whether the other one kept it or not, as if whole images were mixed and patches
dropped afterwards. So streams, lengths and budgets stay what they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from navit_clip.data.augment import AugmentConfig
from navit_clip.packed.images import ImagePatches


def partners(grids: Sequence[tuple[int, int]]) -> list[int]:
    """Which image each is mixed with: the next of its grid, for the last one the first.

    Returns:
        An index for each grid; its own where no other is alike.
    """
    alike = defaultdict(list)
    for index, grid in enumerate(grids):
        alike[grid].append(index)
    found = [0] * len(grids)
    for group in alike.values():
        for index, following in zip(group, group[1:] + group[:1], strict=True):
            found[index] = following
    return found


def mix(
    config: AugmentConfig, image: ImagePatches, other: np.ndarray, rng: np.random.Generator
) -> tuple[ImagePatches, float]:
    """Mixes an image with another one.

    Mixup (arXiv 1710.09412) blends all pixels, CutMix (1905.04899) pastes a rectangle of the other.

    Args:
        config: Its `mixup` and `cutmix`, one of them at least positive.
        image: Perhaps with some of its patches dropped.
        other: uint8 [rows·columns, P·P·3] all patches of an image with the same grid.
        rng: Drawn from.

    Returns:
        The image with other pixels, and what fraction of them is its own.
    """
    there = other[image.coords[:, 0] * image.grid[1] + image.coords[:, 1]]
    cuts = config.mixup == 0 or (config.cutmix > 0 and rng.random() < 0.5)
    alpha = config.cutmix if cuts else config.mixup
    own = rng.beta(alpha, alpha)
    if cuts:
        pasted = _pasted(image, own, rng)
        own = 1 - float(pasted.mean())  # of what is seen, at the border and after token drop
        mixed = np.where(pasted, there, image.patches)
    else:
        share = np.float32(own)
        mixed = np.rint(share * image.patches + (1 - share) * there).astype(np.uint8)
    return replace(image, patches=mixed), own


def _pasted(image: ImagePatches, own: float, rng: np.random.Generator) -> np.ndarray:
    """Which values are of the other image: bool [n, P·P·3], a rectangle of 1 - `own` of the area.

    Its centre may be any pixel; past the border it is cut off.
    """
    size, inside = image.patch_size, []
    for axis, patches in enumerate(image.grid):
        side = patches * size
        centre, half = rng.integers(side), side * math.sqrt(1 - own) / 2
        within = np.abs(np.arange(side) + 0.5 - centre) < half
        inside.append(within.reshape(patches, size)[image.coords[:, axis]])
    inside_n_rows, inside_n_columns = inside
    pixels = inside_n_rows[:, :, None] & inside_n_columns[:, None, :]
    return pixels.reshape(len(pixels), -1).repeat(3, axis=1)
