"""Metrics by shape and by size of the images: where a model is good, and where resolution helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from navit_clip.evaluation.results import Group

# Where a group ends and the next begins. Screens and most cameras are at 4:3 and 3:2.
_ASPECTS = (1.1, 1.4, 1.6, 2.0)
_SIDES = (128, 224, 320, 448, 640)

Size = tuple[int, int]  # native height and width of an image, in pixels
Measure = Callable[[Tensor], dict[str, float]]  # metrics of the images of these int64 indices


def by_aspect(sizes: Sequence[Size], measure: Measure) -> tuple[Group, ...]:
    """Groups of images by long side over short side, without empty ones.

    From square to long: ``1-1.1`` (1 ≤ ratio < 1.1), ``1.1-1.4``, ``1.4-1.6``, ``1.6-2``, ``>2`` (2
    and longer).
    """
    edges = ("1", *(f"{edge:g}" for edge in _ASPECTS))
    labels = [*(f"{low}-{high}" for low, high in pairwise(edges)), f">{edges[-1]}"]
    ratios = [max(height, width) / min(height, width) for height, width in sizes]
    return _groups(ratios, _ASPECTS, labels, measure)


def by_size(sizes: Sequence[Size], measure: Measure) -> tuple[Group, ...]:
    """Groups of images by the side of a square of the same area, in pixels, without empty ones.

    From small to large: ``<128``, ``<224`` (128 ≤ side < 224), ``<320``, ``<448``, ``<640``,
    ``>=640``.
    """
    labels = [*(f"<{side}" for side in _SIDES), f">={_SIDES[-1]}"]
    sides = [math.sqrt(height * width) for height, width in sizes]
    return _groups(sides, _SIDES, labels, measure)


def _groups(
    values: Sequence[float], edges: Sequence[float], labels: Sequence[str], measure: Measure
) -> tuple[Group, ...]:
    place = torch.bucketize(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(edges, dtype=torch.float64),
        right=True,
    )
    groups = [(label, (place == i).nonzero().flatten()) for i, label in enumerate(labels)]
    return tuple(Group(label, len(i), measure(i)) for label, i in groups if len(i))
