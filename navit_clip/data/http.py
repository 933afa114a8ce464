"""Shards on a web server: one file as a forward stream, over connections that may fail.

A connection that fails is opened again at the byte that it had reached; what cannot be repaired so
is one `RemoteError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from time import monotonic

import urllib3

from navit_clip import retries
from navit_clip.data.forward_stream import CHUNK, ForwardStream
from navit_clip.retries import SLOWEST, RemoteError, Retries

# A server that takes longer to accept is down or overloaded; trying again finds another one.
CONNECT_TIMEOUT_S = 10.0
# Below `SLOWEST` for so many periods of `READ_TIMEOUT_S` in a row a server is given up.
SLOW_PERIODS = 3
# A new request costs a connection, its encryption and slow start: at 10–30 ms and 50–100 MB/s about
# the time of this many bytes. Shorter gaps are cheaper to receive and drop.
FAR_SEEK = 1 << 20

_RETRIED = frozenset({408, 425, 429})  # and 5xx; any other 4xx stays what it is
_REPLACED = "it was replaced on the server while it was read"
_REDIRECTS_ONLY = urllib3.Retry(
    total=None, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False
)


class _TryAgainError(urllib3.exceptions.HTTPError):
    """A failure that may pass; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class HttpStream(ForwardStream):
    """One file on a web server.

    Failed connections, timeouts, statuses 408, 425, 429 and 5xx, and bodies that end early are
    tried again with growing waits, from the byte reached: with a range request, or where the
    server ignores those by receiving the beginning once more. Jumps of more than `FAR_SEEK` become
    range requests as well.

    Args:
        url: ``http`` or ``https``; redirects are followed.
        headers: Sent with every request, an ``Authorization`` not to another host.

    Raises:
        RemoteError: On the first read, seek or later: a status that will not change, a file that
            changed in between, or `ATTEMPTS` failures without progress.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(url)
        self._url, self._headers = url, headers or {}
        # Not shared: a pool carried through a fork would hand one socket to two workers.
        self._pool = urllib3.PoolManager()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._version: tuple[str | None, str | None] | None = None  # ETag, Last-Modified
        self._total: int | None = None
        self._ranges = False
        self._ended_at: int | None = None
        self._retries = Retries(url)
        self._waited_s, self._came, self._slow = 0.0, 0, 0

    def close(self) -> None:
        """Closes the connection."""
        self._disconnect()
        self._pool.clear()

    def _disconnect(self) -> None:
        if self._response is not None:
            # Returned to the pool it would have to be read to its end first.
            self._response.close()
            self._response = None

    def _receive(self, size: int) -> bytes:
        while self._total is None or self._reached < self._total:
            try:
                if self._response is None:
                    self._connect()
                    continue
                # read() loses what came before a connection broke; the next attempt could lose
                # as much again, and never get on.
                chunk = self._read1(self._response, size)
                if chunk:
                    self._retries.progress()
                    return chunk
                self._end_body(self._response)
            except urllib3.exceptions.LocationValueError as error:
                raise RemoteError(str(error)) from error
            except urllib3.exceptions.HTTPError as error:
                self._disconnect()
                asked_s = error.wait_s if isinstance(error, _TryAgainError) else 0.0
                self._retries.failed(_reason(error), asked_s)
            except ValueError as error:  # a redirect to no address, a length of 5000 digits
                raise RemoteError(f"a malformed answer: {error}") from error
        return b""

    def _advance(self, count: int) -> None:
        if self._ranges and count > FAR_SEEK:
            self._disconnect()
            self._reached, self._last = self._reached + count, b""
        else:
            super()._advance(count)

    def _connect(self) -> None:
        """Requests the file from `_reached` on, and checks that it is still the same file."""
        # Compressed on the way, a body's length and ranges would be those of other bytes.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if self._reached:
            headers["Range"] = f"bytes={self._reached}-"
            etag, modified = self._version or (None, None)
            # A weak tag does not promise the same bytes, and is not allowed here.
            validator = etag if etag and not etag.startswith("W/") else modified
            if validator:
                headers["If-Range"] = validator
        response = self._response = self._pool.request(
            "GET",
            self._url,
            headers=headers,
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=retries.READ_TIMEOUT_S),
            retries=_REDIRECTS_ONLY,
            preload_content=False,
            decode_content=False,
        )
        if response.status == 416:  # nothing at or after this byte
            if self._total is not None:
                raise RemoteError(_REPLACED)
            self._total = self._reached
            return
        _check_status(response)
        start, total = _extent(response)
        self._check_version(response, total)
        if start > self._reached or (response.status == 206 and start != self._reached):
            raise RemoteError(f"the server sent byte {start} when asked for {self._reached}")
        self._ranges = response.status == 206 or (
            not self._reached and response.headers.get("Accept-Ranges") == "bytes"
        )
        while start < self._reached:  # without ranges, from the beginning
            chunk = self._read1(response, self._reached - start)
            if not chunk:
                raise _TryAgainError("the connection was closed early")
            start += len(chunk)

    def _read1(self, response: urllib3.BaseHTTPResponse, size: int) -> bytes:
        """The next bytes; a server that drips for minutes is given up."""
        asked = monotonic()
        chunk = response.read1(min(size, CHUNK))
        self._waited_s += monotonic() - asked  # for the server, not for whoever reads
        self._came += len(chunk)
        if self._waited_s > retries.READ_TIMEOUT_S:
            slow = self._came < SLOWEST * self._waited_s
            self._slow, self._waited_s, self._came = self._slow + 1 if slow else 0, 0.0, 0
            if self._slow >= SLOW_PERIODS:
                raise RemoteError(f"the server sends less than {SLOWEST:,} bytes a second")
        return chunk

    def _check_version(self, response: urllib3.BaseHTTPResponse, total: int | None) -> None:
        version = (response.headers.get("ETag"), response.headers.get("Last-Modified"))
        self._version = self._version or version
        first, now = next(
            (pair for pair in zip(self._version, version, strict=True) if all(pair)), (None, None)
        )
        if first != now or (total is not None and self._total not in (None, total)):
            raise RemoteError(_REPLACED)
        if self._total is None:
            self._total = total

    def _end_body(self, response: urllib3.BaseHTTPResponse) -> None:
        """Decides whether a body that just ended was all of the file."""
        # Without a length a dropped connection looks like an end: believed when it comes twice
        # at the same byte. A chunked body marks its end.
        whole = getattr(response, "chunked", False) or self._ended_at == self._reached
        if self._total is None and whole:
            self._total = self._reached
            return
        self._ended_at = self._reached
        raise _TryAgainError(f"the connection was closed at byte {self._reached}")


def _check_status(response: urllib3.BaseHTTPResponse) -> None:
    status = response.status
    if status not in (200, 206):
        reason = f"HTTP {status} {response.reason or ''}".strip()
        if status in _RETRIED or status >= 500:
            raise _TryAgainError(reason, _asked_wait(status, response.headers))
        raise RemoteError(reason)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RemoteError(f"sent with Content-Encoding {response.headers['Content-Encoding']}")


def _asked_wait(status: int, headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, on the Hub until its window of requests is over."""
    if (wait := headers.get("Retry-After", "")).isdecimal():
        return float(wait)
    # The Hub says when it ends also while something is left of the quota.
    window = re.search(r"\bt=(\d+)", headers.get("RateLimit", "")) if status == 429 else None
    return float(window[1]) if window else 0.0


def _extent(response: urllib3.BaseHTTPResponse) -> tuple[int, int | None]:
    """First byte of the body, and length of the file if the server sends it."""
    if response.status == 200:
        length = response.headers.get("Content-Length", "")
        chunked = "Transfer-Encoding" in response.headers
        return 0, int(length) if length.isdecimal() and not chunked else None
    content_range = response.headers.get("Content-Range", "")
    match = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", content_range)
    if match is None:
        raise RemoteError(f"a partial answer with Content-Range {content_range!r}")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _reason(error: Exception) -> str:
    """What went wrong, without the names of the objects in which it did."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        error = error.reason
    # A ProtocolError is printed as a tuple of its text and its cause.
    protocol = isinstance(error, urllib3.exceptions.ProtocolError) and error.args
    text = str(error.args[0] if protocol else error)
    return re.sub(r"^<?[\w.]*HTTPS?Connection\w*(\(.*?\)| object at \w+)>?: ", "", text)
