"""What a reader does about unusable samples and shards: counts them, names a few, or gives up."""

from __future__ import annotations

from collections import Counter

from navit_clip.data.shards import ShardError
from navit_clip.errors import OutageError, SkipSampleError, UserError, printable

_NAMED = 8  # samples named per batch; the rest is only counted
# Shards are read in random order, so as many in a row are no accident.
_MAX_BAD_SHARDS = 10


class SkipLog:
    """Samples and shards skipped since the last batch, and how many in a row.

    Args:
        max_bad_samples: Unusable samples in a row after which the reader gives up.

    Attributes:
        lines: Name the first few since the last batch, shards first.
        bad_samples: In a row; 0 again after a usable one.
        out_of_reach: Whether the last shard was, and nothing could be read since.
    """

    def __init__(self, max_bad_samples: int) -> None:
        self.max_bad_samples = max_bad_samples
        self._counts: Counter[str] = Counter()
        self.lines: list[str] = []
        self.bad_samples = 0
        self.out_of_reach = False
        self._bad_shards: list[int] = []  # in a row, by number

    def skip_sample(self, name: str, error: SkipSampleError) -> None:
        """Counts an unusable sample.

        Raises:
            UserError: If it is one too many in a row.
        """
        self._counts[error.reason] += 1
        if len(self.lines) < _NAMED:
            self.lines.append(printable(f"{name}: {error}"))
        self.bad_samples += 1
        if self.bad_samples >= self.max_bad_samples:
            raise UserError(
                f"{self.bad_samples} unusable samples in a row, the last one {name}: {error}; "
                "check that the shards hold the fields that the task reads"
            ) from error

    def readable(self) -> None:
        """A sample could be read."""
        self._bad_shards.clear()
        self.out_of_reach = False

    def skip_shard(self, error: ShardError, shard: int = 0, shards: int = 1) -> None:
        """Counts a shard that cannot be read, or not to its end.

        Args:
            error: Why.
            shard: Its number.
            shards: How many there are. After a restart a reader may come to one shard again and
                again, which says nothing of the others.

        Raises:
            OutageError: If it is one too many in a row; of those out of reach, the second.
        """
        if error.may_pass and self.out_of_reach:
            raise OutageError(f"shards are out of reach, the last one {error}") from error
        self.out_of_reach = error.may_pass
        self._counts["bad_shard"] += 1
        self.lines.insert(0, printable(str(error)))  # of all that was skipped it is the most
        self._bad_shards.append(shard)
        different = len(set(self._bad_shards)) >= min(_MAX_BAD_SHARDS, shards)
        if different and len(self._bad_shards) >= _MAX_BAD_SHARDS:
            raise OutageError(
                f"{_MAX_BAD_SHARDS} unreadable shards in a row, the last one {error}"
            ) from error

    def take(self) -> tuple[Counter[str], tuple[str, ...]]:
        """Counts by reason and lines of what was skipped since the last call."""
        counts, lines = self._counts, tuple(self.lines)
        self._counts, self.lines = Counter(), []
        return counts, lines
