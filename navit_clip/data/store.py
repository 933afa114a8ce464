"""Shards in an object store: one object as a forward stream, range by range.

Every range is a request of its own, so a failed one is asked for again and nothing else is lost.
Whether it is still the same object is looked up behind each range, before anything of it is used.
"""

from __future__ import annotations

from typing import Any

from navit_clip import retries
from navit_clip.data.forward_stream import ForwardStream
from navit_clip.retries import SLOWEST, RemoteError, Retries
from navit_clip.stores import open_store, try_again, within

# The time to an answer, 10–50 ms, and two more requests for its version, against 50–100 MB/s.
LARGEST_RANGE = 8 << 20
FIRST_RANGE = 1 << 20  # behind a jump, where perhaps only a header is wanted

# What tells two versions of an object apart, as far as its store says.
_VERSION = frozenset(
    ("size", "etag", "generation", "mtime", "lastmodified", "last_modified", "modified", "updated")
)


class StoreStream(ForwardStream):
    """One object of a store that fsspec reads.

    A range that fails or does not come within `READ_TIMEOUT_S` is tried again as a web server's
    file is, each time half of it, down to what a line at the slowest useful rate brings in that
    time: so connections that break early still get on, and drips are given up.

    Args:
        address: ``PROTOCOL://…``.

    Raises:
        RemoteError: On the first read, seek or later: an object that is not there or may not be
            read, one that was replaced in between, or `ATTEMPTS` failures without progress.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._store, self._path = open_store(address)
        self._retries = Retries(address)
        self._version: dict[str, Any] | None = None
        self._total: int | None = None
        self._held, self._range = memoryview(b""), FIRST_RANGE

    def close(self) -> None:
        """Gives back the memory; connections stay with the process, for the next shard."""
        self._held = memoryview(b"")

    def _receive(self, size: int) -> bytes:
        while not self._held and (self._total is None or self._reached < self._total):
            try:
                self._held = memoryview(within(retries.READ_TIMEOUT_S, self._fetch))
            except RemoteError:
                raise
            except Exception as error:
                smallest = max(1, int(SLOWEST * retries.READ_TIMEOUT_S))
                self._range = max(self._range // 2, smallest)
                try_again(self._retries, error)
            else:
                self._range = min(self._range * 2, LARGEST_RANGE)
                self._retries.progress()
        chunk, self._held = bytes(self._held[:size]), self._held[size:]
        return chunk

    def _advance(self, count: int) -> None:
        if count > len(self._held) and self._total is not None:
            if count > LARGEST_RANGE:
                self._range = FIRST_RANGE
            self._reached, self._last = self._reached + count, b""
            self._held = memoryview(b"")
        else:
            super()._advance(count)

    def _fetch(self) -> bytes:
        """The next range, once it is known to be of the same object."""
        if self._total is None:
            self._check_version()
        assert self._total is not None
        end = min(self._reached + self._range, self._total)
        if end <= self._reached:
            return b""
        data = bytes(self._store.cat_file(self._path, start=self._reached, end=end))
        self._check_version()
        if len(data) != end - self._reached:
            raise OSError(f"{len(data)} bytes came of {end - self._reached}")
        return data

    def _check_version(self) -> None:
        info = self._store.info(self._path)
        version = {key: value for key, value in info.items() if key.lower() in _VERSION}
        if self._version is None:
            if not isinstance(info.get("size"), int):
                raise RemoteError("its size is not known")
            self._version, self._total = version, info["size"]
        elif version != self._version:
            raise RemoteError("it was replaced while it was read")
