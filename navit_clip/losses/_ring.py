"""Blocks of rows travelling around a ring of ranks.

The contrastive loss needs every pair of an image row of this rank and a text row of any rank, but
no rank may hold the text rows of all. Here each rank's block visits every rank in turn, followed by
an accumulator that each host adds to and that ends at the rank the block came from.
Nothing here knows what the rows or the accumulators mean. `_gather` does the same in fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from navit_clip.losses._members import Members, Merge, Transfer

_MERGE: dict[Merge, Callable[[Tensor, Tensor], Tensor]] = {
    "add": Tensor.add_,
    "logaddexp": torch.logaddexp,
}


@dataclass(frozen=True)
class Ring:
    """The ranks in a circle.

    Attributes:
        members: The ranks.
    """

    members: Members

    @property
    def largest(self) -> int:
        """Most rows that a visit sees."""
        return max(self.members.counts)

    def circulate(
        self,
        blocks: tuple[Tensor, ...],
        visit: Callable[[bool, tuple[Tensor, ...]], Tensor],
        merge: Merge,
    ) -> Tensor:
        """Sends every rank's blocks around the ring and returns what the ranks make of this one's.

        While a rank works on the blocks that it holds, the next ones arrive, and so does the
        accumulator, which is awaited only after the work: one step's transfers hide behind the
        same step's arithmetic.

        Args:
            blocks: Tensors of this rank with `members.counts[rank]` rows each, contiguous; the same
                trailing shapes and dtypes on all ranks. They are never written to.
            visit: Called once per rank with (whether the blocks are this rank's, the blocks);
                returns this rank's contribution to them, a fresh contiguous tensor with as many
                rows as the blocks.
            merge: How contributions are combined; ``add`` writes to them.

        Returns:
            The contributions of all ranks to this rank's blocks, merged.
        """
        size = len(self.members.counts)
        if size == 1:
            return visit(True, blocks)
        if 0 in self.members.counts:
            # A group's first operation needs all of its ranks, and some may have nothing to send.
            dist.all_reduce(torch.zeros(1, device=blocks[0].device), group=self.members.group)
        coming: Transfer | None = None
        following: Transfer | None = None
        for step in range(size):
            if following is not None:
                blocks = following.wait()
            following = self._pass_on(step, blocks) if step + 1 < size else None
            accumulated = visit(step == 0, blocks)
            if coming is not None:
                accumulated = _MERGE[merge](coming.wait()[0], accumulated)
            # After the last step the next rank in the ring is the owner: this returns it.
            coming = self._pass_on(step, (accumulated,))
        assert coming is not None
        return coming.wait()[0]

    def _pass_on(self, step: int, tensors: tuple[Tensor, ...]) -> Transfer:
        """Starts sending what is held at `step` to the next rank, receiving from the previous."""
        assert self.members.group is not None
        size = len(self.members.counts)
        arriving = self.members.counts[(self.members.rank - step - 1) % size]
        received = tuple(t.new_empty((arriving, *t.shape[1:])) for t in tensors)
        # Point-to-point peers are ranks of the world, also within a smaller group.
        to = dist.get_global_rank(self.members.group, (self.members.rank + 1) % size)
        origin = dist.get_global_rank(self.members.group, (self.members.rank - 1) % size)
        operations = [
            dist.P2POp(call, tensor, peer, group=self.members.group)
            for call, peer, side in ((dist.isend, to, tensors), (dist.irecv, origin, received))
            for tensor in side
            if tensor.numel()  # both ends know the counts, so both skip an empty block
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Transfer(works, tensors, received)
