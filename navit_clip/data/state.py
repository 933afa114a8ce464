"""Where a run stands in its data: what a checkpoint stores, and how other readers go on.

Each rank consumes batches of its own readers, and each batch carries its reader's state, so a
rank's `DataState` holds the newest state of each. The same ranks and workers go on from it bit for
bit. For any others it is resharded: what all old readers together had left of the epochs that any
of them had begun, samples read ahead but not consumed among it, is dealt to the new readers, so
within an epoch no sample is lost and none repeated.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from navit_clip.data.builders.base import Origin
from navit_clip.data.mixture import Mixture
from navit_clip.data.order import Cursor, Leftover, ShardOrder, ShardSlice
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch


@dataclass
class ReaderState:
    """Where a reader stands after a batch.

    Attributes:
        cursors: Where it stands in each dataset.
        taken: Samples taken from each dataset.
        drawn: Samples that left the shuffle buffer so far.
        buffer: Samples in the shuffle buffer, in order.
        pending: Samples that wait to be packed, in order.
    """

    cursors: list[Cursor]
    taken: list[int]
    drawn: int = 0
    buffer: list[Origin] = field(default_factory=list)
    pending: list[Origin] = field(default_factory=list)


@dataclass
class DataState:
    """What one rank consumed so far.

    Attributes:
        shards: Checksum of the shards that are read, see `Mixture.digest`.
        seed: Of the run; with the datasets' names it decides the order.
        datasets: Names of the datasets.
        total: Readers of all ranks.
        images: Samples that readers of another number had taken before, all together.
        leftovers: What each of the rank's readers finishes first in each dataset, by the reader's
            number; empty unless the number of readers changed.
        samples: Samples that all ranks have trained on since the run began.
        tokens: Tokens of all their streams, after token drop.
        flops: What training on them computed.
        batches: Batches consumed since its readers began.
        readers: State of each of the rank's readers, by number; none before its first batch.
    """

    shards: str
    seed: int = 0
    datasets: list[str] = field(default_factory=list)
    total: int = 1
    images: int = 0
    leftovers: dict[int, list[Leftover]] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    batches: int = 0
    readers: dict[int, ReaderState] = field(default_factory=dict)

    def count(self, samples: float, tokens: float, flops: float) -> None:
        """Counts what all ranks trained on in a step."""
        self.samples += int(samples)
        self.tokens += int(tokens)
        self.flops += flops

    @property
    def seen(self) -> dict[str, float]:
        """What all ranks have trained on, as it is logged."""
        return {
            "samples_seen": self.samples,
            "tokens_seen": self.tokens,
            "flops_seen": self.flops,
        }

    def advance(self, batch: Batch[Any]) -> None:
        """Counts a batch as consumed."""
        self.batches += 1
        self.readers.update(batch.state)

    def of_reader(
        self, mixture: Mixture, seed: int, reader: int
    ) -> tuple[list[ShardOrder], ReaderState]:
        """The order in which a reader takes the samples of each dataset, and where it stands."""
        leftovers = self.leftovers.get(reader) or [Leftover()] * len(mixture.datasets)
        orders = [
            ShardOrder(dataset, seed, reader, self.total, leftover)
            for dataset, leftover in zip(mixture.datasets, leftovers, strict=True)
        ]
        # What is left over counts as the epoch before the first whole one.
        begin = [Cursor(left.epoch - bool(left.slices)) for left in leftovers]
        return orders, self.readers.get(reader, ReaderState(begin, [0] * len(begin)))


def open_state(
    saved: Sequence[DataState],
    mixture: Mixture,
    seed: int,
    *,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> DataState:
    """Where a rank begins, or goes on.

    Args:
        saved: What all ranks of the stopped run had consumed, in their order; empty for a new run.
        mixture: The run's shards.
        seed: Of the run.
        workers: Reader processes of each rank; 0 for one reader in the training process.
        rank: This process.
        world_size: Number of processes.

    Raises:
        UserError: If the run was stopped with anything else that the order depends on: other
            shards, another seed, datasets of other names.
    """
    new = _new_state(mixture, seed, workers, world_size)
    if not saved:
        return new
    if _same_readers(saved, new, world_size):
        return replace(saved[rank])
    return _resharded(saved, new, mixture, world_size)[rank]


def open_states(
    saved: Sequence[DataState], mixture: Mixture, seed: int, *, workers: int, ranks: Ranks
) -> DataState:
    """Like `open_state` of this rank, with one rank to reshard for all; every rank calls it.

    Args:
        saved: As for `open_state`, best read when asked for: a rank asks for the first and its own.
            Of any number of ranks rank 0 asks for every one.
        mixture: The run's shards.
        seed: Of the run.
        workers: Reader processes of each rank.
        ranks: This process among all of them.

    Raises:
        UserError: As `open_state`, or if a state cannot be read, on all ranks.
    """
    new = _new_state(mixture, seed, workers, ranks.world_size)
    if not saved:
        return new
    problem: UserError | None = None
    own: DataState | None = None
    dealt: list[DataState] = []
    try:
        if _same_readers(saved, new, ranks.world_size):
            own = replace(saved[ranks.rank])
        elif ranks.is_first:
            dealt = _resharded(saved, new, mixture, ranks.world_size)
    except UserError as error:
        problem = error
    ranks.raise_together(problem)
    return ranks.scatter(dealt) if own is None else own


def _new_state(mixture: Mixture, seed: int, workers: int, world_size: int) -> DataState:
    names = [dataset.name for dataset in mixture.datasets]
    return DataState(mixture.digest, seed, names, total=world_size * max(1, workers))


def _same_readers(saved: Sequence[DataState], new: DataState, world_size: int) -> bool:
    """Whether the ranks and readers are those of the stopped run.

    Raises:
        UserError: If something that the order depends on is not.
    """
    first = saved[0]
    for what, before, now in (
        ("other training shards", first.shards, new.shards),
        ("another seed", first.seed, new.seed),
        ("datasets of other names", ", ".join(first.datasets), ", ".join(new.datasets)),
    ):
        if before != now:
            # Where a reader stands means other samples there: some would come twice, some never.
            raise UserError(
                f"the checkpoint was taken with {what} ({before}, now {now}): resume with the same,"
                " or use another run_dir"
            )
    return len(saved) == world_size and first.total == new.total


def _resharded(
    saved: Sequence[DataState], new: DataState, mixture: Mixture, world_size: int
) -> list[DataState]:
    """Where each rank goes on whose readers are others than those of the stopped run."""
    first, per_rank = saved[0], new.total // world_size
    images, leftovers = reshard(saved, mixture, new.seed, new.total)
    return [
        replace(
            new,
            images=images,
            samples=first.samples,
            tokens=first.tokens,
            flops=first.flops,
            leftovers={r: leftovers[r] for r in range(rank * per_rank, (rank + 1) * per_rank)},
            readers={},
        )
        for rank in range(world_size)
    ]


def reshard(
    saved: Sequence[DataState], mixture: Mixture, seed: int, readers: int
) -> tuple[int, list[list[Leftover]]]:
    """Deals what is left of all epochs begun to readers of another number.

    Returns:
        Samples taken so far, and what each reader finishes first in each dataset.
    """
    per_rank = images = drawn = 0
    old: list[tuple[list[ShardOrder], list[Cursor]]] = []
    # By epoch and shard. Numbers alone: of each state in turn, as the states of 512 ranks with
    # their millions of samples would take gigabytes.
    ahead: dict[tuple[int, int], array[int]] = {}
    for rank, data in enumerate(saved):
        if rank == 0:
            per_rank, images = data.total // len(saved), data.images
        for reader in range(rank * per_rank, (rank + 1) * per_rank):
            orders, state = data.of_reader(mixture, seed, reader)
            old.append((orders, state.cursors))
            for origin in chain(state.buffer, state.pending):
                indices = ahead.setdefault((origin.epoch, origin.shard), array("q"))
                indices.append(origin.sample)
            # Samples that wait to be packed were drawn, and will be once more.
            drawn += state.drawn - len(state.pending)
    leftovers: list[list[Leftover]] = [[] for _ in range(readers)]
    for number, dataset in enumerate(mixture.datasets):
        # Epochs before this one were begun by some reader; this one every reader begins.
        end = max(cursors[number].epoch for _, cursors in old) + 1
        left = chain.from_iterable(
            orders[number].remaining(cursors[number], end) for orders, cursors in old
        )
        extra = {place: i for place, i in ahead.items() if place[1] in dataset.shards}
        slices = _with_extra(left, extra)
        for reader in range(readers):
            leftovers[reader].append(Leftover(end, tuple(slices[reader::readers])))
    return images + drawn, leftovers


def _with_extra(
    left: Iterable[ShardSlice], ahead: Mapping[tuple[int, int], Iterable[int]]
) -> list[ShardSlice]:
    """The slices in order of their epochs, with samples that were read ahead put back.

    A sample joins a slice of its own shard, if there is one, so that the shard is read once.

    Args:
        left: Slices.
        ahead: Indices of those samples by epoch and shard.
    """
    slices = list(left)
    # The last one of a shard, if several readers had slices of it.
    of_shard = {(own.epoch, own.shard): i for i, own in enumerate(slices)}
    for (epoch, shard), indices in ahead.items():
        i = of_shard.get((epoch, shard), len(slices))
        if i == len(slices):
            slices.append(ShardSlice(epoch, shard, stride=0))
        slices[i] = replace(slices[i], extra=tuple(sorted([*slices[i].extra, *indices])))
    return sorted(slices, key=lambda own: own.epoch)
