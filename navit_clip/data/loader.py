"""Packed batches for one rank: readers in worker processes behind a DataLoader.

The last step of the data pipeline, and all that the trainer sees of it. Rank r with W workers
holds readers r·W … r·W + W - 1; batches come from them in turn, and each carries the state of its
reader, so that a checkpoint stores what was consumed, not what was prefetched.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.mixture import Sources
from navit_clip.data.shared_batch import Parcel
from navit_clip.data.state import LoaderPosition, open_position
from navit_clip.data.workers import prepare_worker
from navit_clip.errors import UserError
from navit_clip.packed.batch import PackedBatch


@dataclass(frozen=True)
class _Failure:
    """A user's mistake found in a worker, carried to the training process.

    Raised there it would arrive inside a worker's traceback, as text.
    """

    message: str


class _Readers(IterableDataset[PackedBatch | Parcel | _Failure]):
    """The readers of one rank; each worker process runs one of them."""

    def __init__(
        self, sources: Sources, build: PairBuilder, rank: int, position: LoaderPosition
    ) -> None:
        self.sources, self.build, self.position = sources, build, position
        self.per_rank = max(1, build.config.workers)
        self.first = rank * self.per_rank

    def __iter__(self) -> Iterator[PackedBatch | Parcel | _Failure]:
        info = get_worker_info()
        worker = info.id if info else 0
        # A DataLoader asks worker 0 first; after a resume it must be whoever's turn it was.
        number = self.first + (worker + self.position.batches) % self.per_rank
        reader = self.position.reader(self.sources, self.build, number)
        try:
            for batch in reader.batches(self.position.state(reader)):
                yield Parcel(batch) if info else batch
        except UserError as error:
            yield _Failure(str(error))


def _leave_signals_to_trainer(worker: int) -> None:
    """Workers outlive an interrupt until the trainer, which saves first, stops them.

    A forked worker would also inherit the trainer's SIGTERM handler, and then never end.
    """
    # torch's own watch over the parent is not enough: a worker that has more to hand over than a
    # pipe holds (64 kB) would wait for ever for a killed trainer to read it.
    prepare_worker()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # torchrun signals a rank's whole process group; the workers must live until it has saved.
    os.setpgid(0, 0)


def load_batches(
    build: PairBuilder,
    *,
    sources: Sources | None = None,
    rank: int = 0,
    world_size: int = 1,
    position: LoaderPosition | None = None,
    pin_memory: bool = False,
) -> Iterator[PackedBatch]:
    """Yields one rank's batches without end.

    Args:
        build: Makes pairs, and holds the configuration.
        sources: The shards; None looks up those of the configuration.
        rank: This process.
        world_size: Number of processes.
        position: Where to go on, from `open_position`; the caller advances its own copy with each
            batch it consumes. None begins anew.
        pin_memory: Hand out batches in page-locked memory.

    Raises:
        UserError: If the shards are missing, empty or unusable.
    """
    config = build.config
    sources = sources or Sources.find(config)
    if position is None:
        position = open_position([], sources, build, rank=rank, world_size=world_size)
    position = replace(position, readers=dict(position.readers))
    loader: DataLoader[PackedBatch | Parcel | _Failure] = DataLoader(
        _Readers(sources, build, rank, position),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_trainer,
        # Its seed for the workers, which need none, would be drawn from torch's own generator: a
        # restart would change whatever the model draws from that.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, _Failure):
            raise UserError(batch.message)
        assert isinstance(batch, PackedBatch)  # a parcel arrives without its wrapping
        yield batch
