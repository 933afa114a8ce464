"""One reader: an endless walk over its share of the shards, as packed batches.

A reader is one worker of one rank. Which samples it reads, in which order, and what becomes of
them is a function of (seed, reader, number of readers), so its state is small: where it stands in
its shards, and which samples it holds read ahead (to shuffle and to pack). The state travels with
each batch; a reader started from it goes on with the next batch, bit for bit, after reading those
few samples again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from navit_clip.data.decode import SkipSampleError
from navit_clip.data.sample import Origin, Pair, PairBuilder
from navit_clip.data.seeding import generator
from navit_clip.data.shards import RawSample, ShardError, read_shard
from navit_clip.errors import UserError
from navit_clip.packing import (
    BatchCounts,
    FirstFitPacker,
    PackedBatch,
    pack_images,
    pack_texts,
)

_NAMED_SKIPS = 8  # samples named per batch; the rest is only counted


@dataclass
class ReaderState:
    """Where a reader stands after a batch.

    Attributes:
        epoch: Current pass over its share.
        shard: How many shards of its share in this epoch are done.
        sample: How many samples of the next shard are taken.
        drawn: Samples that left the shuffle buffer so far.
        buffer: Samples in the shuffle buffer, in order.
        pending: Samples that wait to be packed, in order.
    """

    epoch: int = 0
    shard: int = 0
    sample: int = 0
    drawn: int = 0
    buffer: list[Origin] = field(default_factory=list)
    pending: list[Origin] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The state as plain values; origins as lists, since there may be thousands."""
        values = {name: getattr(self, name) for name in ("epoch", "shard", "sample", "drawn")}
        for name in ("buffer", "pending"):
            values[name] = [[o.epoch, o.shard, o.index, o.images_seen] for o in getattr(self, name)]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ReaderState:
        """The state that `to_json` wrote."""
        origins = {name: [Origin(*o) for o in values[name]] for name in ("buffer", "pending")}
        return cls(**{**values, **origins})


