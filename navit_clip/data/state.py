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

from navit_clip.data.builders.base import Origin
from navit_clip.data.mixture import Mixture
from navit_clip.data.order import Inheritance, Piece, Walk, WalkPosition
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch


@dataclass
class ReaderState:
    """Where a reader stands after a batch.

    Attributes:
        walks: Its place in each dataset.
        taken: Samples taken from each dataset.
        drawn: Samples that left the shuffle buffer so far.
        buffer: Samples in the shuffle buffer, in order.
        pending: Samples that wait to be packed, in order.
    """

    walks: list[WalkPosition]
    taken: list[int]
    drawn: int = 0
    buffer: list[Origin] = field(default_factory=list)
    pending: list[Origin] = field(default_factory=list)

    @classmethod
    def at_begin(cls, walks: Sequence[Walk]) -> ReaderState:
        """The state before the first sample."""
        return cls([walk.begin for walk in walks], [0] * len(walks))

    def to_json(self) -> dict[str, Any]:
        """The state as plain values; origins as lists, since there may be thousands."""
        values: dict[str, Any] = {"taken": list(self.taken), "drawn": self.drawn}
        values["walks"] = [list(walk) for walk in self.walks]
        for name in ("buffer", "pending"):
            values[name] = [[o.epoch, o.shard, o.index, o.images_seen] for o in getattr(self, name)]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ReaderState:
        """The state that `to_json` wrote."""
        origins = {name: [Origin(*o) for o in values[name]] for name in ("buffer", "pending")}
        walks = [WalkPosition(*walk) for walk in values["walks"]]
        return cls(walks, list(values["taken"]), values["drawn"], **origins)


@dataclass(frozen=True)
class ReaderStart:
    """What a reader takes over from readers of another number.

    Attributes:
        images: Images that those had taken, all together.
        datasets: What is left to it of each dataset.
    """

    images: int = 0
    datasets: tuple[Inheritance, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The start as plain values."""
        return {"images": self.images, "sources": [s.to_json() for s in self.datasets]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ReaderStart:
        """The start that `to_json` wrote."""
        return cls(values["images"], tuple(map(Inheritance.from_json, values["sources"])))


def open_walks(
    mixture: Mixture, seed: int, reader: int, readers: int, start: ReaderStart
) -> list[Walk]:
    """One reader's walk over each dataset.

    Args:
        mixture: The run's shards.
        seed: Of the run.
        reader: Which reader this is.
        readers: How many there are, over all ranks and workers.
        start: What it finishes before its own share.
    """
    inherited = start.datasets or (Inheritance(),) * len(mixture.datasets)
    return [
        Walk(dataset, seed, reader, readers, left)
        for dataset, left in zip(mixture.datasets, inherited, strict=True)
    ]


@dataclass
class LoaderPosition:
    """What one rank consumed so far.

    Attributes:
        batches: Batches consumed since its readers began.
        readers: State of each of the rank's readers, by number.
        starts: What each of the rank's readers took over, by number; nothing at a run's begin.
        total: Readers of all ranks.
        shards: Tells the shards they read, see `Mixture.digest`.
    """

    batches: int = 0
    readers: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, Any] = field(default_factory=dict)
    total: int = 1
    shards: str = ""

    def advance(self, batch: Batch[Any]) -> None:
        """Counts a batch as consumed."""
        self.batches += 1
        self.readers.update(batch.state)

    def to_json(self) -> dict[str, Any]:
        """The position as plain values."""
        return asdict(self)

    def start(self, number: int) -> ReaderStart:
        """What a reader took over."""
        start = self.starts.get(str(number))
        return ReaderStart.from_json(start) if start else ReaderStart()

    def state(self, number: int) -> ReaderState | None:
        """Where a reader stands, None before its first batch."""
        saved = self.readers.get(str(number))
        return ReaderState.from_json(saved) if saved else None


def open_position(
    saved: Sequence[LoaderPosition],
    mixture: Mixture,
    seed: int,
    *,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> LoaderPosition:
    """Where a rank begins, or goes on.

    Args:
        saved: What all ranks of the stopped run had consumed, in their order; empty at a run's
            begin.
        mixture: The run's shards.
        seed: Of the run.
        workers: Reader processes of each rank; 0 for one reader in the training process.
        rank: This process.
        world_size: Number of processes.

    Raises:
        UserError: If the run was stopped with other shards.
    """
    per_rank = max(1, workers)
    total = world_size * per_rank
    position = LoaderPosition(total=total, shards=mixture.digest)
    if not saved:
        return position
    if saved[0].shards != mixture.digest:
        raise UserError(
            f"the checkpoint was taken with other training shards ({saved[0].shards}, now "
            f"{mixture.digest}): resume with the same ones, or use another run_dir"
        )
    if len(saved) == world_size and saved[0].total == total:
        return replace(saved[rank])
    starts = take_over(saved, mixture, seed, total)
    own = range(rank * per_rank, (rank + 1) * per_rank)
    position.starts = {str(number): starts[number].to_json() for number in own}
    return position


def take_over(
    saved: Sequence[LoaderPosition], mixture: Mixture, seed: int, readers: int
) -> list[ReaderStart]:
    """Deals out what is left of all passes begun.

    Args:
        saved: What all ranks of the stopped run had consumed.
        mixture: The run's shards.
        seed: Of the run.
        readers: How many will go on.

    Returns:
        What each of them finishes first.
    """
    old, states = [], []
    total = saved[0].total
    per_rank = total // len(saved)
    for rank, position in enumerate(saved):
        for number in range(rank * per_rank, (rank + 1) * per_rank):
            walks = open_walks(mixture, seed, number, total, position.start(number))
            old.append(walks)
            states.append(position.state(number) or ReaderState.at_begin(walks))
    # Pairs that wait to be packed were drawn, and will be once more.
    drawn = sum(state.drawn - len(state.pending) for state in states)
    inherited: list[list[Inheritance]] = [[] for _ in range(readers)]
    for number, dataset in enumerate(mixture.datasets):
        # Passes before this one were begun by some reader; from here on all begin anew.
        end = max(state.walks[number].epoch for state in states) + 1
        left: list[Piece] = []
        for walks, state in zip(old, states, strict=True):
            left += walks[number].remaining(state.walks[number], end)
        ahead = (
            (origin.epoch, origin.shard, origin.index)
            for state in states
            for origin in chain(state.buffer, state.pending)
            if origin.shard in dataset.shards
        )
        pieces = _with_extra(left, ahead)
        for reader_number in range(readers):
            inherited[reader_number].append(Inheritance(end, tuple(pieces[reader_number::readers])))
    images = saved[0].start(0).images + drawn
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
