"""Images of one grid, found among packed ones, for what cannot be computed patch by patch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from navit_clip.packed.images import PackedImages
from navit_clip.packed.movable import Movable


@dataclass(frozen=True)
class EqualGrids(Movable):
    """Images grid by grid; what `PackedImages.plan` is for a tower with a stem.

    Attributes:
        places: int64 [T], the patches of each image in turn, without padding.
        grids: Rows and columns of each grid, and how many images have it.
    """

    places: Tensor
    grids: tuple[tuple[int, int, int], ...]


def plan_grids(images: PackedImages) -> EqualGrids:
    """Sorts whole images by their grids; waits for the images' device.

    Raises:
        ValueError: If patches were dropped.
    """
    lengths = images.segments.lengths[: images.segments.num_examples]
    starts = defaultdict(list)
    grids = images.grids[: len(lengths)].tolist()
    for (rows, columns), length, start in zip(
        grids, lengths, accumulate(lengths, initial=0), strict=False
    ):
        if length != rows * columns:
            raise ValueError(f"a stem needs whole images, got {length} of {rows}×{columns}")
        starts[rows, columns].append(start)
    places = [
        np.add.outer(group, np.arange(rows * columns)).ravel()
        for (rows, columns), group in starts.items()
    ]
    return EqualGrids(
        torch.from_numpy(np.concatenate(places)),
        tuple((*grid, len(group)) for grid, group in starts.items()),
    )
