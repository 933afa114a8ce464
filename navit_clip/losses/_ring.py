"""Blocks of rows travelling around a ring of ranks.

The contrastive loss needs every pair of an image row of this rank and a text row of any rank, but
no rank may hold the text rows of all. Here each rank's block visits every rank in turn, followed by
an accumulator that each host adds to and that ends at the rank the block came from.
Nothing here knows what the rows or the accumulators mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# The order is part of the handshake in `Ring.join`: a rank announces its dtype by position.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Transfer:
    """Point-to-point operations under way, and the tensors they read and write."""

    works: list[dist.Work]
    sent: tuple[Tensor, ...]  # kept alive: a backend may still be reading them
    received: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True)
class Ring:
    """The ranks of a process group in a circle, and how many rows each one brings.

    Attributes:
        rank: Position of this process in the group.
        counts: Rows of each rank's block, by position; a count may be 0.
        group: The process group, or None for a ring of one without communication.
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
    ) -> Ring:
        """Forms the ring; a collective call unless the counts are given.

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
        if dist.is_available() and dist.is_initialized():
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
        dist.all_gather_into_tensor(
            announced, torch.tensor(mine, dtype=torch.int64, device=device), group=group
        )
        shapes: list[list[int]] = announced.view(size, len(mine)).tolist()
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            listed = ", ".join(f"{DTYPES[dtype]} [{n}, {width}]" for n, width, dtype in shapes)
            raise ValueError(f"features must have one width and dtype on all ranks, got {listed}")
        return [shape[0] for shape in shapes]

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.counts)

    def circulate(
        self,
        blocks: tuple[Tensor, ...],
        visit: Callable[[bool, tuple[Tensor, ...]], Tensor],
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Sends every rank's blocks around the ring and returns what the ranks make of this one's.

        While a rank works on the blocks that it holds, the next ones arrive, and so does the
        accumulator, which is awaited only after the work: one step's transfers hide behind the
        same step's arithmetic.

        Args:
            blocks: Tensors of this rank with `counts[rank]` rows each, contiguous; the same
                trailing shapes and dtypes on all ranks. They are never written to.
            visit: Called once per rank with (whether the blocks are this rank's, the blocks);
                returns this rank's contribution to them, a fresh contiguous tensor with as many
                rows as the blocks.
            merge: Combines (accumulator so far, contribution); may write to the accumulator.

        Returns:
            The contributions of all ranks to this rank's blocks, merged.
        """
        size = len(self.counts)
        if size == 1:
            return visit(True, blocks)
        coming: _Transfer | None = None
        following: _Transfer | None = None
        for step in range(size):
            if following is not None:
                blocks = following.wait()
            following = self._pass_on(step, blocks) if step + 1 < size else None
            accumulated = visit(step == 0, blocks)
            if coming is not None:
                accumulated = merge(coming.wait()[0], accumulated)
            # After the last step the next rank in the ring is the owner: this returns it.
            coming = self._pass_on(step, (accumulated,))
        assert coming is not None
        return coming.wait()[0]

    def sum(self, value: Tensor) -> Tensor:
        """Adds a tensor up over the ring, in place; returns it."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def _pass_on(self, step: int, tensors: tuple[Tensor, ...]) -> _Transfer:
        """Starts sending what is held at `step` to the next rank, receiving from the previous."""
        assert self.group is not None
        size = len(self.counts)
        arriving = self.counts[(self.rank - step - 1) % size]
        received = tuple(t.new_empty((arriving, *t.shape[1:])) for t in tensors)
        # Point-to-point peers are ranks of the world, also within a smaller group.
        to = dist.get_global_rank(self.group, (self.rank + 1) % size)
        origin = dist.get_global_rank(self.group, (self.rank - 1) % size)
        operations = [
            dist.P2POp(call, tensor, peer, group=self.group)
            for call, peer, side in ((dist.isend, to, tensors), (dist.irecv, origin, received))
            for tensor in side
            if tensor.numel()  # both ends know the counts, so both skip an empty block
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Transfer(works, tensors, received)
