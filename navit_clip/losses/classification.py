"""Classification losses over logits of all classes, by the indices of the right ones.

No one-hot targets are built: with tens of thousands of classes they would be as large as the
logits. Both losses are sums over images; what they are a mean over is the task's to divide by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.packed.ragged import Ragged

# Past it ln(1 + eˣ) is x to the last digit, also in float64, and eˣ still far from float32's end.
_LINEAR_FROM = 50.0


def sigmoid_loss(logits_EL: Tensor, labels: Ragged, weights_N: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every class, summed over classes and images.

    As big_vision's ``sigmoid_xent`` has it, which NaViT's supervised training uses: not divided by
    the number of classes, nor by that of an image's labels.

    Args:
        logits_EL: [E, L] of all classes, in any precision; computed in float32 at least.
        labels: int64 indices of each image's classes, any number, each at most once.
        weights_N: Target of each label, 1 without; those of a class that an image has twice add up.

    Returns:
        A scalar, 0 where there is no image.
    """
    logits_EL = logits_EL.to(torch.promote_types(logits_EL.dtype, torch.float32))
    # −ln σ(x) = softplus(x) − x for the right classes, −ln(1 − σ(x)) = softplus(x) for all others.
    right_N = logits_EL[labels.ids, labels.values]
    if weights_N is not None:
        right_N = right_N * weights_N
    return F.softplus(logits_EL, threshold=_LINEAR_FROM).sum() - right_N.sum()


def softmax_loss(logits_EL: Tensor, labels: Ragged, weights_N: Tensor | None = None) -> Tensor:
    """Cross-entropy of a softmax over the classes, summed over images.

    Args:
        logits_EL: As in `sigmoid_loss`.
        labels: int64 index of each image's class, one of each without `weights_N`.
        weights_N: Probability of each label as the target; those of an image add up to 1.
    """
    logits_EL = logits_EL.to(torch.promote_types(logits_EL.dtype, torch.float32))
    if weights_N is not None:
        return -(logits_EL.log_softmax(1)[labels.ids, labels.values] * weights_N).sum()
    return F.cross_entropy(logits_EL, labels.values, reduction="sum")


def count_hits(logits_EL: Tensor, labels: Ragged, weights_N: Tensor | None = None) -> Tensor:
    """Images whose class of the largest logit is among their labels, or the label's weight each.

    Returns:
        A float scalar.
    """
    hits_N = logits_EL.detach().argmax(1)[labels.ids] == labels.values
    return (hits_N if weights_N is None else hits_N * weights_N).sum().to(torch.float32)
