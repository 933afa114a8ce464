"""The order in which one reader takes the samples of one dataset, and where it stands in it.

Between the list of shards and the reader. A dataset's shards are permuted per epoch and dealt to
all readers; with fewer shards than readers, several readers share each and take every n-th of its
samples. What a reader takes is therefore a list of slices of shards, a function of (seed, dataset,
epoch, reader, number of readers), and its cursor in that list is three numbers.

When the number of readers changes, the old lists are worth nothing, so what was left of them
becomes a list of its own: the new readers first finish those slices (`Leftover`), then go on with
whole epochs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from navit_clip.data.mixture import Dataset
from navit_clip.data.seeding import generator


@dataclass(frozen=True)
class ShardSlice:
    """Samples of one shard that one reader takes in one epoch.

    Attributes:
        epoch: The epoch of the dataset that they belong to.
        shard: Index of the shard among those of the run.
        start: First index of the tail.
        stride: The tail is every index from `start` on that leaves `offset` modulo this; 0 for
            none.
        offset: See `stride`.
        extra: Further indices, before the tail, which a former reader had read ahead.
    """

    epoch: int
    shard: int
    start: int = 0
    stride: int = 1
    offset: int = 0
    extra: tuple[int, ...] = ()

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        tail = self.stride and index >= self.start and index % self.stride == self.offset
        return bool(tail) or index in self._extra

    @cached_property
    def _extra(self) -> frozenset[int]:
        return frozenset(self.extra)

    @property
    def last(self) -> int | None:
        """The last index, None if that is the end of the shard."""
        return None if self.stride else max(self.extra)

    def after(self, index: int) -> ShardSlice | None:
        """What is left from `index` on, None if nothing is."""
        extra = tuple(i for i in self.extra if i >= index)
        if not self.stride and not extra:
            return None
        return replace(self, start=max(self.start, index), extra=extra)


class Cursor(NamedTuple):
    """Where a reader stands in one dataset.

    Attributes:
        epoch: The one before the first whole epoch is the leftover.
        slice: Slices of the epoch that are done.
        sample: Index in the next slice's shard up to which samples are taken.
    """

    epoch: int
    slice: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Leftover:
    """What one reader finishes in one dataset for readers of another number.

    Attributes:
        epoch: The first epoch that the reader takes as its own, whole.
        slices: What it finishes before.
    """

    epoch: int = 0
    slices: tuple[ShardSlice, ...] = ()


@dataclass(frozen=True)
class ShardOrder:
    """The order in which one reader takes the samples of one dataset.

    Attributes:
        dataset: Which shards.
        seed: Of the run.
        reader: Which reader this is.
        readers: How many there are, over all ranks and workers.
        leftover: What it finishes first.
    """

    dataset: Dataset
    seed: int
    reader: int
    readers: int
    leftover: Leftover = field(default_factory=Leftover)

    @property
    def sharing(self) -> int:
        """At most so many readers share a shard, each taking every n-th of its samples."""
        return math.ceil(self.readers / len(self.dataset.shards))

    def slices(self, epoch: int) -> Sequence[ShardSlice]:
        """All that the reader takes in one epoch, in order."""
        if epoch < self.leftover.epoch:
            return self.leftover.slices
        shards = self.dataset.shards
        order = _permuted(self.seed, self.dataset.name, shards, epoch)
        if self.sharing == 1:
            return [ShardSlice(epoch, shard) for shard in order[self.reader :: self.readers]]
        number, place = divmod(self.reader, len(shards))
        stride = len(range(place, self.readers, len(shards)))
        # Offsets turn from epoch to epoch, else the first samples, which every shard has, would
        # always go to the same readers.
        return [ShardSlice(epoch, order[place], 0, stride, (number + epoch) % stride)]

    def remaining(self, cursor: Cursor, end: int) -> Iterator[ShardSlice]:
        """What is left from a cursor on, up to and without epoch `end`."""
        for epoch in range(cursor.epoch, end):
            for number, own in enumerate(self.slices(epoch)):
                if (epoch, number) > cursor[:2]:
                    yield own
                elif (epoch, number) == cursor[:2] and (rest := own.after(cursor.sample)):
                    yield rest


# All readers have it in common; without it a restart with another number of thousands of readers
# permutes as many shards once for each.
@lru_cache(maxsize=4)
def _permuted(seed: int, name: str, shards: range, epoch: int) -> list[int]:
    rng = generator(seed, name, epoch, "shards")
    return (rng.permutation(len(shards)) + shards.start).tolist()
