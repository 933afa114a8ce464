"""Shards that are no local files, as much like an open file as reading a tar takes.

A tar is read from front to back, with jumps ahead over payload that is not wanted and one look back
by a block at its end, so a stream remembers no more than that block. `navit_clip.data.http`,
`navit_clip.data.store` and `navit_clip.data.command` bring the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from tarfile import BLOCKSIZE

from navit_clip.data.waiting import note, noted
from navit_clip.retries import RemoteError

# Per read: asked for a whole image at once, Python takes that memory for each piece that arrives.
CHUNK = 1 << 18


class ForwardStream(ABC):
    """As much of a binary file as reading a tar takes: read, tell, seek ahead or a block back.

    Args:
        name: What is waited for, in reports.
    """

    def __init__(self, name: str) -> None:
        self._name = noted(name)
        self._position = 0  # where the caller is
        self._reached = 0  # where the source is, at or after it
        self._last = b""  # the bytes just before `_reached`

    @abstractmethod
    def _receive(self, size: int) -> bytes:
        """The next 1 to `size` bytes of the source, none only at its end."""

    @abstractmethod
    def close(self) -> None:
        """Releases the source, finished or not."""

    def finish(self) -> None:  # noqa: B027  most sources have nothing to add to a complete tar
        """Raises `RemoteError` if the source fails after the tar in it was complete."""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        behind = self._reached - self._position
        parts = [self._last[len(self._last) - behind :][:size]]
        missing = size - len(parts[0])
        while missing and (chunk := self._take(missing)):
            parts.append(chunk)
            missing -= len(chunk)
        self._position += size - missing
        return b"".join(parts)

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int) -> int:
        """Goes to a byte ahead, or to one of the last block; stops at the end if that is sooner."""
        if offset < self._reached - len(self._last):
            raise RemoteError(f"a stream cannot go back to byte {offset} from {self._reached}")
        if offset > self._reached:
            self._advance(offset - self._reached)
        self._position = min(offset, self._reached)
        return self._position

    def seekable(self) -> bool:
        """Asked for by `tarfile`."""
        return True

    def _advance(self, count: int) -> None:
        while count and (chunk := self._take(count)):
            count -= len(chunk)

    def _take(self, size: int) -> bytes:
        note(self._name)
        try:
            chunk = self._receive(size)
        finally:
            note(b"")
        self._reached += len(chunk)
        self._last = (self._last + chunk[-BLOCKSIZE:])[-BLOCKSIZE:]
        return chunk
