"""Patches of many images, end to end in one stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from navit_clip.packed.movable import Movable
from navit_clip.packed.segments import Segments, order_by_length


@dataclass(frozen=True)
class ImagePatches:
    """One image, cut into patches, perhaps with some of them dropped.

    Attributes:
        patches: uint8 [n, P·P·3] kept patches, each row by row with channels last.
        coords: int32 [n, 2] row and column of each kept patch on the image's own grid.
        grid: Rows and columns of the whole grid, before any patch was dropped.
        targets: [n, ...] what a task wants at each kept patch, None for tasks without.
    """

    patches: np.ndarray
    coords: np.ndarray
    grid: tuple[int, int]
    targets: np.ndarray | None = None

    @property
    def patch_size(self) -> int:
        """P, side of a patch in pixels."""
        return math.isqrt(self.patches.shape[1] // 3)

    @property
    def tokens_before_drop(self) -> int:
        """Patches of the whole grid."""
        return self.grid[0] * self.grid[1]

    def kept(self, keep: np.ndarray) -> ImagePatches:
        """The image with only some of its patches and their targets, by int64 [m] indices."""
        targets = None if self.targets is None else self.targets[keep]
        return ImagePatches(self.patches[keep], self.coords[keep], self.grid, targets)


@dataclass(frozen=True)
class PackedImages(Movable):
    """Patches of many images, all of one size, end to end.

    Attributes:
        patches: uint8 [T, P·P·3]; normalised on the device by the image tower.
        coords: int32 [T, 2] row and column of each patch on its image's grid.
        grids: int32 [len(segments.lengths), 2] rows and columns of each image's whole grid.
        segments: Where each image lies; sorted by length, see `pack_images`.
        order: int64 [E]: the caller's i-th image is segment `order[i]`.
        targets: [T, ...] targets of each patch, zero at padding; None for tasks without.
        plan: What a `Planner` made of the others, for a tower that has one; None leaves it to the
            tower, which then waits for the device.
    """

    patches: Tensor
    coords: Tensor
    grids: Tensor
    segments: Segments
    order: Tensor
    targets: Tensor | None = None
    plan: Movable | None = None

    @property
    def patch_size(self) -> int:
        """P, side of a patch in pixels."""
        return math.isqrt(self.patches.shape[1] // 3)

    def image(self, index: int) -> ImagePatches:
        """The caller's image of this index again, without its targets; waits for the device."""
        segment = int(self.order[index])
        begin, end = self.segments.offsets[segment : segment + 2].tolist()
        rows, columns = self.grids[segment].tolist()
        patches, coords = self.patches[begin:end].cpu(), self.coords[begin:end].cpu()
        return ImagePatches(patches.numpy(), coords.numpy(), (rows, columns))


Planner = Callable[[PackedImages], Movable]
"""What a tower's host must know of images before it can begin: how they lie in windows, say.

Made of images on the host, best where they are packed.
"""


def pack_images(
    images: Sequence[ImagePatches], *, budget: int | None = None, planner: Planner | None = None
) -> PackedImages:
    """Lays the patches of many images end to end.

    Segments are sorted by length, so that images of equal length lie side by side and attention
    without a variable-length kernel can take each group of them as one batched call. `order`
    undoes the sorting after pooling.

    Args:
        images: At least one image; all of them with targets, or none.
        budget: Pad the stream to this many tokens, so that its shape never changes.
        planner: Of the tower that reads them, if it has one.

    Raises:
        ValueError: If there is no image, more tokens than `budget`, or targets for some images.
    """
    lengths = [len(image.patches) for image in images]
    sort, segments, order = order_by_length("image", lengths, budget)
    rows, padding = [images[i] for i in sort], segments.padding
    targets = [image.targets for image in rows if image.targets is not None]
    if targets and len(targets) < len(rows):
        raise ValueError(f"{len(targets)} of {len(rows)} images have targets: give all or none")
    grids = np.array([image.grid for image in rows] + [(1, 1)] * bool(padding), dtype=np.int32)
    packed = PackedImages(
        _concatenate([image.patches for image in rows], padding),
        _concatenate([image.coords for image in rows], padding),
        torch.from_numpy(grids),
        segments,
        order,
        _concatenate(targets, padding) if targets else None,
    )
    return packed if planner is None else replace(packed, plan=planner(packed))


def _concatenate(parts: Sequence[np.ndarray], padding: int) -> Tensor:
    """Joins along the first axis and adds rows of zeros, in one copy of what may be 12 MB."""
    total = sum(map(len, parts))
    joined = np.empty((total + padding, *parts[0].shape[1:]), parts[0].dtype)
    np.concatenate(parts, out=joined[:total])
    joined[total:] = 0
    return torch.from_numpy(joined)
