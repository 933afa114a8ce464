"""What a reader does about unusable samples and shards: counts them, names a few, or gives up."""

from __future__ import annotations

from collections import Counter

from navit_clip.data.shards import ShardError
from navit_clip.errors import OutageError, SkipSampleError, UserError, printable

_NAMED = 8  # samples named per batch; the rest is only counted
# A dead server costs minutes of retries per shard; shards are read in random order, so as many in
# a row are no accident.
_MAX_BAD_SHARDS = 10


class SkipLog:
    """Samples and shards skipped since the last batch, and how many in a row.

    Args:
        max_bad_samples: Unusable samples in a row after which the reader gives up.

    Attributes:
        lines: Name the first few since the last batch.
        bad_samples: In a row; 0 again after a usable one.
        bad_shards: Numbers of those in a row; none again after a sample that could be read.
    """

    def __init__(self, max_bad_samples: int) -> None:
        self.max_bad_samples = max_bad_samples
        self._counts: Counter[str] = Counter()
        self.lines: list[str] = []
        self.bad_samples = 0
        self.bad_shards: list[int] = []

    def skip_sample(self, name: str, error: SkipSampleError) -> None:
        """Counts an unusable sample.

        Raises:
            UserError: If it is one too many in a row.
        """
        self._add(error.reason, f"{name}: {error}")
        self.bad_samples += 1
        if self.bad_samples >= self.max_bad_samples:
            raise UserError(
                f"{self.bad_samples} unusable samples in a row, the last one {name}: {error}; "
                "check that the shards hold the fields that the task reads"
            ) from error

    def skip_shard(self, error: ShardError, shard: int = 0, shards: int = 1) -> None:
        """Counts a shard that cannot be read, or not to its end.

        Args:
            error: Why.
            shard: Its number.
            shards: How many there are. After a restart a reader may come to one shard again and
                again, which says nothing of the others.

        Raises:
            OutageError: If it is one too many in a row.
        """
        self._add("bad_shard", str(error))
        self.bad_shards.append(shard)
        different = len(set(self.bad_shards)) >= min(_MAX_BAD_SHARDS, shards)
        if different and len(self.bad_shards) >= _MAX_BAD_SHARDS:
            raise OutageError(
                f"{_MAX_BAD_SHARDS} unreadable shards in a row, the last one {error}"
            ) from error

    def take(self) -> tuple[Counter[str], tuple[str, ...]]:
        """Counts by reason and lines of what was skipped since the last call."""
        counts, lines = self._counts, tuple(self.lines)
        self._counts, self.lines = Counter(), []
        return counts, lines

    def _add(self, reason: str, line: str) -> None:
        self._counts[reason] += 1
        if len(self.lines) < _NAMED:
            self.lines.append(printable(line))