@dataclass
class Reader:
    """Walks its share of the shards for ever.

    Attributes:
        shards: All shards of the run, the same list in every reader.
        build: Makes pairs of samples.
        reader: Which reader this is.
        readers: How many there are, over all ranks and workers.
    """

    shards: list[str]
    build: PairBuilder
    reader: int
    readers: int

    def __post_init__(self) -> None:
        self._skipped: Counter[str] = Counter()
        self._skip_log: list[str] = []
        self._bad_in_a_row = 0

    def batches(self, state: ReaderState | None = None) -> Iterator[PackedBatch]:
        """Yields batches from `state` on, without end.

        Args:
            state: Taken from a batch of the same reader under the same configuration.

        Raises:
            UserError: If a whole pass over the share finds no usable sample, or too many in a row
                are unusable.
        """
        state = state or ReaderState()
        config = self.build.config
        packer: FirstFitPacker[Pair] = FirstFitPacker(config.budget, config.look_ahead)
        read_ahead = self._read_again([*state.buffer, *state.pending])
        buffer = [read_ahead[origin] for origin in state.buffer]
        for origin in state.pending:
            packer.offer(self.build(read_ahead[origin], origin))
        position = ReaderState(state.epoch, state.shard, state.sample, state.drawn)
        walk = self._walk(position)
        origins = list(state.buffer)
        # A restored packer may hold a whole batch already.
        yield from self._closed(packer, position, origins)
        for sample, origin in walk:
            buffer.append(sample)
            origins.append(origin)
            if len(buffer) < config.shuffle_buffer:
                continue
            draw = generator(self.build.seed, self.reader, position.drawn, "shuffle")
            pick = int(draw.integers(len(buffer)))
            # Swap with the last: removal from the middle would move the whole buffer.
            buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
            origins[pick], origins[-1] = origins[-1], origins[pick]
            images_seen = position.drawn * self.readers
            position.drawn += 1
            drawn, origin = buffer.pop(), origins.pop()
            pair = self._try(drawn, Origin(origin.epoch, origin.shard, origin.index, images_seen))
            if pair is not None:
                packer.offer(pair)
                yield from self._closed(packer, position, origins)

    def _closed(
        self, packer: FirstFitPacker[Pair], position: ReaderState, buffer: list[Origin]
    ) -> Iterator[PackedBatch]:
        while (pairs := packer.take()) is not None:
            state = ReaderState(
                position.epoch,
                position.shard,
                position.sample,
                position.drawn,
                list(buffer),
                [pair.origin for pair in packer.pending],
            )
            yield self._pack(pairs, state)

    def _pack(self, pairs: list[Pair], state: ReaderState) -> PackedBatch:
        config = self.build.config
        budget = config.budget
        counts = BatchCounts(
            pairs=len(pairs),
            image_tokens=sum(pair.image_length for pair in pairs),
            image_tokens_before_drop=sum(pair.image.tokens_before_drop for pair in pairs),
            text_tokens=sum(pair.text_length for pair in pairs),
            image_budget=budget.image_tokens,
            text_budget=budget.text_tokens,
            skipped=self._skipped,
            skip_log=tuple(self._skip_log),
        )
        self._skipped, self._skip_log = Counter(), []
        return PackedBatch(
            pack_images(
                [pair.image for pair in pairs],
                budget=budget.image_tokens if config.pad_to_budget else None,
            ),
            pack_texts(
                [pair.token_ids for pair in pairs],
                budget=budget.text_tokens if config.pad_to_budget else None,
            ),
            ids=tuple(pair.id for pair in pairs),
            counts=counts,
            position={str(self.reader): state.to_json()},
        )

    def _walk(self, position: ReaderState) -> Iterator[tuple[RawSample, Origin]]:
        """All samples of the share from `position` on, which it moves along."""
        while True:
            share = self._share(position.epoch)
            # A walk that resumes late in a pass may find nothing more in it.
            found = position.shard > 0 or position.sample > 0
            while position.shard < len(share):
                index = share[position.shard]
                for sample in self._samples(index, position.sample):
                    position.sample = sample.index + 1
                    found = True
                    yield sample, Origin(position.epoch, index, sample.index, 0)
                position.shard, position.sample = position.shard + 1, 0
            if not found and share:
                self._give_up_on(share)
            position.epoch, position.shard = position.epoch + 1, 0

    def _share(self, epoch: int) -> list[int]:
        """Indices of this reader's shards in an epoch.

        With fewer shards than readers every reader walks all of them and takes every n-th sample.
        """
        order = generator(self.build.seed, epoch, "shards").permutation(len(self.shards)).tolist()
        return order if self._by_sample else order[self.reader :: self.readers]

    @property
    def _by_sample(self) -> bool:
        return len(self.shards) < self.readers

    def _samples(self, shard: int, start: int) -> Iterator[RawSample]:
        """This reader's samples of one shard from index `start` on."""
        wanted = _Wanted(start, self.reader if self._by_sample else 0, self._stride)
        try:
            for sample in read_shard(self.shards[shard], wanted):
                if sample.index in wanted:
                    yield sample
        except ShardError as error:
            self._skip("bad_shard", str(error))

    @property
    def _stride(self) -> int:
        return self.readers if self._by_sample else 1

    def _read_again(self, origins: list[Origin]) -> dict[Origin, RawSample]:
        """Samples that were read ahead before a restart."""
        found: dict[tuple[int, int], RawSample] = {}
        for shard in sorted({origin.shard for origin in origins}):
            wanted = {origin.index for origin in origins if origin.shard == shard}
            try:
                for sample in read_shard(self.shards[shard], wanted):
                    if sample.index in wanted:
                        found[shard, sample.index] = sample
                        if len(wanted) == sum(key[0] == shard for key in found):
                            break
            except ShardError as error:
                self._skip("bad_shard", str(error))
        try:
            return {origin: found[origin.shard, origin.index] for origin in origins}
        except KeyError as error:
            shard, index = error.args[0]
            raise UserError(
                f"{self.shards[shard]} no longer holds sample {index}, which the checkpoint had "
                "read ahead: resume with the shards it was trained on"
            ) from error

    def _try(self, sample: RawSample, origin: Origin) -> Pair | None:
        try:
            pair = self.build(sample, origin)
        except SkipSampleError as error:
            self._skip(error.reason, f"{sample.id}: {error}")
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= self.build.config.max_bad_samples:
                raise UserError(
                    f"{self._bad_in_a_row} unusable samples in a row, the last one {sample.id}: "
                    f"{error}; check data.captions and the shards"
                ) from error
            return None
        self._bad_in_a_row = 0
        return pair

    def _skip(self, reason: str, line: str) -> None:
        self._skipped[reason] += 1
        if len(self._skip_log) < _NAMED_SKIPS:
            self._skip_log.append(line)

    def _give_up_on(self, share: list[int]) -> None:
        reason = f"; {self._skip_log[-1]}" if self._skip_log else ""
        raise UserError(
            f"no sample in {len(share)} shard(s), the first one {self.shards[share[0]]}{reason}"
        )


@dataclass(frozen=True)
class _Wanted:
    """Indices from `start` on that leave `offset` modulo `stride`, as a container."""

    start: int
    offset: int
    stride: int

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        return index >= self.start and index % self.stride == self.offset
