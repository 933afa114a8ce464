"""Samples to validate on: those of some shards, in their order, in batches of a fixed size.

Not through `navit_clip.data.reader`, which shuffles, repeats, and packs by what came before. Here
the k-th sample belongs to batch k // size, whichever rank and worker reads it, and a whole batch is
read by one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from navit_clip.data.budgets import Budgets
from navit_clip.data.builders.base import Origin, SampleBuilder
from navit_clip.data.mixture import Mixture
from navit_clip.data.packer import Packer
from navit_clip.data.pieces import Piece
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.shards import EveryNth, ShardError, read_shard
from navit_clip.data.shared_batch import SharedBatch
from navit_clip.data.workers import batches_of, prepare_worker
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.packed.batch import Inputs

_SEEN = 1 << 50  # images: what follows a schedule is as at its end


class HeldOutBatch(NamedTuple):
    """One batch of held-out samples.

    Attributes:
        number: Its place among all batches.
        pieces: Its samples, as many in a piece as the token budgets hold.
        skipped: How many could not be used; the batch is that much smaller.
    """

    number: int
    pieces: list[Inputs]
    skipped: int


class _Counts(NamedTuple):
    """What a reader that has come to the end knows of the shards."""

    counts: list[int | None]


@dataclass(eq=False)
class HeldOut(IterableDataset["HeldOutBatch | SharedBatch | _Counts | UserError"]):
    """Every `parts`-th batch of some shards, from batch `part` on.

    Attributes:
        mixture: The shards.
        build: Makes samples, and inputs of many.
        budget: What one piece may hold, in the order of the builder's streams.
        size: Samples in a batch; the last one has what is left.
        part: Which batches, such as those of a rank.
        parts: How many share them.
        counts: Samples in each shard, as far as they are known: one without a sample of this part's
            is not read. Filled in by the first reading to the end.
    """

    mixture: Mixture
    build: SampleBuilder[Any, Any]
    budget: Budgets
    size: int
    part: int = 0
    parts: int = 1
    counts: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [s.size if isinstance(s, Piece) else None for s in self.mixture.shards]

    def load(self, workers: int) -> Iterator[HeldOutBatch]:
        """Yields the batches, read by so many processes or in this one, in any order.

        Raises:
            UserError: If a shard cannot be read to its end.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=1 if workers else None,
            generator=torch.Generator(),  # else it would draw from that of the training
        )
        for batch in batches_of(loader):
            if isinstance(batch, UserError):
                raise batch
            if isinstance(batch, _Counts):
                self.counts[:] = batch.counts
            else:
                yield batch

    def __iter__(self) -> Iterator[HeldOutBatch | SharedBatch | _Counts | UserError]:
        worker, workers = 0, 1
        if info := get_worker_info():
            worker, workers = info.id, info.num_workers
            prepare_worker()
        own = EveryNth(self.size, self.part * workers + worker, self.parts * workers)
        try:
            for number, samples in groupby(self._read(own), key=itemgetter(0)):
                batch = self._build(number, samples)
                yield SharedBatch(batch) if info else batch
            yield _Counts(self.counts)
        except UserError as error:
            yield error  # raised here it would arrive inside a worker's traceback, as text

    def _read(self, own: EveryNth) -> Iterator[tuple[int, int, RawSample]]:
        """Numbers of the batch and of the shard, and the sample."""
        shards = zip(self.mixture.shards, self.mixture.names, strict=True)
        for shard, (path, name) in enumerate(shards):
            count = self.counts[shard]
            if count is not None and own.passes(count):
                continue
            before = own.place
            try:
                for raw in read_shard(path, own, name):
                    yield own.place // self.size, shard, raw
            except ShardError as error:
                raise error.refusal("data.validation: ") from error
            found = self.counts[shard] = own.place - before
            # The parts that did not read it would share out its samples otherwise.
            if count not in (None, found):
                raise UserError(
                    f"data.validation: {name} has {found:,} samples and had {count:,}, or its "
                    "manifest.jsonl says so: leave the shards as they are while a run goes on"
                )

    def _build(self, number: int, samples: Iterable[tuple[int, int, RawSample]]) -> HeldOutBatch:
        packer, skipped = Packer[Any](self.budget, look_ahead=0), 0
        for _, shard, raw in samples:
            try:
                raw.check()
                packer.offer(self.build(raw, Origin(0, shard, raw.index, _SEEN), None))
            except SkipSampleError:
                skipped += 1
        pieces = [self.build.collate(piece, None) for piece in iter(packer.flush, None)]
        return HeldOutBatch(number, pieces, skipped)
