"""Ranks of right answers among all: how many wrong ones are at least as near.

Ties, and scores that are NaN, go against the model: whatever is not certain counts as a miss. The
similarity matrix is never in memory all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Scores are computed in float64 and count as tied up to here: copies of a vector must tie, and a
# matrix product may round one copy otherwise than the other. Different float32 vectors are hardly
# ever so near.
TIE = 1e-12

RECALL_AT = (1, 5, 10)
_SCORES = 1 << 22  # compared at a time, 32 MiB of them


def pair_ranks(images_ED: Tensor, texts_TD: Tensor, image_T: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of matching pairs, both ways; 0 is the best rank.

    Args:
        images_ED: Unit vectors of the images.
        texts_TD: Unit vectors of the captions.
        image_T: Index of each caption's image.

    Returns:
        Image to text, int64 [E]: captions of other images that are no farther than the nearest of
        the image's captions; all of them if it has none, or one of their scores is NaN. Text to
        image, int64 [T]: other images that are no farther than the caption's image.
    """
    images_ED, texts_TD = images_ED.double(), texts_TD.double()
    right_T = torch.cat(
        [
            (texts * images_ED[image]).sum(1)
            for texts, image in zip(texts_TD.split(1024), image_T.split(1024), strict=True)
        ]
    )
    # Of the nearest caption of each image.
    best_E = torch.full((len(images_ED),), -torch.inf, dtype=right_T.dtype, device=right_T.device)
    best_E.scatter_reduce_(0, image_T, right_T, "amax")
    # Whether a maximum keeps a NaN differs between devices.
    best_E[image_T[right_T.isnan()]] = torch.nan
    image_ranks = []
    text_ranks_T = torch.full_like(image_T, -1)  # its own image is always among those counted
    block = max(1, _SCORES // max(1, len(texts_TD)))
    for start in range(0, len(images_ED), block):
        images = images_ED[start : start + block]
        scores = images @ texts_TD.T
        text_ranks_T += (~(scores < right_T - TIE)).sum(0, dtype=torch.int32)
        index = torch.arange(start, start + len(images), device=image_T.device)
        near = ~(scores < best_E[start : start + block, None] - TIE)
        image_ranks.append((near & (image_T != index[:, None])).sum(1, dtype=torch.int32))
    return torch.cat(image_ranks).long(), text_ranks_T


@dataclass(frozen=True)
class Reranked:
    """What re-ranking so many of the nearest images gives.

    Attributes:
        rank_T: Rank of each caption's image, int64; 0 is the best.
        cost: Of a caption's images, mean.
        again: Fraction of the images that are embedded again for any caption.
    """

    rank_T: Tensor
    cost: float
    again: float


def rerank(
    few_ED: Tensor,
    many_ED: Tensor,
    texts_TD: Tensor,
    image_T: Tensor,
    rank_T: Tensor,
    tops: Sequence[int],
    cost_E: Tensor,
) -> list[Reranked]:
    """Ranks every caption's image again by `many_ED`, among the nearest so many by `few_ED`.

    An image that is not among the nearest keeps its rank.

    Args:
        few_ED: Unit vectors of the images.
        many_ED: Other unit vectors of them.
        texts_TD: Unit vectors of the captions.
        image_T: Index of each caption's image.
        rank_T: Rank of each caption's image by `few_ED`, from `pair_ranks`.
        tops: How many are ranked again, each at most E.
        cost_E: Of embedding each image again, float64.

    Returns:
        For each of `tops`.
    """
    few_ED, many_ED, texts_TD = few_ED.double(), many_ED.double(), texts_TD.double()
    ranks: list[list[Tensor]] = [[] for _ in tops]
    costs = [0.0 for _ in tops]
    again_KE = torch.zeros(len(tops), len(few_ED), dtype=torch.bool)
    # Of a block there are the scores of all images, and the vectors of the first of them.
    block = max(1, _SCORES // max(len(few_ED), max(tops) * many_ED.shape[1]))
    parts = zip(texts_TD.split(block), image_T.split(block), rank_T.split(block), strict=True)
    for texts_BD, right_B, before_B in parts:
        first_BK = (texts_BD @ few_ED.T).topk(max(tops), 1).indices
        anew_BK = torch.einsum("bd,bkd->bk", texts_BD, many_ED[first_BK])
        right_B1 = torch.einsum("bd,bd->b", texts_BD, many_ED[right_B])[:, None]
        ahead_BK = ~(anew_BK < right_B1 - TIE) & (first_BK != right_B[:, None])
        for k, top in enumerate(tops):
            among_B = ahead_BK[:, :top].sum(1)
            ranks[k].append(torch.where(before_B < top, among_B, before_B))
            costs[k] += cost_E[first_BK[:, :top]].sum().item()
            again_KE[k, first_BK[:, :top]] = True
    return [
        Reranked(torch.cat(rank), costs[k] / len(image_T), again_KE[k].double().mean().item())
        for k, rank in enumerate(ranks)
    ]


@dataclass(frozen=True)
class Readout:
    """What gives every image a logit for every class: a product of two vectors.

    Attributes:
        images_ED: Of the images.
        classes_CD: Of the classes.
        bias_C: Added to logits, None for none.
        scale: Factor on products.
        sigmoid: Whether logits become independent probabilities, and not a softmax.
    """

    images_ED: Tensor
    classes_CD: Tensor
    bias_C: Tensor | None = None
    scale: float = 1.0
    sigmoid: bool = False

    def only(self, index: Tensor | slice) -> Readout:
        """The same of some images."""
        return replace(self, images_ED=self.images_ED[index])

    def of(self, classes: list[int] | slice) -> Readout:
        """The same of some classes."""
        bias_C = None if self.bias_C is None else self.bias_C[classes]
        return replace(self, classes_CD=self.classes_CD[classes], bias_C=bias_C)

    def scores(self) -> Tensor:
        """Logits of the images, float64 [E, C], before `scale`."""
        scores_EC = self.images_ED.double() @ self.classes_CD.double().T
        return scores_EC if self.bias_C is None else scores_EC + self.bias_C.double()

    def probabilities(self, scores_EC: Tensor) -> Tensor:
        """Of what `scores` gave."""
        logits_EC = self.scale * scores_EC
        return logits_EC.sigmoid() if self.sigmoid else logits_EC.softmax(-1)


@dataclass(frozen=True)
class ClassTable:
    """Which classes compete, and which are right for the images.

    Attributes:
        competitors: Class indices, sorted.
        titles: Their names.
        groups: Names of groups of images, those for which the same classes are right.
        right_LC: Which competitors are right for each group, bool.
        group_E: Group of each image, int64.
    """

    competitors: list[int]
    titles: list[str]
    groups: list[str]
    right_LC: Tensor
    group_E: Tensor


@dataclass(frozen=True)
class Predictions:
    """What a model takes each image for.

    Attributes:
        rank_E: Wrong classes at least as near as the nearest right one, int64; 0 is the best.
        wrong_E: The nearest wrong class, int64; -1 if every class is right.
        confidence_E: Probability of the nearest class, float64.
    """

    rank_E: Tensor
    wrong_E: Tensor
    confidence_E: Tensor


def classify(readout: Readout, right_LC: Tensor, group_E: Tensor) -> Predictions:
    """Compares every image with every class, a block of images at a time.

    Args:
        readout: Of the images and classes.
        right_LC: Which classes are right, bool, a row per group of images.
        group_E: Row of each image.
    """
    parts = []
    readout = replace(readout, classes_CD=readout.classes_CD.double())  # once, not block by block
    block = max(1, _SCORES // len(readout.classes_CD))
    for start in range(0, len(group_E), block):
        part = slice(start, start + block)
        scores = readout.only(part).scores()
        right = right_LC[group_E[part]]
        wrong = scores.masked_fill(right, -torch.inf)
        # Several may be right: the nearest counts, and none of them counts as wrong for another.
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        rank = (~(scores < best - TIE) & ~right).sum(1)
        nearest = torch.where(right.all(1), -1, wrong.argmax(1))
        parts.append((rank, nearest, readout.probabilities(scores).amax(1)))
    rank_E, wrong_E, confidence_E = (torch.cat(part) for part in zip(*parts, strict=True))
    return Predictions(rank_E, wrong_E, confidence_E)


def average_precision(readout: Readout, right_EC: Tensor) -> Tensor:
    """How well each class's images come before all others, a block of classes at a time.

    The sum over recall of the precision there, not interpolated; images of equal scores come
    together, as in scikit-learn's ``average_precision_score``. NaN scores come last.

    Args:
        readout: Of the images and classes.
        right_EC: Which classes are right for each image, bool.

    Returns:
        float64 [C], NaN for a class that no image shows.
    """
    images, classes = right_EC.shape
    found = []
    block = max(1, _SCORES // max(1, images))
    for start in range(0, classes, block):
        part = slice(start, start + block)
        scores_EC = readout.of(part).scores().nan_to_num(nan=-torch.inf)
        sorted_EC, order_EC = scores_EC.sort(0, descending=True)
        right = right_EC[:, part].gather(0, order_EC).double()
        place_E = torch.arange(1, images + 1, dtype=torch.float64)[:, None]
        precision = right.cumsum(0) / place_E
        # Of equal scores the precision after the last of them.
        ends = torch.ones_like(order_EC, dtype=torch.bool)
        ends[:-1] = sorted_EC[1:] < sorted_EC[:-1]
        index = torch.where(ends, torch.arange(images)[:, None], images)
        last = index.flip(0).cummin(0).values.flip(0)
        found.append((right * precision.gather(0, last)).sum(0) / right.sum(0))
    return torch.cat(found)


def fraction(hits: Tensor) -> float:
    """Mean of a bool tensor in float64."""
    return hits.double().mean().item()


def recall(ranks: Tensor) -> dict[str, float]:
    """Fraction of queries with a hit among the first k, by ``R@k``, and the ``median_rank``.

    The rank of a query is that of its first hit, counted from 1; of an even number of queries the
    median is the mean of the middle two.

    Args:
        ranks: From `pair_ranks`, one per query, at least one.
    """
    recalls = {f"R@{k}": fraction(ranks < k) for k in RECALL_AT}
    return {**recalls, "median_rank": ranks.double().quantile(0.5).item() + 1}
