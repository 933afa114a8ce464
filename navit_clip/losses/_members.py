"""The ranks whose pairs make up a batch, and how many each one brings.

First step of the contrastive loss. What `_ring` and `_gather` send, and how much of it, follows
from the counts, which every rank must know before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

# The order is part of the handshake in `Members.join`: a rank announces its dtype by position.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Merge = Literal["add", "logaddexp"]

# Later versions of PyTorch have these under another name and warn of the old one.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or (
    dist.all_gather_into_tensor
)
reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


@dataclass(frozen=True)
class Transfer:
    """Operations between ranks under way, and the tensors that they read and write."""

    works: list[dist.Work]
    sent: tuple[Tensor, ...]  # kept alive: a backend may still be reading them
    received: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        """What was received, once it has been; a device waits in its own queue."""
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True)
class Members:
    """The ranks of a process group, and how many rows each one brings.

    Attributes:
        rank: Position of this process in the group.
        counts: Rows of each rank's block, by position; a count may be 0.
        group: The process group, or None for one process without communication.
    """

    rank: int
    counts: tuple[int, ...]
    group: dist.ProcessGroup | None

    @classmethod
    def join(
        cls,
        block_ED: Tensor,
        group: dist.ProcessGroup | None = None,
        counts: Sequence[int] | None = None,
    ) -> Members:
        """Finds out who there is; a collective call unless the counts are given.

        One count alone is that of this process, which then computes by itself.

        Args:
            block_ED: This rank's block [n, D], n >= 0, of one of DTYPES, on the group's device.
            group: Any group this process belongs to; None is the default group, or this process
                alone if `torch.distributed` is not initialised.
            counts: Rows of each rank's block, if known. Then nothing is exchanged, and that the
                ranks agree on counts, width and dtype is the caller's promise. None asks the other
                ranks: through the host if the group has a backend for it, which waits for their
                hosts alone; else through the device, which waits for all that is queued there.

        Raises:
            ValueError: This process is not in `group`, `counts` does not fit it, or the ranks'
                blocks differ in width or dtype (the last raised on every rank, in place of a
                transfer that would hang).
        """
        rank, size = 0, 1
        alone = group is None and counts is not None and len(counts) == 1
        if dist.is_available() and dist.is_initialized() and not alone:
            group = dist.group.WORLD if group is None else group
            rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("group: this process is not a member of the process group")
        if counts is not None:
            if len(counts) != size or counts[rank] != len(block_ED):
                raise ValueError(
                    f"counts must be the pairs of {size} ranks, {len(block_ED)} of them on rank "
                    f"{rank}, got {list(counts)}"
                )
        elif size > 1:
            assert group is not None
            counts = cls._exchange(block_ED, group, size)
        else:
            counts = (len(block_ED),)
        return cls(rank, tuple(counts), group if size > 1 else None)

    @staticmethod
    def _exchange(block_ED: Tensor, group: dist.ProcessGroup, size: int) -> list[int]:
        """Rows of every rank's block, once all are known to fit each other."""
        on_host = "cpu:" in dist.get_backend_config(group)
        device = torch.device("cpu") if on_host else block_ED.device
        mine = (*block_ED.shape, DTYPES.index(block_ED.dtype))
        announced = torch.empty(size * len(mine), dtype=torch.int64, device=device)
        all_gather(announced, torch.tensor(mine, dtype=torch.int64, device=device), group=group)
        shapes: list[list[int]] = announced.view(size, len(mine)).tolist()
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            listed = ", ".join(f"{DTYPES[dtype]} [{n}, {width}]" for n, width, dtype in shapes)
            raise ValueError(f"features must have one width and dtype on all ranks, got {listed}")
        return [shape[0] for shape in shapes]

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.counts)

    def sum(self, value: Tensor) -> Tensor:
        """Adds a tensor up over the ranks, in place; returns it."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value
