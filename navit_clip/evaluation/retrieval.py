"""Image–text retrieval: recall at 1, 5 and 10 and the median rank, both ways.

The usual convention for COCO and Flickr30k: every caption is a query for its image; an image finds
a hit if any of its captions is among the nearest. Ties, and scores that are not numbers, go against
the model. The similarity matrix is never whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from navit_clip.evaluation.breakdown import by_aspect, by_size
from navit_clip.evaluation.cost import describe_setting
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import EvalSetting

KS = (1, 5, 10)
_SCORES = 1 << 22  # compared at a time, 32 MiB of them

# Scores are computed in float64 and count as tied up to here: copies of a vector must tie, and a
# matrix product may round one copy otherwise than the other. Different float32 vectors are hardly
# ever so near.
TIE = 1e-12


def pair_ranks(images_ED: Tensor, texts_TD: Tensor, owner_T: Tensor) -> tuple[Tensor, Tensor]:
    """How many wrong answers are at least as near as the right one, both ways.

    Args:
        images_ED: Unit vectors of the images.
        texts_TD: Unit vectors of the captions.
        owner_T: Index of each caption's image.

    Returns:
        Image to text, int64 [E]: captions of other images that are no farther than the nearest of
        its own; all of them if it has none, or one of its own is no number. Text to image, int64
        [T]: other images that are no farther than its own. 0 is the best rank.
    """
    images_ED, texts_TD = images_ED.double(), texts_TD.double()
    own_T = torch.cat(
        [
            (texts * images_ED[owner]).sum(1)
            for texts, owner in zip(texts_TD.split(1024), owner_T.split(1024), strict=True)
        ]
    )
    best_E = _best_own(own_T, owner_T, len(images_ED))
    image_ranks = []
    text_ranks_T = torch.full_like(owner_T, -1)  # its own image is always among those counted
    block = max(1, _SCORES // max(1, len(texts_TD)))
    for start in range(0, len(images_ED), block):
        images = images_ED[start : start + block]
        scores = images @ texts_TD.T
        text_ranks_T += (~(scores < own_T - TIE)).sum(0, dtype=torch.int32)
        index = torch.arange(start, start + len(images), device=owner_T.device)
        near = ~(scores < best_E[start : start + block, None] - TIE)
        image_ranks.append((near & (owner_T != index[:, None])).sum(1, dtype=torch.int32))
    return torch.cat(image_ranks).long(), text_ranks_T


def _best_own(own_T: Tensor, owner_T: Tensor, images: int) -> Tensor:
    """Score of the nearest own caption of each image, float64 [E]."""
    best_E = torch.full((images,), -torch.inf, dtype=own_T.dtype, device=own_T.device)
    best_E.scatter_reduce_(0, owner_T, own_T, "amax")
    # Whether a maximum keeps what is no number differs between devices.
    best_E[owner_T[own_T.isnan()]] = torch.nan
    return best_E


def recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Share of queries with a hit among the first k, by ``R@k``, and the ``median_rank``.

    The rank of a query is that of its first hit, counted from 1; of an even number of queries the
    median is the mean of the middle two.

    Args:
        ranks: From `pair_ranks`, one per query, at least one.
        ks: Which k.
    """
    figures = {f"R@{k}": (ranks < k).double().mean().item() for k in ks}
    return {**figures, "median_rank": ranks.double().quantile(0.5).item() + 1}


def embed_captions(model: Model, data: Embedded) -> tuple[Tensor, Tensor]:
    """All captions' embeddings [T, D], and the index of each one's image [T]."""
    owner = [i for i, captions in enumerate(data.captions) for _ in captions]
    texts = [caption for captions in data.captions for caption in captions]
    return model.embed_texts(texts), torch.tensor(owner)


def judge(model: Model, data: Embedded, texts_TD: Tensor, owner_T: Tensor) -> dict[str, Any]:
    """Recall at every setting.

    Args:
        model: The model, for its own setting and its costs.
        data: Embedded images with captions.
        texts_TD: Unit vectors of all captions, as from `embed_captions`.
        owner_T: Index of each caption's image.

    Returns:
        Plain values for JSON: both directions at the model's own setting, and ``views``, each with
        both directions, also by aspect ratio and by size of the images. Queries of a group look
        among all images and captions.
    """
    settings = [_entry(model, data, setting, texts_TD, owner_T) for setting in data.embeddings]
    own = next(entry for entry in settings if entry["own"])
    return {
        "image_to_text": own["image_to_text"],
        "text_to_image": own["text_to_image"],
        "max_tokens": own["max_tokens"],
        "images": len(data.names),
        "captions": len(texts_TD),
        "skipped": dict(data.skipped),
        "views": settings,
    }


def _entry(
    model: Model, data: Embedded, setting: EvalSetting, texts_TD: Tensor, owner_T: Tensor
) -> dict[str, Any]:
    to_text_E, to_image_T = pair_ranks(data.embeddings[setting], texts_TD, owner_T)

    def of_group(label: str, index: Tensor) -> dict[str, Any]:
        return {
            "label": label,
            "images": len(index),
            "image_to_text": recall(to_text_E[index]),
            "text_to_image": recall(to_image_T[torch.isin(owner_T, index)]),
        }

    return {
        **describe_setting(model, data, setting),
        "image_to_text": recall(to_text_E),
        "text_to_image": recall(to_image_T),
        "by_aspect": [of_group(label, index) for label, index in by_aspect(data.sizes)],
        "by_size": [of_group(label, index) for label, index in by_size(data.sizes)],
    }
