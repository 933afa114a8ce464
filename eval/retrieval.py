"""Image–text retrieval: recall at 1, 5 and 10, both ways, all captions of an image used.

COCO's convention: every caption is a query for its image; an image finds a hit if any of its
captions is among the nearest. Ties, and scores that are not numbers, go against the model. The
similarity matrix is never whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.encode import Embedded
from navit_clip.embedding import embed_texts
from navit_clip.flops import mean_image_flops
from navit_clip.interop.pretrained import Pretrained

KS = (1, 5, 10)
_BLOCK = 1024  # queries compared at a time


def text_to_image_ranks(texts_TD: Tensor, images_ED: Tensor, owner_T: Tensor) -> Tensor:
    """How many other images are at least as near to each caption as its own.

    Args:
        texts_TD: Caption embeddings.
        images_ED: Image embeddings.
        owner_T: Index of each caption's image.

    Returns:
        int64 [T]; 0 is the best rank.
    """
    ranks = []
    for texts, owner in zip(texts_TD.split(_BLOCK), owner_T.split(_BLOCK), strict=True):
        scores = texts @ images_ED.T
        own = scores.gather(1, owner[:, None])
        ranks.append((~(scores < own)).sum(1) - 1)
    return torch.cat(ranks)


def image_to_text_ranks(images_ED: Tensor, texts_TD: Tensor, owner_T: Tensor) -> Tensor:
    """How many captions of others are at least as near to each image as its own best.

    Args:
        images_ED: Image embeddings, each of at least one caption.
        texts_TD: Caption embeddings.
        owner_T: Index of each caption's image.

    Returns:
        int64 [E]; 0 is the best rank.
    """
    ranks = []
    for start, images in zip(
        range(0, len(images_ED), _BLOCK), images_ED.split(_BLOCK), strict=True
    ):
        scores = images @ texts_TD.T
        index = torch.arange(start, start + len(images))
        own = owner_T[None, :] == index[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append((~(scores < best) & ~own).sum(1))
    return torch.cat(ranks)


def recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Share of queries with a hit among the first k, by ``R@k``."""
    return {f"R@{k}": (ranks < k).double().mean().item() for k in ks}


def embed_captions(pretrained: Pretrained, data: Embedded) -> tuple[Tensor, Tensor]:
    """All captions' embeddings [T, D], and the index of each one's image [T]."""
    owner = [i for i, captions in enumerate(data.captions) for _ in captions]
    texts = [caption for captions in data.captions for caption in captions]
    return embed_texts(pretrained, texts), torch.tensor(owner)


def judge(
    pretrained: Pretrained, data: Embedded, texts_TD: Tensor, owner_T: Tensor
) -> dict[str, Any]:
    """Recall at every budget.

    Args:
        pretrained: The model.
        data: Embedded images with captions.
        texts_TD: From `embed_captions`.
        owner_T: From `embed_captions`.

    Returns:
        Plain values for JSON: both directions at the model's own budget, and ``budgets``.
    """
    config, default = pretrained.model.config, pretrained.preprocess.max_tokens
    budgets = []
    for budget, images_ED in sorted(data.embeddings.items()):
        lengths = data.lengths[budget]
        budgets.append(
            {
                "max_tokens": budget,
                "mean_tokens": sum(lengths) / len(lengths),
                "flops_per_image": mean_image_flops(config.image, config.embed_dim, lengths),
                "image_to_text": recall(image_to_text_ranks(images_ED, texts_TD, owner_T)),
                "text_to_image": recall(text_to_image_ranks(texts_TD, images_ED, owner_T)),
            }
        )
    own = next(entry for entry in budgets if entry["max_tokens"] == default)
    return {
        "image_to_text": own["image_to_text"],
        "text_to_image": own["text_to_image"],
        "max_tokens": default,
        "images": len(data.names),
        "captions": len(texts_TD),
        "skipped": dict(data.skipped),
        "budgets": budgets,
    }
