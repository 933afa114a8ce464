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
from typing import Any

from navit_clip.data.builders.pairs import Origin, Pair, PairBuilder
from navit_clip.data.decode import SkipSampleError
from navit_clip.data.mixture import Sources
from navit_clip.data.order import Inheritance, Piece, Walk, WalkPosition
from navit_clip.data.packer import Packer
from navit_clip.data.seeding import draw_index
from navit_clip.data.shards import RawSample, ShardError, read_shard
from navit_clip.errors import UserError
from navit_clip.packed.batch import BatchCounts, PackedBatch
from navit_clip.packed.images import pack_images
from navit_clip.packed.texts import pack_texts

_NAMED_SKIPS = 8  # samples named per batch; the rest is only counted
# A dead server costs minutes of retries per shard; shards are read in random order, so as many in
# a row are no accident.
_MAX_BAD_SHARDS = 10


@dataclass
class ReaderState:
    """Where a reader stands after a batch.

    Attributes:
        walks: Its place in each source.
        taken: Samples taken from each source.
        drawn: Samples that left the shuffle buffer so far.
        buffer: Samples in the shuffle buffer, in order.
        pending: Samples that wait to be packed, in order.
    """

    walks: list[WalkPosition]
    taken: list[int]
    drawn: int = 0
    buffer: list[Origin] = field(default_factory=list)
    pending: list[Origin] = field(default_factory=list)

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
        sources: What is left to it of each source.
    """

    images: int = 0
    sources: tuple[Inheritance, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The start as plain values."""
        return {"images": self.images, "sources": [s.to_json() for s in self.sources]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ReaderStart:
        """The start that `to_json` wrote."""
        return cls(values["images"], tuple(map(Inheritance.from_json, values["sources"])))


@dataclass
class Reader:
    """Walks its share of all sources for ever.

    Attributes:
        sources: All shards of the run, the same in every reader.
        build: Makes pairs of samples.
        reader: Which reader this is.
        readers: How many there are, over all ranks and workers.
        start: What it finishes before its own share.
    """

    sources: Sources
    build: PairBuilder
    reader: int
    readers: int
    start: ReaderStart = field(default_factory=ReaderStart)

    def __post_init__(self) -> None:
        self._skipped: Counter[str] = Counter()
        self._skip_log: list[str] = []
        self._bad_in_a_row = self._bad_shards_in_a_row = 0
        inherited = self.start.sources or (Inheritance(),) * len(self.sources.sources)
        self.walks = [
            Walk(source, self.build.seed, self.reader, self.readers, left)
            for source, left in zip(self.sources.sources, inherited, strict=True)
        ]

    @property
    def begin(self) -> ReaderState:
        """The state before the first sample."""
        return ReaderState([walk.begin for walk in self.walks], [0] * len(self.walks))

    def batches(self, state: ReaderState | None = None) -> Iterator[PackedBatch]:
        """Yields batches from `state` on, without end.

        Args:
            state: Taken from a batch of the same reader under the same configuration.

        Raises:
            UserError: If a whole pass over the share of a source finds no usable sample, or too
                many in a row are unusable.
        """
        state = state or self.begin
        config = self.build.config
        packer: Packer[Pair] = Packer(config.budget, config.look_ahead, config.packing)
        read_ahead = self._read_again([*state.buffer, *state.pending])
        buffer = [read_ahead[origin] for origin in state.buffer]
        for origin in state.pending:
            packer.offer(self._build(read_ahead[origin], origin))
        # The read-ahead is in this function's own lists; the place moves on with the walk.
        place = ReaderState(list(state.walks), list(state.taken), state.drawn)
        origins = list(state.buffer)
        # A restored packer may hold a whole batch already.
        yield from self._closed(packer, place, origins)
        for sample, origin in self._mix(place):
            buffer.append(sample)
            origins.append(origin)
            if len(buffer) < config.shuffle_buffer:
                continue
            pick = draw_index(len(buffer), self.build.seed, self.reader, place.drawn, "shuffle")
            # Swap with the last: removal from the middle would move the whole buffer.
            buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
            origins[pick], origins[-1] = origins[-1], origins[pick]
            images_seen = self.start.images + place.drawn * self.readers
            place.drawn += 1
            drawn, origin = buffer.pop(), origins.pop()
            pair = self._try(drawn, Origin(origin.epoch, origin.shard, origin.index, images_seen))
            if pair is not None:
                packer.offer(pair)
                yield from self._closed(packer, place, origins)

    def _closed(
        self, packer: Packer[Pair], place: ReaderState, buffer: list[Origin]
    ) -> Iterator[PackedBatch]:
        while (pairs := packer.take()) is not None:
            state = ReaderState(
                place.walks,
                place.taken,
                place.drawn,
                buffer,
                [pair.origin for pair in packer.pending],
            )
            yield self._pack(pairs, state)

    def _pack(self, pairs: list[Pair], state: ReaderState) -> PackedBatch:
        config = self.build.config
        budget = config.budget
        of_shard, sources = self.sources.of_shard, self.sources.sources
        counts = BatchCounts(
            pairs=len(pairs),
            image_tokens=sum(pair.image_length for pair in pairs),
            image_tokens_before_drop=sum(pair.image.tokens_before_drop for pair in pairs),
            text_tokens=sum(pair.text_length for pair in pairs),
            image_budget=budget.image_tokens,
            text_budget=budget.text_tokens,
            sources=Counter(sources[of_shard[pair.origin.shard]].name for pair in pairs),
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

    def _mix(self, place: ReaderState) -> Iterator[tuple[RawSample, Origin]]:
        """All samples from `place` on, which it moves along, sources in their shares.

        The next sample comes from the source that is furthest behind its share, so the shares hold
        to one sample at any time and need no generator.
        """
        walks = [self._walk(number, place) for number in range(len(self.walks))]
        weights = [walk.source.weight for walk in self.walks]
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
        for sample in read_shard(self.sources.shards[shard], wanted, self.sources.names[shard]):
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
                f"{self.sources.shards[shard]} no longer holds sample {index}, which the "
                "checkpoint had read ahead: resume with the shards it was trained on"
            ) from error

    def _build(self, sample: RawSample, origin: Origin) -> Pair:
        source = self.sources.sources[self.sources.of_shard[origin.shard]]
        return self.build(sample, origin, source.captions)

    def _try(self, sample: RawSample, origin: Origin) -> Pair | None:
        try:
            pair = self._build(sample, origin)
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

    def _give_up_on(self, walk: Walk, pieces: Sequence[Piece]) -> None:
        source = walk.source
        reason = f"; {self._skip_log[-1]}" if self._skip_log else ""
        raise UserError(
            f"no sample in {len(pieces)} shard(s) of source {source.name}, the first one "
            f"{self.sources.shards[pieces[0].shard]}{reason}"
        )
