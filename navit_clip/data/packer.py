"""Which examples share a batch: the packer, over the token budgets of all streams at once.

Between the examples that a reader builds and the streams that `navit_clip.packed` lays out.
NaViT packs by greedy first-fit, which fills one tower and leaves the other to chance: 200 pairs of
random sizes miss a budget by 4%. Here a few hundred examples wait, and a batch is the oldest of
them, improved by exchanges with the others until all budgets are full.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain, compress
from typing import Generic, Protocol, TypeVar, get_args

import numpy as np

from navit_clip.data.budgets import Budgets, PackingMode
from navit_clip.data.choose import choose, expected_examples, trim_lengths

Item = TypeVar("Item", bound="Packable")


class Packable(Protocol):
    """What the packer asks of an example."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each stream of the task, each at least 1, after token drop."""

    @property
    def bucket(self) -> Hashable:
        """Examples of different buckets share no batch; ``()`` if the task has none.

        A function of the example alone, so that examples offered again after a restart find their
        buckets.
        """

    def trimmed(self: Item, tokens: int) -> Item:
        """The same with so many tokens in the first stream, by dropping others.

        Args:
            tokens: Tokens to keep, at least 1 and fewer than there are.
        """


class _Pool(Generic[Item]):
    """Waiting items of one bucket with their sizes, oldest first, and the tokens of all of them."""

    def __init__(self, streams: int) -> None:
        self.items: list[Item] = []
        self.sizes: list[tuple[int, ...]] = []
        self.arrivals: list[int] = []
        self.totals = [0] * streams


class Packer(Generic[Item]):
    """Packs examples into batches that fill the token budgets of all streams, with look-ahead.

    Examples wait in a pool in the order they came, one pool per bucket. Once a pool holds a batch
    and `look_ahead` examples more, `choose` takes the batch out of it. That is a function of the
    pool alone, so the batches are one of the examples offered, and the pools are all there is to
    restore.

    The sizes seen so far never match several budgets precisely. What one stream is ahead of the
    others is a random walk, which the pool holds up to a point: the larger `look_ahead`, the less
    padding.

    Modes:
        ``fill``: No budget is exceeded; what is left of them is padding.
        ``exact``: No padding. The choice of examples meets the budgets of all streams but the first
            exactly; where the first one, an image's patches, overshoots its own, by a quarter at
            most, they lose a few more patches (NaViT names the idea, a drop rate chosen to fill the
            sequence, and skips it). It takes images in slight surplus: text tokens 2% above what
            matches. Whatever cannot be met becomes padding.
        ``constant``: Every batch has `max_examples` examples, since a contrastive loss depends on
            their number; it has fewer only where that many do not fit. The first stream may
            overshoot by a quarter and is trimmed, others may not, so this takes some room for text:
            2% above the mean.

    Args:
        budgets: What one batch may hold, in the order of the items' `lengths`.
        look_ahead: Examples that wait beyond those of a batch, to choose from; with 0 a batch
            closes with the example that fills it.
        mode: What is kept exactly.

    Raises:
        ValueError: If `look_ahead` is negative or the mode is unknown.
    """

    def __init__(self, budgets: Budgets, look_ahead: int, mode: PackingMode = "fill") -> None:
        if look_ahead < 0:
            raise ValueError(f"look_ahead must not be negative, got {look_ahead}")
        if mode not in get_args(PackingMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(PackingMode))}, got {mode}")
        self.budgets = budgets
        self.look_ahead = look_ahead
        self.mode: PackingMode = mode
        self._pools: dict[Hashable, _Pool[Item]] = {}
        self._offered = 0

    @property
    def pending(self) -> tuple[Item, ...]:
        """Every example taken in but not yet given out, in the order they came.

        Offering them again restores the packer.
        """
        waiting = [
            entry
            for pool in self._pools.values()
            for entry in zip(pool.arrivals, pool.items, strict=True)
        ]
        return tuple(item for _, item in sorted(waiting, key=lambda entry: entry[0]))

    def offer(self, item: Item) -> None:
        """Takes in one example.

        Raises:
            ValueError: If the example alone exceeds a budget.
        """
        size, bucket, limits = item.lengths, item.bucket, self.budgets.limits
        pool = self._pools.get(bucket)
        if pool is None:
            pool = _Pool(len(limits))
        totals = pool.totals
        for stream, tokens in enumerate(size):
            if tokens > limits[stream]:
                for counted in range(stream):
                    totals[counted] -= size[counted]
                raise ValueError(
                    f"an example of {tokens} {list(self.budgets.tokens)[stream]} tokens "
                    f"exceeds the budget of {limits[stream]}"
                )
            totals[stream] += tokens
        self._pools[bucket] = pool
        pool.items.append(item)
        pool.sizes.append(size)
        pool.arrivals.append(self._offered)
        self._offered += 1

    def take(self) -> list[Item] | None:
        """A batch in the order its examples came, or None while too few wait to choose from."""
        for bucket, pool in self._pools.items():
            expected = expected_examples(self.budgets, self.mode, len(pool.items), pool.totals)
            if len(pool.items) >= self.look_ahead + expected:
                return self._close(bucket)
        return None

    def flush(self) -> list[Item] | None:
        """A batch of what there is, full or not; None once nothing is pending."""
        return self._close(next(iter(self._pools))) if self._pools else None

    def _close(self, bucket: Hashable) -> list[Item]:
        pool = self._pools[bucket]
        sizes = np.fromiter(chain.from_iterable(pool.sizes), np.int64).reshape(len(pool.sizes), -1)
        chosen = choose(sizes, self.budgets, self.mode)
        stays = (~chosen).tolist()
        batch = list(compress(pool.items, chosen.tolist()))
        lengths = sizes[chosen, 0].tolist()
        pool.items = list(compress(pool.items, stays))
        pool.sizes = list(compress(pool.sizes, stays))
        pool.arrivals = list(compress(pool.arrivals, stays))
        pool.totals = sizes[~chosen].sum(axis=0).tolist()
        if not pool.items:
            del self._pools[bucket]
        kept = trim_lengths(lengths, self.budgets.limits[0])
        return [
            item if keep == length else item.trimmed(keep)
            for item, keep, length in zip(batch, kept, lengths, strict=True)
        ]
