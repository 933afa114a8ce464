"""One reader: an endless walk over its share of every source, as packed batches.

A reader is one worker of one rank. Which samples it reads, in which order, and what becomes of
them is a function of (seed, reader, number of readers), so its state is small: where it stands in
each source, and which samples it holds read ahead (to shuffle and to pack). The state travels with
each batch; a reader started from it goes on with the next batch, bit for bit, after reading those
few samples again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic

from navit_clip.data.builders.base import AnyInputs_co, AnySample, Origin, SampleBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.decode import SkipSampleError
from navit_clip.data.mixture import Mixture
from navit_clip.data.order import Piece, Walk, WalkPosition
from navit_clip.data.packer import Packer
from navit_clip.data.seeding import draw_index
from navit_clip.data.shards import RawSample, ShardError, read_shard
from navit_clip.data.state import ReaderStart, ReaderState, open_walks
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch, BatchCounts, StreamCounts

_NAMED_SKIPS = 8  # samples named per batch; the rest is only counted
# A dead server costs minutes of retries per shard; shards are read in random order, so as many in
# a row are no accident.
_MAX_BAD_SHARDS = 10


@dataclass
class Reader(Generic[AnySample, AnyInputs_co]):
    """Walks its share of all datasets without end.

    Attributes:
        mixture: All shards of the run, the same in every reader.
        build: Makes samples ready to be packed.
        config: How they are shuffled and packed, and how many may be unusable.
        seed: Of the run.
        reader: Which reader this is.
        readers: How many there are, over all ranks and workers.
        start: What it finishes before its own share.

    Raises:
        UserError: If the token budgets are not those of the builder's streams.
    """

    mixture: Mixture
    build: SampleBuilder[AnySample, AnyInputs_co]
    config: DataConfig
    seed: int
    reader: int
    readers: int
    start: ReaderStart = field(default_factory=ReaderStart)

    def __post_init__(self) -> None:
        self._skipped: Counter[str] = Counter()
        self._skip_log: list[str] = []
        self._bad_in_a_row = self._bad_shards_in_a_row = 0
        try:
            self.budget = self.config.budget.ordered(self.build.streams)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.walks = open_walks(self.mixture, self.seed, self.reader, self.readers, self.start)

    def batches(self, state: ReaderState | None = None) -> Iterator[Batch[AnyInputs_co]]:
        """Yields batches from `state` on, without end.

        Args:
            state: Taken from a batch of the same reader under the same configuration.

        Raises:
            UserError: If a whole pass over the share of a source finds no usable sample, or too
                many in a row are unusable.
        """
        state = state or ReaderState.at_begin(self.walks)
        config = self.config
        packer: Packer[AnySample] = Packer(self.budget, config.look_ahead, config.packing)
        read_ahead = self._read_again([*state.buffer, *state.pending])
        buffer = [read_ahead[origin] for origin in state.buffer]
        for origin in state.pending:
            packer.offer(self._build(read_ahead[origin], origin))
        # The read-ahead is in this function's own lists; the place moves on with the walk.
        place = ReaderState(list(state.walks), list(state.taken), state.drawn)
        origins = list(state.buffer)
        # A restored packer may hold a whole batch already.
        yield from self._closed(packer, place, origins)
        for raw, origin in self._mix(place):
            buffer.append(raw)
            origins.append(origin)
            if len(buffer) < config.shuffle_buffer:
                continue
            pick = draw_index(len(buffer), self.seed, self.reader, place.drawn, "shuffle")
            # Swap with the last: removal from the middle would move the whole buffer.
            buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
            origins[pick], origins[-1] = origins[-1], origins[pick]
            images_seen = self.start.images + place.drawn * self.readers
            place.drawn += 1
            drawn, origin = buffer.pop(), origins.pop()
            sample = self._try(drawn, Origin(origin.epoch, origin.shard, origin.index, images_seen))
            if sample is not None:
                packer.offer(sample)
                yield from self._closed(packer, place, origins)

    def _closed(
        self, packer: Packer[AnySample], place: ReaderState, buffer: list[Origin]
    ) -> Iterator[Batch[AnyInputs_co]]:
        while (samples := packer.take()) is not None:
            state = ReaderState(
                place.walks,
                place.taken,
                place.drawn,
                buffer,
                [sample.origin for sample in packer.pending],
            )
            yield self._batch(samples, state)

    def _batch(self, samples: list[AnySample], state: ReaderState) -> Batch[AnyInputs_co]:
        pad = self.config.pad_to_budget
        streams = {}
        for i, (name, budget) in enumerate(self.budget.tokens.items()):
            tokens = sum(sample.lengths[i] for sample in samples)
            full = sum(sample.full_lengths[i] for sample in samples)
            streams[name] = StreamCounts(tokens, full, budget, slots=budget if pad else tokens)
        counts = BatchCounts(
            examples=len(samples),
            streams=streams,
            sources=Counter(self.mixture.dataset_of(s.origin.shard).name for s in samples),
            skipped=self._skipped,
            skip_log=tuple(self._skip_log),
        )
        self._skipped, self._skip_log = Counter(), []
        return Batch(
            self.build.collate(samples, tuple(self.budget.tokens.values()) if pad else None),
            ids=tuple(sample.id for sample in samples),
            counts=counts,
            state={str(self.reader): state.to_json()},
        )

    def _mix(self, place: ReaderState) -> Iterator[tuple[RawSample, Origin]]:
        """All samples from `place` on, which it moves along, sources in their shares.

        The next sample comes from the source that is furthest behind its share, so the shares hold
        to one sample at any time and need no generator.
        """
        walks = [self._walk(number, place) for number in range(len(self.walks))]
        weights = [walk.dataset.weight for walk in self.walks]
        while True:
            total = sum(place.taken) + 1
            behind = [
                weight * total - taken for weight, taken in zip(weights, place.taken, strict=True)
            ]
            number = behind.index(max(behind))
            sample = next(walks[number])
            place.taken[number] += 1
            yield sample

    def _walk(self, number: int, place: ReaderState) -> Iterator[tuple[RawSample, Origin]]:
        """All samples of the share of one source from `place` on, which it moves along."""
        walk = self.walks[number]
        epoch, first, sample = place.walks[number]
        # Fewer samples than readers go round: each gets one in some pass.
        patience = walk.readers if walk.by_sample else 1
        empty = 0
        while True:
            pieces = walk.pieces(epoch)
            # A walk that resumes late in a pass, or finishes another's, may find nothing more.
            found = first > 0 or sample > 0 or epoch < walk.inherited.epoch
            for done, piece in enumerate(pieces[first:], first):
                for raw in self._samples(piece, sample):
                    place.walks[number] = WalkPosition(epoch, done, raw.index + 1)
                    found = True
                    yield raw, Origin(piece.epoch, piece.shard, raw.index, 0)
                sample = 0
                place.walks[number] = WalkPosition(epoch, done + 1)
            empty = 0 if found else empty + 1
            if empty == patience:
                self._give_up_on(walk, pieces)
            epoch, first = epoch + 1, 0
            place.walks[number] = WalkPosition(epoch)

    def _samples(self, piece: Piece, start: int) -> Iterator[RawSample]:
        """The samples of one piece from index `start` on."""
        rest = piece.after(start)
        if rest is None:
            return
        try:
            for sample in self._read(piece.shard, rest):
                self._bad_shards_in_a_row = 0
                yield sample
                if sample.index == rest.last:
                    return
        except ShardError as error:
            self._skip("bad_shard", str(error))
            self._bad_shards_in_a_row += 1
            if self._bad_shards_in_a_row == _MAX_BAD_SHARDS:
                raise UserError(
                    f"{_MAX_BAD_SHARDS} unreadable shards in a row, the last one {error}"
                ) from error

    def _read(self, shard: int, wanted: Container[int]) -> Iterator[RawSample]:
        """The wanted samples of a shard."""
        for sample in read_shard(self.mixture.shards[shard], wanted, self.mixture.names[shard]):
            if sample.index in wanted:
                yield sample

    def _read_again(self, origins: list[Origin]) -> dict[Origin, RawSample]:
        """Samples that were read ahead before a restart."""
        found: dict[tuple[int, int], RawSample] = {}
        for shard in sorted({origin.shard for origin in origins}):
            wanted = {origin.index for origin in origins if origin.shard == shard}
            try:
                for sample in self._read(shard, wanted):
                    found[shard, sample.index] = sample
                    if sample.index == max(wanted):
                        break
            except ShardError as error:
                self._skip("bad_shard", str(error))
        try:
            return {origin: found[origin.shard, origin.index] for origin in origins}
        except KeyError as error:
            shard, index = error.args[0]
            raise UserError(
                f"{self.mixture.shards[shard]} no longer holds sample {index}, which the "
                "checkpoint had read ahead: resume with the shards it was trained on"
            ) from error

    def _build(self, raw: RawSample, origin: Origin) -> AnySample:
        return self.build(raw, origin, self.mixture.dataset_of(origin.shard).captions)

    def _try(self, raw: RawSample, origin: Origin) -> AnySample | None:
        try:
            sample = self._build(raw, origin)
        except SkipSampleError as error:
            self._skip(error.reason, f"{raw.id}: {error}")
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= self.config.max_bad_samples:
                raise UserError(
                    f"{self._bad_in_a_row} unusable samples in a row, the last one {raw.id}: "
                    f"{error}; check the fields that the task reads (task.captions) and the shards"
                ) from error
            return None
        self._bad_in_a_row = 0
        return sample

    def _skip(self, reason: str, line: str) -> None:
        self._skipped[reason] += 1
        if len(self._skip_log) < _NAMED_SKIPS:
            self._skip_log.append(line)

    def _give_up_on(self, walk: Walk, pieces: Sequence[Piece]) -> None:
        reason = f"; {self._skip_log[-1]}" if self._skip_log else ""
        raise UserError(
            f"no sample in {len(pieces)} shard(s) of dataset {walk.dataset.name}, the first one "
            f"{self.mixture.shards[pieces[0].shard]}{reason}"
        )
