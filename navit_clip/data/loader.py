"""Packed batches for one rank: readers in worker processes behind a DataLoader.

The last step of the data pipeline, and all that the trainer sees of it. Rank r with W workers
holds readers r·W … r·W + W - 1; batches come from them in turn, and each carries the state of its
reader, so that a checkpoint stores what was consumed, not what was prefetched.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from navit_clip.data.builders.base import SampleBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.mixture import Mixture
from navit_clip.data.reader import Reader
from navit_clip.data.shared_batch import SharedBatch
from navit_clip.data.state import DataState, open_state
from navit_clip.data.waiting import WaitBoard
from navit_clip.data.workers import batches_of, prepare_worker
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch, Inputs

AnyInputs = TypeVar("AnyInputs", bound=Inputs)


class _Readers(IterableDataset[Batch[Any] | SharedBatch | UserError]):
    """The readers of one rank; each worker process runs one of them."""

    def __init__(
        self, readers: Sequence[Reader[Any, Any]], state: DataState, board: WaitBoard | None
    ) -> None:
        self.readers, self.state, self.board = readers, state, board

    def __iter__(self) -> Iterator[Batch[Any] | SharedBatch | UserError]:
        info = get_worker_info()
        worker = info.id if info else 0
        if self.board is not None:
            self.board.join(worker)
        # A DataLoader asks worker 0 first; after a resume it must be whoever's turn it was.
        reader = self.readers[(worker + self.state.batches) % len(self.readers)]
        try:
            for batch in reader.batches(self.state):
                yield SharedBatch(batch) if info else batch
        except UserError as error:
            yield error  # raised here it would arrive inside a worker's traceback, as text


def _leave_signals_to_trainer(worker: int) -> None:
    """Workers outlive an interrupt until the trainer, which saves first, stops them.

    A forked worker would also inherit the trainer's SIGTERM handler, and then never end.
    """
    # torch's own check of the parent is not enough: a worker that has more to send than a pipe
    # holds (64 kB) would wait forever for a killed trainer to read it.
    prepare_worker()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # torchrun signals a rank's whole process group; the workers must live until it has saved.
    os.setpgid(0, 0)


def load_batches(
    build: SampleBuilder[Any, AnyInputs],
    config: DataConfig,
    seed: int,
    *,
    mixture: Mixture | None = None,
    rank: int = 0,
    world_size: int = 1,
    state: DataState | None = None,
    pin_memory: bool = False,
    board: WaitBoard | None = None,
) -> Generator[Batch[AnyInputs], None, None]:
    """Yields one rank's batches without end.

    Args:
        build: Makes samples, and inputs of many samples.
        config: How they are read, shuffled and packed.
        seed: Of their order.
        mixture: The shards; None looks up those of the configuration.
        rank: This process.
        world_size: Number of processes.
        state: Where to go on, from `open_state`; the caller advances its own copy with each batch
            that it consumes. None begins at the first sample.
        pin_memory: Hand out batches in page-locked memory.
        board: Shows what the workers wait for; with a line for each, and at least one.

    Raises:
        UserError: If the shards are missing, empty or unusable, or the token budgets are not those
            of the builder's streams.
    """
    mixture = mixture or Mixture.find(config)
    if state is None:
        state = open_state([], mixture, seed, workers=config.workers, world_size=world_size)
    state = replace(state, readers=dict(state.readers))
    per_rank = max(1, config.workers)
    readers = [
        Reader(mixture, build, config, seed, reader)
        for reader in range(rank * per_rank, (rank + 1) * per_rank)
    ]
    loader: DataLoader[Batch[Any] | SharedBatch | UserError] = DataLoader(
        _Readers(readers, state, board),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_trainer,
        # Its seed for the workers, which need none, would be drawn from torch's own generator: a
        # restart would change whatever the model draws from that.
        generator=torch.Generator(),
    )
    for batch in batches_of(loader):
        if isinstance(batch, UserError):
            raise batch
        assert isinstance(batch, Batch)  # a shared one arrives as it was
        yield batch
