"""A mean over the examples of all ranks, for a loss that also couples them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(values_E: Tensor, counts: Sequence[float]) -> Tensor:
    """The mean, the same on every rank; its gradient is this rank's share, for a SUM over ranks.

    A collective call if there are counts of several ranks.

    Args:
        values_E: Of this rank's examples.
        counts: Examples of each rank.
    """
    own = values_E.sum() / sum(counts)
    if len(counts) == 1:
        return own
    total = own.detach().clone()
    dist.all_reduce(total)
    return total + (own - own.detach())
