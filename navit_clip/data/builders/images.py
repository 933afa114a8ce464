"""The image of a sample, varied, at a random size, some patches left out; for every task's builder.

Everything random follows from the generator that is handed down, of (seed, epoch, id).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from navit_clip.data.augment import AugmentConfig, sample_crop, vary
from navit_clip.data.builders.base import Origin
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.drop import DropConfig, keep_patches, sample_rate
from navit_clip.data.patches import cut_patches
from navit_clip.data.seeding import generator
from navit_clip.data.sizing import ResolutionConfig, sample_grid, sample_patch_size
from navit_clip.packed.images import ImagePatches, Planner


@dataclass(frozen=True)
class ImageBuilder:
    """What builders of samples with an image share.

    Attributes:
        resolution: How large an image becomes.
        drop: Which patches are left out.
        patch_size: P, unless `resolution` has others.
        max_grid_side: Most rows or columns that the model's positions know.
        seed: Of the run.
        augment: How images are varied.
        planner: Of the image tower, if it has one.
    """

    resolution: ResolutionConfig
    drop: DropConfig
    patch_size: int
    max_grid_side: int
    seed: int
    augment: AugmentConfig = field(default=AugmentConfig(), kw_only=True)
    planner: Planner | None = field(default=None, kw_only=True)

    def sample_image(
        self, members: dict[str, bytes], origin: Origin, rng: np.random.Generator, drop: DropConfig
    ) -> ImagePatches:
        """Draws a crop and sizes, decodes the one to the other, cuts into patches, drops some.

        Args:
            members: Of the sample, by extension.
            origin: Of the sample.
            rng: Likewise; drawn from for sizes and looks first, then for the drop.
            drop: Which patches are left out here.

        Raises:
            SkipSampleError: If there is no image, or it cannot be decoded.
        """
        image = EncodedImage(find_image(members), self.resolution.max_pixels)
        aspect = 1.0 if self.resolution.mode == "square" else image.width / image.height
        crop = sample_crop(self.augment, image.height, image.width, aspect, rng)
        size = sample_patch_size(self.resolution, self.patch_size, rng)
        rows, columns = sample_grid(
            self.resolution,
            crop.height if crop else image.height,
            crop.width if crop else image.width,
            size,
            self.max_grid_side,
            rng,
            origin.images_seen,
        )
        pixels_HWK = image.pixels(rows * size, columns * size, crop=crop)
        pixels_HWK = vary(pixels_HWK, self.augment, rng)
        rate = sample_rate(drop, rows * columns, origin.images_seen, rng)
        keep = keep_patches(rows * columns, rate, rng)
        return cut_patches(pixels_HWK, size, keep)


def trim_image(
    image: ImagePatches, tokens: int, seed: int, origin: Origin, name: str
) -> ImagePatches:
    """A random subset of so many patches, in their order: a function of (seed, epoch, id)."""
    return image.kept(trim_places(len(image.patches), tokens, seed, origin, name))


def trim_places(count: int, tokens: int, seed: int, origin: Origin, name: str) -> np.ndarray:
    """Which of so many patches `trim_image` leaves: int64 [tokens], rising."""
    rng = generator(seed, origin.epoch, "trim", name)
    return np.sort(rng.permutation(count)[:tokens])
