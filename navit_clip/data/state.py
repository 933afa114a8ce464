"""Where a run stands in its data: what a checkpoint stores, and how other readers go on.

Each rank consumes batches of its own readers, and each batch carries its reader's state, so a
rank's `DataState` holds the newest state of each. The same ranks and workers go on from it bit for
bit. For any others it is resharded: what all old readers together had left of the epochs that any
of them had begun, samples read ahead but not consumed among it, is dealt to the new readers, so
within an epoch no sample is lost and none repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from navit_clip.data.builders.base import Origin
from navit_clip.data.mixture import Mixture
from navit_clip.data.order import Cursor, Leftover, ShardOrder, ShardSlice
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
    per_rank = max(1, workers)
    names = [dataset.name for dataset in mixture.datasets]
    state = DataState(mixture.digest, seed, names, total=world_size * per_rank)
    if not saved:
        return state
    first = saved[0]
    for what, before, now in (
        ("other training shards", first.shards, state.shards),
        ("another seed", first.seed, seed),
        ("datasets of other names", ", ".join(first.datasets), ", ".join(names)),
    ):
        if before != now:
            # Where a reader stands means other samples there: some would come twice, some never.
            raise UserError(
                f"the checkpoint was taken with {what} ({before}, now {now}): resume with the same,"
                " or use another run_dir"
            )
    if len(saved) == world_size and first.total == state.total:
        return replace(saved[rank])
    state.samples, state.tokens, state.flops = first.samples, first.tokens, first.flops
    state.images, leftovers = reshard(saved, mixture, seed, state.total)
    own = range(rank * per_rank, (rank + 1) * per_rank)
    state.leftovers = {reader: leftovers[reader] for reader in own}
    return state


def reshard(
    saved: Sequence[DataState], mixture: Mixture, seed: int, readers: int
) -> tuple[int, list[list[Leftover]]]:
    """Deals what is left of all epochs begun to readers of another number.

    Returns:
        Samples taken so far, and what each reader finishes first in each dataset.
    """
    per_rank = saved[0].total // len(saved)
    old = [
        data.of_reader(mixture, seed, rank * per_rank + reader)
        for rank, data in enumerate(saved)
        for reader in range(per_rank)
    ]
    leftovers: list[list[Leftover]] = [[] for _ in range(readers)]
    for number, dataset in enumerate(mixture.datasets):
        # Epochs before this one were begun by some reader; this one every reader begins.
        end = max(state.cursors[number].epoch for _, state in old) + 1
        left = chain.from_iterable(
            orders[number].remaining(state.cursors[number], end) for orders, state in old
        )
        ahead = (
            origin
            for _, state in old
            for origin in chain(state.buffer, state.pending)
            if origin.shard in dataset.shards
        )
        slices = _with_extra(left, ahead)
        for reader in range(readers):
            leftovers[reader].append(Leftover(end, tuple(slices[reader::readers])))
    # Samples that wait to be packed were drawn, and will be once more.
    drawn = sum(state.drawn - len(state.pending) for _, state in old)
    return saved[0].images + drawn, leftovers


def _with_extra(left: Iterable[ShardSlice], ahead: Iterable[Origin]) -> list[ShardSlice]:
    """The slices in order of their epochs, with samples that were read ahead put back.

    A sample joins a slice of its own shard, if there is one, so that the shard is read once.
    """
    extra: dict[tuple[int, int], list[int]] = {}
    for origin in ahead:
        extra.setdefault((origin.epoch, origin.shard), []).append(origin.sample)
    slices = list(left)
    # The last one of a shard, if several readers had slices of it.
    of_shard = {(own.epoch, own.shard): i for i, own in enumerate(slices)}
    for (epoch, shard), indices in extra.items():
        i = of_shard.get((epoch, shard), len(slices))
        if i == len(slices):
            slices.append(ShardSlice(epoch, shard, stride=0))
        slices[i] = replace(slices[i], extra=tuple(sorted([*slices[i].extra, *indices])))
    return sorted(slices, key=lambda own: own.epoch)
