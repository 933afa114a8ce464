"""Blocks of rows gathered from all ranks at once, a part of each block at a time.

What `_ring` does, for many ranks that hold few rows each: there a ring's hundreds of small steps
cost more than what is computed in them. Here every rank gives some of its rows to all others, works
on those of all others, and what it makes of them is added up on the way back to their owners.
As many rounds follow each other as keep the rows that a rank holds at one time within ROUND_ROWS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from navit_clip.losses._members import Members, Merge, Transfer, all_gather, reduce_scatter
from navit_clip.losses._ring import Ring

Exchange = Literal["auto", "ring", "gather"]
"""How texts reach the images of other ranks; see `softmax_contrastive_loss`."""

# A ring's step takes a quarter of a millisecond however little there is to compute in it.
_MANY_RANKS, _FEW_PAIRS = 16, 4096

ROUND_ROWS = 65536
"""Rows of all ranks in one round: at 512 numbers of 2 bytes each, 67 MB."""

_NEUTRAL: dict[Merge, float] = {"add": 0.0, "logaddexp": -torch.inf}


@dataclass(frozen=True)
class Gather:
    """The ranks, each of which hears all others.

    Attributes:
        members: The ranks, at least two.
    """

    members: Members

    @property
    def largest(self) -> int:
        """Most rows that a visit sees."""
        counts = self.members.counts
        return max(*counts, min(sum(counts), self._rows * len(counts)))

    @property
    def _rows(self) -> int:
        """Rows that each rank gives in one round, padding included."""
        counts = self.members.counts
        return min(max(counts), max(1, ROUND_ROWS // len(counts)))

    def circulate(
        self,
        blocks: tuple[Tensor, ...],
        visit: Callable[[bool, tuple[Tensor, ...]], Tensor],
        merge: Merge,
    ) -> Tensor:
        """Shows every rank's blocks to all ranks and returns what they make of this one's.

        While a rank works on its own blocks, the first round arrives; while it works on a round,
        the next one arrives and what it made of the one before is returned.

        Args:
            blocks: Tensors of this rank with `members.counts[rank]` rows each, contiguous; the same
                trailing shapes and dtypes on all ranks. They are never written to.
            visit: Called with (whether the blocks are this rank's, the blocks), which are this
                rank's or rows of several others; returns this rank's contribution to them, a
                fresh contiguous tensor with as many rows as the blocks.
            merge: How contributions are combined; ``add`` writes to them.

        Returns:
            The contributions of all ranks to this rank's blocks, merged.
        """
        bytes_EB = torch.cat([_as_bytes(block) for block in blocks], 1)
        coming = self._gather(bytes_EB, 0)
        total = visit(True, blocks)
        kept: list[Tensor] = []
        returning: Transfer | None = None
        starts = range(0, max(self.members.counts), self._rows)
        for start in starts:
            (gathered,) = coming.wait()
            if start != starts[-1]:
                coming = self._gather(bytes_EB, start + self._rows)
            others = self._others(start, total.device)
            made = total.new_full((len(gathered), *total.shape[1:]), _NEUTRAL[merge])
            if len(others):
                seen = _from_bytes(gathered.index_select(0, others), blocks)
                made.index_copy_(0, others, visit(False, seen))
            if merge == "logaddexp":
                kept.append(made)
                continue
            if returning is not None:
                self._add(total, start - self._rows, returning)
            returning = self._return(made)
        if returning is not None:
            self._add(total, starts[-1], returning)
            return total
        return torch.logaddexp(total, self._merged(torch.stack(kept))[: len(total)])

    def _gather(self, bytes_EB: Tensor, start: int) -> Transfer:
        """Starts sending one round's rows to all ranks, receiving theirs, padded with zeros."""
        rows = bytes_EB[start : start + self._rows]
        if len(rows) < self._rows:
            rows = F.pad(rows, (0, 0, 0, self._rows - len(rows)))
        arriving = rows.new_empty((len(self.members.counts) * self._rows, rows.shape[1]))
        work = all_gather(arriving, rows, group=self.members.group, async_op=True)
        return Transfer([work], (rows,), (arriving,))

    def _others(self, start: int, device: torch.device) -> Tensor:
        """Where in a round's rows those of other ranks stand that are none of the padding."""
        counts = torch.tensor(self.members.counts)
        counts[self.members.rank] = 0
        inside = torch.arange(start, start + self._rows) < counts[:, None]
        others = inside.flatten().nonzero().squeeze(1)
        if device.type == "cuda":
            others = others.pin_memory()  # a copy from any other memory waits for the device
        return others.to(device, non_blocking=True)

    def _return(self, made: Tensor) -> Transfer:
        """Starts adding up what all ranks made of a round's rows, each row at its owner."""
        mine = made.new_empty((self._rows, *made.shape[1:]))
        work = reduce_scatter(mine, made, group=self.members.group, async_op=True)
        return Transfer([work], (made,), (mine,))

    def _add(self, total: Tensor, start: int, returning: Transfer) -> None:
        rows = total[start : start + self._rows]
        rows += returning.wait()[0][: len(rows)]

    def _merged(self, made: Tensor) -> Tensor:
        """Log-sum-exps of this rank's rows over what all ranks made of them.

        No backend adds up logarithms; so all ranks first find the largest of each row. One number
        a row is little enough for each rank to get those of all.

        Args:
            made: [rounds, ranks · rows]; -inf for this rank's own rows and for padding.
        """
        largest = made.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.members.group)
        largest.masked_fill_(largest == -torch.inf, 0)
        sums = (made - largest).exp_()
        dist.all_reduce(sums, group=self.members.group)
        merged = sums.log_() + largest
        return merged.view(len(made), -1, self._rows)[:, self.members.rank].flatten()


def choose_exchange(exchange: Exchange, members: Members) -> Ring | Gather:
    """The way of the texts, the same on all ranks."""
    ranks = len(members.counts)
    if exchange == "auto":
        few = ranks > _MANY_RANKS and members.total < _FEW_PAIRS * ranks
        exchange = "gather" if few else "ring"
    return Gather(members) if exchange == "gather" and ranks > 1 else Ring(members)


def _as_bytes(block: Tensor) -> Tensor:
    """A row of bytes for each row: what several blocks hold can so travel together."""
    return block.view(torch.uint8).view(len(block), _row_bytes(block))


def _from_bytes(bytes_MB: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rows of several blocks out of their bytes, in the blocks' dtypes and trailing shapes."""
    parts = bytes_MB.split([_row_bytes(block) for block in like], 1)
    return tuple(
        part.contiguous().view(-1).view(block.dtype).view(len(part), *block.shape[1:])
        for part, block in zip(parts, like, strict=True)
    )


def _row_bytes(block: Tensor) -> int:
    return block.itemsize * block.shape[1:].numel()
