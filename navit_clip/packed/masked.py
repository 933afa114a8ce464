"""Images of which a model sees some patches and predicts the others: two packed streams.

The visible patches of every image lie in one stream, all its patches in a second; `MaskedInputs`
knows which place of the second each token of the first has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navit_clip.packed.batch import Inputs
from navit_clip.packed.images import ImagePatches, PackedImages, Planner, pack_images


@dataclass(frozen=True)
class MaskedInputs(Inputs):
    """Many images, each with patches that are visible and patches that are not.

    Attributes:
        images: The visible patches, V tokens; None for a model that computes all.
        whole: All patches, T tokens.
        places: int64 [V], where each visible patch lies in `whole`; T at padding. None likewise.
        weights: float32 [T], one over the number of its image's hidden patches at a hidden patch,
            0 at a visible one and at padding: a sum over patches with these weights is a sum of
            means over images.
    """

    images: PackedImages | None
    whole: PackedImages
    places: Tensor | None
    weights: Tensor


def pack_masked(
    images: Sequence[ImagePatches],
    visible: Sequence[np.ndarray],
    budgets: Sequence[int] | None = None,
    *,
    full: bool = False,
    planner: Planner | None = None,
) -> MaskedInputs:
    """Lays out images and their visible patches.

    Args:
        images: All patches of each, at least one image.
        visible: int64 indices of each image's visible patches, rising; at least one, not all.
        budgets: Tokens that the streams of visible and of all patches are padded to; None pads
            neither.
        full: For a model that computes all patches: there is no stream of visible ones.
        planner: Of the model's tower.

    Raises:
        ValueError: If there is no image, no patch of one is visible or none hidden, or the tokens
            exceed a budget.
    """
    for image, kept in zip(images, visible, strict=True):
        if not 0 < len(kept) < len(image.patches):
            raise ValueError(f"{len(kept)} of {len(image.patches)} patches are visible")
    whole = pack_images(
        images, budget=budgets[-1] if budgets else None, planner=planner if full else None
    )
    weights = hidden_weights(whole, visible)
    if full:
        return MaskedInputs(None, whole, None, weights)
    seen = [image.kept(kept) for image, kept in zip(images, visible, strict=True)]
    packed = pack_images(seen, budget=budgets[0] if budgets else None, planner=planner)
    places = np.full(packed.segments.num_tokens, whole.segments.num_tokens)
    starts = whole.segments.offsets[whole.order].numpy()
    ends = packed.segments.offsets[packed.order + 1].numpy()
    for kept, start, end in zip(visible, starts, ends, strict=True):
        places[end - len(kept) : end] = start + kept
    return MaskedInputs(packed, whole, torch.from_numpy(places), weights)


def hidden_weights(images: PackedImages, visible: Sequence[np.ndarray]) -> Tensor:
    """`MaskedInputs.weights` of packed images; 0 everywhere in one of which nothing is hidden.

    Args:
        images: All patches of each.
        visible: int64 indices of the visible ones of each, in the order in which they were packed.
    """
    offsets, segments = images.segments.offsets.numpy(), images.order.numpy()
    weights = np.zeros(images.segments.num_tokens, dtype=np.float32)
    for kept, start, end in zip(visible, offsets[segments], offsets[segments + 1], strict=True):
        if len(kept) < end - start:
            weights[start:end] = 1 / (end - start - len(kept))
            weights[start + kept] = 0
    return torch.from_numpy(weights)
