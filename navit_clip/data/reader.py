"""One reader: an endless stream of packed batches from its part of every dataset.

A reader is one worker of one rank. Which samples it reads, in which order, and what becomes of
them is a function of (seed, reader, number of readers), so its state is small: where it stands in
each dataset, and which samples it holds read ahead (to shuffle and to pack). The state travels with
each batch; a reader started from it goes on with the next batch, bit for bit, after reading those
few samples again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic

from navit_clip.data.builders.base import AnyInputs_co, AnySample, Origin, SampleBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.dataset_reader import DatasetReader, read_again
from navit_clip.data.mixture import Mixture
from navit_clip.data.packer import Packer
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import draw_index
from navit_clip.data.skip_log import SkipLog
from navit_clip.data.state import DataState, ReaderState
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.packed.batch import Batch, BatchCounts, StreamCounts


@dataclass
class Reader(Generic[AnySample, AnyInputs_co]):
    """Reads, shuffles, builds and packs samples without end.

    Attributes:
        mixture: All shards of the run, the same in every reader.
        build: Makes samples ready to be packed.
        config: How they are shuffled and packed, and how many may be unusable.
        seed: Of the run.
        reader: Which reader this is, over all ranks and workers.

    Raises:
        UserError: If the token budgets are not those of the builder's streams.
    """

    mixture: Mixture
    build: SampleBuilder[AnySample, AnyInputs_co]
    config: DataConfig
    seed: int
    reader: int

    def __post_init__(self) -> None:
        try:
            self.budget = self.config.budget.ordered(self.build.streams)
        except ValueError as error:
            raise UserError(str(error)) from error

    def batches(self, data: DataState) -> Iterator[Batch[AnyInputs_co]]:
        """Yields batches without end.

        Args:
            data: Where the reader's rank stands, under the same configuration.

        Raises:
            UserError: If a whole epoch of a dataset has no sample, or too many samples or shards in
                a row are unusable.
        """
        config, skips = self.config, SkipLog(self.config.max_bad_samples)
        orders, state = data.of_reader(self.mixture, self.seed, self.reader)
        read_ahead = read_again(self.mixture, [*state.buffer, *state.pending])
        buffer = [(read_ahead[origin], origin) for origin in state.buffer]
        packer: Packer[AnySample] = Packer(self.budget, config.look_ahead, config.packing)
        for origin in state.pending:
            self._offer(packer, read_ahead[origin], origin, skips)
        datasets = [
            DatasetReader(self.mixture, order, cursor, skips)
            for order, cursor in zip(orders, state.cursors, strict=True)
        ]
        taken, drawn = list(state.taken), state.drawn
        samples = _mixed(datasets, taken)
        while True:
            # A restored packer may hold a whole batch already.
            while (packed := packer.take()) is not None:
                state = ReaderState(
                    [dataset.cursor for dataset in datasets],
                    list(taken),
                    drawn,
                    [origin for _, origin in buffer],
                    [sample.origin for sample in packer.pending],
                )
                yield self._batch(packed, skips, state)
            while len(buffer) < config.shuffle_buffer:
                buffer.append(next(samples))
            pick = draw_index(len(buffer), self.seed, self.reader, drawn, "shuffle")
            # Swap with the last: removal from the middle would move the whole buffer.
            buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
            raw, origin = buffer.pop()
            origin = origin._replace(images_seen=data.images + drawn * data.total)
            drawn += 1
            self._offer(packer, raw, origin, skips)

    def _offer(
        self, packer: Packer[AnySample], raw: RawSample, origin: Origin, skips: SkipLog
    ) -> None:
        """Builds a sample and lets it wait for a batch; one that waited before a restart again.

        With what the command has changed since, captions say, that one may be unusable now.
        """
        try:
            raw.check()
            packer.offer(self.build(raw, origin, self.mixture.dataset_of(origin.shard).captions))
            skips.bad_samples = 0
        except SkipSampleError as error:
            skips.skip_sample(raw.id, error)

    def _batch(
        self, samples: list[AnySample], skips: SkipLog, state: ReaderState
    ) -> Batch[AnyInputs_co]:
        pad = self.config.pad_to_budget
        streams = {}
        for i, (name, budget) in enumerate(self.budget.tokens.items()):
            tokens = sum(sample.lengths[i] for sample in samples)
            full = sum(sample.full_lengths[i] for sample in samples)
            streams[name] = StreamCounts(tokens, full, budget, slots=budget if pad else tokens)
        datasets = Counter(self.mixture.dataset_of(s.origin.shard).name for s in samples)
        return Batch(
            self.build.collate(samples, tuple(self.budget.tokens.values()) if pad else None),
            ids=tuple(sample.id for sample in samples),
            counts=BatchCounts(len(samples), streams, datasets, *skips.take()),
            state={self.reader: state},
        )


def _mixed(datasets: list[DatasetReader], taken: list[int]) -> Iterator[tuple[RawSample, Origin]]:
    """Samples of all datasets in proportion to their weights, counted up in `taken`.

    The next sample comes from the dataset that is furthest behind its weight, so the proportions
    hold to one sample at any time and need no generator.
    """
    streams = [iter(dataset) for dataset in datasets]
    weights = [dataset.order.dataset.weight for dataset in datasets]
    while True:
        total = sum(taken) + 1
        behind = [weight * total - count for weight, count in zip(weights, taken, strict=True)]
        number = behind.index(max(behind))
        sample = next(streams[number])
        taken[number] += 1
        yield sample
