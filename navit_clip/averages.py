"""EMAs of weights: that of the whole model, which is exported, and teachers that tasks have."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which is all of one that is not sharded."""
    # By its method: DTensor takes a second to import, and a model that is only used needs none.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def update_averages(
    averages: Iterable[Tensor], weights: Iterable[Tensor], decay: float, found_inf: Tensor
) -> None:
    """Average ← decay · average + (1 - decay) · weight, in place.

    Args:
        averages: At least one; sharded as the weights are.
        weights: After a step, in the same order.
        decay: Fraction of the old average kept.
        found_inf: Scalar on the weights' device, 1 if the step was not finite, which leaves the
            averages as they are; else 0.
    """
    old, new = ([local_tensor(tensor.detach()) for tensor in some] for some in (averages, weights))
    kinds = {average.dtype for average in old}
    rates = {dtype: (1 - found_inf).to(dtype) * (1 - decay) for dtype in kinds}
    torch._foreach_lerp_(old, new, [rates[average.dtype] for average in old])
