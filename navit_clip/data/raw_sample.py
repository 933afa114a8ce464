"""One sample as it is stored, before a task makes an example of it: files by extension."""

from __future__ import annotations

from dataclasses import dataclass

from navit_clip.errors import SkipSampleError

# Of a sample's members together. Images have a cap of their own (`navit_clip.data.decode`).
MAX_SAMPLE_BYTES = 128 << 20


@dataclass(frozen=True)
class RawSample:
    """One sample as its shard has it.

    Attributes:
        id: ``shard/key``, stable across runs and machines.
        index: How many samples of the shard stand before it.
        members: Content by lower-case extension.
        problem: Why its members were not read, None if they were.
    """

    id: str
    index: int
    members: dict[str, bytes]
    problem: SkipSampleError | None = None

    def check(self) -> None:
        """Raises `SkipSampleError` if the members could not be read."""
        if self.problem is not None:
            raise self.problem
