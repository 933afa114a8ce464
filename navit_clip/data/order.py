"""The order in which one reader takes the samples of one source, and where it stands in it.

Between the list of shards and the reader. A source's shards are permuted per epoch and dealt to
all readers; with fewer shards than readers every reader walks all of them and takes every n-th
sample. What a reader takes is therefore a list of pieces of shards, a function of (seed, source,
epoch, reader, number of readers), and its place in that list is three numbers.

When the number of readers changes, the old lists are worth nothing, so what was left of them
becomes a list of its own: the new readers first finish those pieces (`Inheritance`), then go on
with whole epochs of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from navit_clip.data.mixture import Dataset
from navit_clip.data.seeding import generator


@dataclass(frozen=True)
class Piece:
    """Samples of one shard that one reader takes in one epoch.

    Attributes:
        epoch: The pass over the source that they belong to.
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

    def after(self, index: int) -> Piece | None:
        """What is left from `index` on, None if nothing is."""
        extra = tuple(i for i in self.extra if i >= index)
        if not self.stride and not extra:
            return None
        return replace(self, start=max(self.start, index), extra=extra)

    def to_json(self) -> list[Any]:
        """The piece as plain values."""
        return [self.epoch, self.shard, self.start, self.stride, self.offset, list(self.extra)]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Piece:
        """The piece that `to_json` wrote."""
        epoch, shard, start, stride, offset, extra = values
        return cls(epoch, shard, start, stride, offset, tuple(extra))


class WalkPosition(NamedTuple):
    """Where a reader stands in one source.

    Attributes:
        epoch: Pass over the source; the one before the first whole one is the inheritance.
        piece: Pieces of the pass that are done.
        sample: Index in the next piece's shard up to which samples are taken.
    """

    epoch: int
    piece: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Inheritance:
    """What one reader takes over in one source from readers of another number.

    Attributes:
        epoch: The first pass that the reader walks as its own, whole.
        pieces: What it finishes before.
    """

    epoch: int = 0
    pieces: tuple[Piece, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The inheritance as plain values."""
        return {"epoch": self.epoch, "pieces": [piece.to_json() for piece in self.pieces]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Inheritance:
        """The inheritance that `to_json` wrote."""
        return cls(values["epoch"], tuple(map(Piece.from_json, values["pieces"])))


@dataclass(frozen=True)
class Walk:
    """One reader's walk over one source.

    Attributes:
        dataset: Which shards.
        seed: Of the run.
        reader: Which reader this is.
        readers: How many there are, over all ranks and workers.
        inherited: What it finishes first.
    """

    dataset: Dataset
    seed: int
    reader: int
    readers: int
    inherited: Inheritance = field(default_factory=Inheritance)

    @property
    def begin(self) -> WalkPosition:
        """The position before the first sample."""
        return WalkPosition(self.inherited.epoch - bool(self.inherited.pieces))

    @property
    def by_sample(self) -> bool:
        """Whether readers share shards sample by sample, since there are too few."""
        return len(self.dataset.shards) < self.readers

    def pieces(self, epoch: int) -> Sequence[Piece]:
        """All that the reader takes in one pass, in order."""
        if epoch < self.inherited.epoch:
            return self.inherited.pieces
        shards = self.dataset.shards
        rng = generator(self.seed, self.dataset.name, epoch, "shards")
        order = (rng.permutation(len(shards)) + shards.start).tolist()
        if self.by_sample:
            # Offsets turn from shard to shard and from epoch to epoch, else the first samples,
            # which every shard has, would always go to the same readers.
            return [
                Piece(epoch, shard, 0, self.readers, (self.reader + epoch + shard) % self.readers)
                for shard in order
            ]
        return [Piece(epoch, shard) for shard in order[self.reader :: self.readers]]

    def remaining(self, position: WalkPosition, end: int) -> Iterator[Piece]:
        """What is left from a position on, up to and without epoch `end`."""
        for epoch in range(position.epoch, end):
            pieces = self.pieces(epoch)
            if epoch == position.epoch:
                pieces = pieces[position.piece :]
                if pieces and position.sample:
                    rest = pieces[0].after(position.sample)
                    pieces = [*([rest] if rest else []), *pieces[1:]]
            yield from pieces
