"""The image of a sample at its random size, some of its patches left out; for every task's builder.

Everything random follows from the generator that is handed down, of (seed, epoch, id).
"""

from __future__ import annotations

import numpy as np

from navit_clip.data.builders.base import Origin
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.drop import DropConfig, keep_patches, sample_rate
from navit_clip.data.patches import cut_patches
from navit_clip.data.seeding import generator
from navit_clip.data.sizing import ResolutionConfig, sample_grid, sample_patch_size
from navit_clip.packed.images import ImagePatches


def sample_image(
    members: dict[str, bytes],
    rng: np.random.Generator,
    images_seen: int,
    *,
    resolution: ResolutionConfig,
    drop: DropConfig,
    patch_size: int,
    max_grid_side: int,
) -> ImagePatches:
    """Draws sizes of patches and image, decodes to the latter, cuts into patches, drops some.

    Args:
        members: Of the sample, by extension.
        rng: Of the sample; drawn from for the sizes first, then for the drop.
        images_seen: For what follows a schedule.
        resolution: How large an image becomes.
        drop: Which patches are left out.
        patch_size: P, unless `resolution` has others.
        max_grid_side: Most rows or columns that the model's positions know.

    Raises:
        SkipSampleError: If there is no image, or it cannot be decoded.
    """
    image = EncodedImage(find_image(members), resolution.max_pixels)
    patch_size = sample_patch_size(resolution, patch_size, rng)
    rows, columns = sample_grid(
        resolution, image.height, image.width, patch_size, max_grid_side, rng, images_seen
    )
    rate = sample_rate(drop, rows * columns, images_seen, rng)
    keep = keep_patches(rows * columns, rate, rng)
    return cut_patches(image.pixels(rows * patch_size, columns * patch_size), patch_size, keep)


def trim_image(
    image: ImagePatches, tokens: int, seed: int, origin: Origin, name: str
) -> ImagePatches:
    """A random subset of so many patches, in their order: a function of (seed, epoch, id)."""
    return image.kept(trim_places(len(image.patches), tokens, seed, origin, name))


def trim_places(count: int, tokens: int, seed: int, origin: Origin, name: str) -> np.ndarray:
    """Which of so many patches `trim_image` leaves: int64 [tokens], rising."""
    rng = generator(seed, origin.epoch, "trim", name)
    return np.sort(rng.permutation(count)[:tokens])
