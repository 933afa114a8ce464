"""Where a run stands in its data: what a checkpoint stores, and how other readers go on.

Each rank consumes batches of its own readers, and each batch carries its reader's state, so a
rank's `LoaderPosition` is the newest state of each. The same ranks and workers go on from it bit
for bit. Any others take over: what all old readers together had left of the passes that any of
them had begun, the samples read ahead but not consumed among it, is dealt out anew, so within a
pass no sample is lost and none repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.mixture import Sources
from navit_clip.data.order import Inheritance, Piece
from navit_clip.data.reader import Reader, ReaderStart, ReaderState
from navit_clip.errors import UserError
from navit_clip.packed.batch import PackedBatch


@dataclass
class LoaderPosition:
    """What one rank consumed so far.

    Attributes:
        batches: Batches consumed since its readers began.
        readers: State of each of the rank's readers, by number.
        starts: What each of the rank's readers took over, by number; nothing at a run's begin.
        total: Readers of all ranks.
        shards: Tells the shards they read, see `Sources.digest`.
    """

    batches: int = 0
    readers: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, Any] = field(default_factory=dict)
    total: int = 1
    shards: str = ""

    def advance(self, batch: PackedBatch) -> None:
        """Counts a batch as consumed."""
        self.batches += 1
        self.readers.update(batch.position)

    def to_json(self) -> dict[str, Any]:
        """The position as plain values."""
        return asdict(self)

    def reader(self, sources: Sources, build: PairBuilder, number: int) -> Reader:
        """The reader of a number, with what it took over."""
        start = self.starts.get(str(number))
        return Reader(
            sources,
            build,
            number,
            self.total,
            ReaderStart.from_json(start) if start else ReaderStart(),
        )

    def state(self, reader: Reader) -> ReaderState:
        """Where a reader stands."""
        saved = self.readers.get(str(reader.reader))
        return ReaderState.from_json(saved) if saved else reader.begin


def open_position(
    saved: Sequence[LoaderPosition],
    sources: Sources,
    build: PairBuilder,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> LoaderPosition:
    """Where a rank begins, or goes on.

    Args:
        saved: What all ranks of the stopped run had consumed, in their order; empty at a run's
            begin.
        sources: The run's shards.
        build: Makes pairs; its configuration says how many readers each rank has.
        rank: This process.
        world_size: Number of processes.

    Raises:
        UserError: If the run was stopped with other shards.
    """
    per_rank = max(1, build.config.workers)
    total = world_size * per_rank
    position = LoaderPosition(total=total, shards=sources.digest)
    if not saved:
        return position
    if saved[0].shards != sources.digest:
        raise UserError(
            f"the checkpoint was taken with other training shards ({saved[0].shards}, now "
            f"{sources.digest}): resume with the same ones, or use another run_dir"
        )
    if len(saved) == world_size and saved[0].total == total:
        return replace(saved[rank])
    starts = take_over(saved, sources, build, total)
    own = range(rank * per_rank, (rank + 1) * per_rank)
    position.starts = {str(number): starts[number].to_json() for number in own}
    return position


def take_over(
    saved: Sequence[LoaderPosition], sources: Sources, build: PairBuilder, readers: int
) -> list[ReaderStart]:
    """Deals out what is left of all passes begun.

    Args:
        saved: What all ranks of the stopped run had consumed.
        sources: The run's shards.
        build: Makes pairs.
        readers: How many will go on.

    Returns:
        What each of them finishes first.
    """
    old, states = [], []
    per_rank = saved[0].total // len(saved)
    for rank, position in enumerate(saved):
        for number in range(rank * per_rank, (rank + 1) * per_rank):
            old.append(position.reader(sources, build, number))
            states.append(position.state(old[-1]))
    # Pairs that wait to be packed were drawn, and will be once more.
    drawn = sum(state.drawn - len(state.pending) for state in states)
    inherited: list[list[Inheritance]] = [[] for _ in range(readers)]
    for number, source in enumerate(sources.sources):
        # Passes before this one were begun by some reader; from here on all begin anew.
        end = max(state.walks[number].epoch for state in states) + 1
        left: list[Piece] = []
        for reader, state in zip(old, states, strict=True):
            left += reader.walks[number].remaining(state.walks[number], end)
        ahead = (
            (origin.epoch, origin.shard, origin.index)
            for state in states
            for origin in chain(state.buffer, state.pending)
            if origin.shard in source.shards
        )
        pieces = _with_extra(left, ahead)
        for reader_number in range(readers):
            inherited[reader_number].append(Inheritance(end, tuple(pieces[reader_number::readers])))
    images = old[0].start.images + drawn
    return [ReaderStart(images, tuple(of_reader)) for of_reader in inherited]


def _with_extra(left: Iterable[Piece], ahead: Iterable[tuple[int, int, int]]) -> list[Piece]:
    """The pieces in order of their passes, with samples that were read ahead put back.

    A sample joins a piece of its own shard, if there is one, so that the shard is read once.
    """
    pieces = list(left)
    of_shard = {(piece.epoch, piece.shard): i for i, piece in enumerate(pieces)}
    extra: dict[tuple[int, int], list[int]] = {}
    for epoch, shard, index in ahead:
        extra.setdefault((epoch, shard), []).append(index)
    for (epoch, shard), indices in extra.items():
        place = of_shard.get((epoch, shard))
        if place is None:
            pieces.append(Piece(epoch, shard, stride=0, extra=tuple(sorted(indices))))
        else:
            both = sorted([*pieces[place].extra, *indices])
            pieces[place] = replace(pieces[place], extra=tuple(both))
    return sorted(pieces, key=lambda piece: piece.epoch)
