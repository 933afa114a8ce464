"""Cascades: every image at few tokens, and those that the model is least sure of again at more.

NaViT (arXiv 2307.06304, appendix E): with n₁ < n₂ tokens and a share α of the images, classifying
one costs t₁ + α·t₂. The weights are the same, and nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from navit_clip.data.in_memory import ImageInput


def least_sure(confidence_E: Tensor, share: float) -> Tensor:
    """Indices of the images of least confidence; of equal ones the first.

    Args:
        confidence_E: Probability of each image's best class.
        share: How many of them, 0 to 1, rounded up.
    """
    count = math.ceil(share * len(confidence_E) - 1e-9)  # 0.1 · 30 is a little above 3
    return confidence_E.argsort(stable=True)[:count]


def classify_twice(
    classify: Callable[[Sequence[ImageInput], int], Tensor],
    images: Iterable[ImageInput],
    limits: tuple[int, int],
    share: float,
) -> Tensor:
    """Probabilities at the first limit, of the least sure images at the second.

    Args:
        classify: Gives probabilities [E, classes] of images at a token limit.
        images: All of them are held at once.
        limits: Most patches of one image, the first time and the second.
        share: Of the images that are classified again, rounded up.

    Raises:
        ValueError: If the second limit is not the larger one, or `share` is no share.
    """
    first, second = limits
    if not 1 <= first < second:
        raise ValueError(f"cascade must hold two token limits, the larger one last, got {limits}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    images = list(images)
    found_EL = classify(images, first)
    again = least_sure(found_EL.amax(1), share)
    if len(again):
        found_EL[again] = classify([images[i] for i in again.tolist()], second)
    return found_EL
