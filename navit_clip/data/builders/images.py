"""The image of a sample at its random size, some of its patches left out; for every task's builder.

Everything random follows from the generator that is handed down, of (seed, epoch, id).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navit_clip.data.builders.base import Origin
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.drop import DropConfig, keep_patches, sample_rate
from navit_clip.data.patches import cut_patches
from navit_clip.data.seeding import generator
from navit_clip.data.sizing import ResolutionConfig, sample_grid, sample_patch_size
from navit_clip.packed.images import ImagePatches


@dataclass(frozen=True)
class ImageBuilder:
    """What builders of samples with an image share.

    Attributes:
        resolution: How large an image becomes.
        drop: Which patches are left out.
        patch_size: P, unless `resolution` has others.
        max_grid_side: Most rows or columns that the model's positions know.
        seed: Of the run.
    """

    resolution: ResolutionConfig
    drop: DropConfig
    patch_size: int
    max_grid_side: int
    seed: int

    def sample_image(
        self, members: dict[str, bytes], origin: Origin, rng: np.random.Generator, drop: DropConfig
    ) -> ImagePatches:
        """Draws sizes of patches and image, decodes to the latter, cuts into patches, drops some.

        Args:
            members: Of the sample, by extension.
            origin: Of the sample.
            rng: Likewise; drawn from for the sizes first, then for the drop.
            drop: Which patches are left out here.

        Raises:
            SkipSampleError: If there is no image, or it cannot be decoded.
        """
        image = EncodedImage(find_image(members), self.resolution.max_pixels)
        size = sample_patch_size(self.resolution, self.patch_size, rng)
        rows, columns = sample_grid(
            self.resolution,
            image.height,
            image.width,
            size,
            self.max_grid_side,
            rng,
            origin.images_seen,
        )
        rate = sample_rate(drop, rows * columns, origin.images_seen, rng)
        keep = keep_patches(rows * columns, rate, rng)
        return cut_patches(image.pixels(rows * size, columns * size), size, keep)


def trim_image(
    image: ImagePatches, tokens: int, seed: int, origin: Origin, name: str
) -> ImagePatches:
    """A random subset of so many patches, in their order: a function of (seed, epoch, id)."""
    return image.kept(trim_places(len(image.patches), tokens, seed, origin, name))


def trim_places(count: int, tokens: int, seed: int, origin: Origin, name: str) -> np.ndarray:
    """Which of so many patches `trim_image` leaves: int64 [tokens], rising."""
    rng = generator(seed, origin.epoch, "trim", name)
    return np.sort(rng.permutation(count)[:tokens])
