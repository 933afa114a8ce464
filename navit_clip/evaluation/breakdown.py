"""Groups of images by shape and by size: where a model is good, and where resolution helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Where a group ends and the next begins. Screens and most cameras are at 4:3 and 3:2.
_ASPECTS = (1.1, 1.4, 1.6, 2.0)
_SIDES = (128, 224, 320, 448, 640)

Group = tuple[str, Tensor]


def by_aspect(sizes: Sequence[tuple[int, int]]) -> list[Group]:
    """Groups of images by long side over short side.

    Args:
        sizes: Native height and width of each image, in pixels.

    Returns:
        Label and int64 indices of each group that has an image, from square to long: ``1-1.1``
        (1 ≤ ratio < 1.1), ``1.1-1.4``, ``1.4-1.6``, ``1.6-2``, ``>2`` (2 and longer).
    """
    edges = ("1", *(f"{edge:g}" for edge in _ASPECTS))
    labels = [f"{low}-{high}" for low, high in pairwise(edges)]
    labels.append(f">{edges[-1]}")
    return _groups(
        sizes, lambda height, width: max(height, width) / min(height, width), _ASPECTS, labels
    )


def by_size(sizes: Sequence[tuple[int, int]]) -> list[Group]:
    """Groups of images by the side of a square of the same area, in pixels.

    Args:
        sizes: Native height and width of each image, in pixels.

    Returns:
        Label and int64 indices of each group that has an image, from small to large: ``<128``,
        ``<224`` (128 ≤ side < 224), ``<320``, ``<448``, ``<640``, ``>=640``.
    """
    labels = [*(f"<{side}" for side in _SIDES), f">={_SIDES[-1]}"]
    return _groups(sizes, lambda height, width: math.sqrt(height * width), _SIDES, labels)


def _groups(
    sizes: Sequence[tuple[int, int]],
    measure: Callable[[int, int], float],
    edges: Sequence[float],
    labels: Sequence[str],
) -> list[Group]:
    values = torch.tensor([measure(height, width) for height, width in sizes], dtype=torch.float64)
    place = torch.bucketize(values, torch.tensor(edges, dtype=torch.float64), right=True)
    groups = [(label, (place == i).nonzero().flatten()) for i, label in enumerate(labels)]
    return [(label, index) for label, index in groups if len(index)]
