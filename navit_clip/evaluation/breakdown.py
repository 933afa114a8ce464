"""Metrics by shape and by size of the images: where a model is good, and where resolution helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from navit_clip.evaluation.results import Group

# Where each group ends and the next begins. Screens and most cameras are at 4:3 and 3:2.
_ASPECTS = {"1-1.1": 1.1, "1.1-1.4": 1.4, "1.4-1.6": 1.6, "1.6-2": 2, ">2": math.inf}
_SIDES = {"<128": 128, "<224": 224, "<320": 320, "<448": 448, "<640": 640, ">=640": math.inf}

Size = tuple[int, int]  # native height and width of an image, in pixels
Measure = Callable[[Tensor], dict[str, float]]  # metrics of the images of these int64 indices


def break_down(sizes: Sequence[Size], measure: Measure) -> dict[str, tuple[Group, ...]]:
    """Groups of images by shape and by size, without empty ones.

    Returns:
        ``by_aspect``, by long side over short side, from square to long: ``1-1.1`` is
        1 ≤ ratio < 1.1. ``by_size``, by the side in pixels of a square of the same area, from small
        to large: ``<224`` is 128 ≤ side < 224.
    """
    aspects = [max(size) / min(size) for size in sizes]
    sides = [math.sqrt(height * width) for height, width in sizes]
    return {
        "by_aspect": _groups(aspects, _ASPECTS, measure),
        "by_size": _groups(sides, _SIDES, measure),
    }


def _groups(
    values: Sequence[float], ends: Mapping[str, float], measure: Measure
) -> tuple[Group, ...]:
    place = torch.bucketize(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor([*ends.values()], dtype=torch.float64),
        right=True,
    )
    groups = [(label, (place == i).nonzero().flatten()) for i, label in enumerate(ends)]
    return tuple(Group(label, len(i), measure(i)) for label, i in groups if len(i))
