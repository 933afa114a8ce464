"""Raw samples of one dataset, epoch after epoch, for one reader.

Between the tars (`navit_clip.data.shards`) and the reader, which mixes several datasets. Shards
that are out of reach are waited for here, and those that cannot be read are skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from navit_clip import retries
from navit_clip.data.builders.base import Origin
from navit_clip.data.mixture import Mixture
from navit_clip.data.order import Cursor, ShardOrder, ShardSlice
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.data.skip_log import SkipLog
from navit_clip.data.waiting import note, noted
from navit_clip.errors import OutageError, UserError

_EMPTY_SHARDS = 10  # in a row; with this many nothing is there to be read, rather than a few bad


@dataclass
class DatasetReader:
    """Reads what a reader takes of one dataset, without end.

    Attributes:
        mixture: All shards of the run.
        order: In which order the reader takes those of the dataset.
        cursor: Where to begin; then after the sample that was read last.
        skips: Counts shards that cannot be read.
    """

    mixture: Mixture
    order: ShardOrder
    cursor: Cursor
    skips: SkipLog

    def __iter__(self) -> Iterator[tuple[RawSample, Origin]]:
        """Yields samples from the cursor on, and where each was read.

        Raises:
            UserError: If ten shards, or all if there are fewer, have no sample, or too many shards
                in a row cannot be read.
        """
        order = self.order
        # A reader may have a single shard in an epoch, and that one be bad; and with fewer samples
        # than readers share them each gets one in some epoch.
        patience = min(len(order.dataset.shards), _EMPTY_SHARDS) * order.sharing
        empty, tried = 0, set[int]()
        while True:
            epoch, first, sample = self.cursor
            slices = order.slices(epoch)
            # One that resumes late in an epoch, or finishes another's, may find nothing more.
            found = first > 0 or sample > 0 or epoch < order.leftover.epoch
            for number in range(first, len(slices)):
                own = slices[number]
                rest = own.after(self.cursor.sample)
                for raw in self._read(rest) if rest else ():
                    self.cursor = Cursor(epoch, number, raw.index + 1)
                    found = True
                    yield raw, Origin(own.epoch, own.shard, raw.index, 0)
                self.cursor = Cursor(epoch, number + 1)
            if found:
                empty, tried = 0, set()
            else:
                empty, tried = empty + len(slices), tried.union(own.shard for own in slices)
            if empty >= patience:
                problem = (
                    f"no sample in {len(tried)} shard(s) of dataset {order.dataset.name}, one of "
                    f"them {self.mixture.shards[slices[0].shard]}"
                )
                raise UserError("; ".join([problem, *self.skips.lines[:1]]))
            self.cursor = Cursor(epoch + 1)

    def _read(self, own: ShardSlice) -> Iterator[RawSample]:
        """The samples of one slice, as far as its shard can be read."""
        try:
            # Having waited for one in vain is enough.
            waits = () if self.skips.out_of_reach else retries.OUTAGE_WAITS_S
            for raw in _read(self.mixture, own, waits):
                self.skips.readable()
                yield raw
        except ShardError as error:
            self.skips.skip_shard(error, own.shard, len(self.order.dataset.shards))


def _read(
    mixture: Mixture, own: ShardSlice, waits_s: Sequence[float] = retries.OUTAGE_WAITS_S
) -> Iterator[RawSample]:
    """The samples of one slice; a shard out of reach is waited for, so an outage loses none.

    Args:
        mixture: All shards.
        own: The slice.
        waits_s: Seconds before the shard is opened again, once after the other.

    Raises:
        ShardError: If the shard is damaged or gone, or stays out of reach.
    """
    shard, name = mixture.shards[own.shard], mixture.names[own.shard]
    done, waits = 0, iter(waits_s)
    asked = retries.monotonic()  # since when nothing has come
    while rest := own.after(done):
        try:
            for raw in read_shard(shard, rest, name):
                done, waits = raw.index + 1, iter(retries.OUTAGE_WAITS_S)
                yield raw
                if raw.index == own.last:
                    return
                asked = retries.monotonic()
            return
        except ShardError as error:
            waited_long = retries.monotonic() - asked > retries.LONGEST_OUTAGE_S
            wait = next(waits, None) if error.may_pass and not waited_long else None
            if wait is None:
                raise
        note(noted(shard.partition("?")[0]))
        retries.pause(wait)
        note(b"")


def read_again(mixture: Mixture, origins: Collection[Origin]) -> dict[Origin, RawSample]:
    """Reads samples that had been read ahead before a restart.

    Raises:
        OutageError: If a shard cannot be read.
        UserError: If a shard no longer holds one.
    """
    found: dict[tuple[int, int], RawSample] = {}
    for shard in sorted({origin.shard for origin in origins}):
        wanted = tuple(origin.sample for origin in origins if origin.shard == shard)
        try:
            for raw in _read(mixture, ShardSlice(0, shard, stride=0, extra=wanted)):
                found[shard, raw.index] = raw
        except ShardError as error:
            raise OutageError(f"{error}; the checkpoint had read samples of it ahead") from error
    try:
        return {origin: found[origin.shard, origin.sample] for origin in origins}
    except KeyError as error:
        shard, sample = error.args[0]
        raise UserError(
            f"{mixture.shards[shard]} no longer holds sample {sample}, which the checkpoint had "
            "read ahead: resume with the shards it was trained on"
        ) from error
