"""Shards that are no local files: forward streams over http(s) and from commands.

`shards.read_shard` reads a tar through them as through an open file. A tar is read from front to
back, with jumps ahead over payload that is not wanted and one look back by a block at its end, so
a stream remembers no more than that block. A connection that fails is taken up again at the byte
that it had reached; what cannot be mended is one `RemoteError`.
"""

from __future__ import annotations

import os
import random
import re
import select
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from contextlib import suppress
from tarfile import BLOCKSIZE
from time import sleep

import urllib3

# A server that takes longer to accept is down or overloaded; trying again finds another one.
CONNECT_TIMEOUT_S = 10.0
# Between two packets, not for the whole shard: long enough for a store with cold disks.
READ_TIMEOUT_S = 60.0
# Attempts without a byte of progress. The waits between them add up to two minutes, which outlasts
# a server's restart and most rate limits. After progress the count starts anew.
ATTEMPTS = 10
BACK_OFF_S = 0.5  # doubles with every attempt
BACK_OFF_LIMIT_S = 30.0
# A new request costs a connection, its encryption and slow start: at 10–30 ms and 50–100 MB/s about
# the time of this many bytes. Shorter gaps are cheaper to receive and drop.
FAR_SEEK = 1 << 20
# A command has no timeouts of its own unless its author thought of them.
COMMAND_TIMEOUT_S = 300.0
COMMAND_END_S = 10.0  # from the end of its output, or from being told to stop, to its end

# Per read: asked for a whole image at once, Python takes that memory for each piece that arrives.
_CHUNK = 1 << 18
_RETRIED = frozenset({408, 425, 429})  # and 5xx; any other 4xx stays what it is
_REPLACED = "it was replaced on the server while it was read"
_REDIRECTS_ONLY = urllib3.Retry(
    total=None, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False
)


class RemoteError(OSError):
    """A stream ends here; the message says why, but not of what, which the caller knows."""


class _TryAgainError(Exception):
    """A failure that may pass; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class ForwardStream(ABC):
    """As much of a binary file as reading a tar takes: read, tell, seek ahead or a block back."""

    def __init__(self) -> None:
        self._position = 0  # where the caller is
        self._reached = 0  # where the source is, at or after it
        self._last = b""  # the bytes just before `_reached`

    @abstractmethod
    def _receive(self, size: int) -> bytes:
        """The next 1 to `size` bytes of the source, none only at its end."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the source, finished or not."""

    def finish(self) -> None:  # noqa: B027  most sources have nothing to add to a complete tar
        """Raises `RemoteError` if the source fails after the tar in it was complete."""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        behind = self._reached - self._position
        parts = [self._last[len(self._last) - behind :][:size]]
        missing = size - len(parts[0])
        while missing and (chunk := self._receive(missing)):
            parts.append(chunk)
            missing -= len(chunk)
            self._passed(chunk)
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
        while count and (chunk := self._receive(count)):
            count -= len(chunk)
            self._passed(chunk)

    def _passed(self, chunk: bytes) -> None:
        self._reached += len(chunk)
        self._last = (self._last + chunk[-BLOCKSIZE:])[-BLOCKSIZE:]


class HttpStream(ForwardStream):
    """One file on a web server.

    Failed connections, timeouts, statuses 408, 425, 429 and 5xx, and bodies that end early are
    tried again with growing waits, from the byte reached: with a range request, or where the
    server ignores those by receiving the beginning once more. Jumps of more than `FAR_SEEK` become
    range requests as well.

    Args:
        url: ``http`` or ``https``; redirects are followed.

    Raises:
        RemoteError: On the first read, seek or later: a status that will not change, a file that
            changed in between, or `ATTEMPTS` failures without progress.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        # Not shared: a pool carried through a fork would hand one socket to two workers.
        self._pool = urllib3.PoolManager()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._version: tuple[str | None, str | None] | None = None  # ETag, Last-Modified
        self._total: int | None = None
        self._ranges = False
        self._ended_at: int | None = None
        self._failures = 0

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
                chunk = self._response.read1(min(size, _CHUNK))
                if chunk:
                    self._failures = 0
                    return chunk
                self._end_body(self._response)
            except _TryAgainError as error:
                self._back_off(str(error), error.wait_s)
            except urllib3.exceptions.LocationValueError as error:
                raise RemoteError(str(error)) from error
            except urllib3.exceptions.HTTPError as error:
                self._back_off(_reason(error))
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
        headers = {"Accept-Encoding": "identity"}
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
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
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
        if response.status == 206:
            self._ranges = True
        else:
            self._ranges = not self._reached and response.headers.get("Accept-Ranges") == "bytes"
        self._discard(response, self._reached - start)

    def _check_version(self, response: urllib3.BaseHTTPResponse, total: int | None) -> None:
        version = (response.headers.get("ETag"), response.headers.get("Last-Modified"))
        if self._version is None:
            self._version = version
        first, now = next(
            (pair for pair in zip(self._version, version, strict=True) if all(pair)), (None, None)
        )
        if first != now or (total is not None and self._total not in (None, total)):
            raise RemoteError(_REPLACED)
        if self._total is None:
            self._total = total

    @staticmethod
    def _discard(response: urllib3.BaseHTTPResponse, count: int) -> None:
        while count:
            chunk = response.read1(min(count, _CHUNK))
            if not chunk:
                raise _TryAgainError("the connection was closed early")
            count -= len(chunk)

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

    def _back_off(self, reason: str, wait_s: float = 0.0) -> None:
        self._disconnect()
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise RemoteError(f"{reason}, after {ATTEMPTS} attempts")
        wait = min(BACK_OFF_LIMIT_S, BACK_OFF_S * 2 ** (self._failures - 1))
        # Hundreds of workers that a server turned away at once must not come back at once. A
        # generator of its own: the global one belongs to the caller, seed and state.
        wait *= random.Random().uniform(0.5, 1.0)
        sleep(max(wait, min(wait_s, BACK_OFF_LIMIT_S)))


def _check_status(response: urllib3.BaseHTTPResponse) -> None:
    status = response.status
    if status not in (200, 206):
        reason = f"HTTP {status} {response.reason or ''}".strip()
        if status in _RETRIED or status >= 500:
            wait = response.headers.get("Retry-After", "")
            raise _TryAgainError(reason, float(wait) if wait.isdecimal() else 0.0)
        raise RemoteError(reason)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RemoteError(f"sent with Content-Encoding {response.headers['Content-Encoding']}")


def _extent(response: urllib3.BaseHTTPResponse) -> tuple[int, int | None]:
    """First byte of the body, and length of the whole file where the server tells."""
    if response.status == 200:
        length = response.headers.get("Content-Length", "")
        chunked = "Transfer-Encoding" in response.headers
        return 0, int(length) if length.isdecimal() and not chunked else None
    content_range = response.headers.get("Content-Range", "")
    match = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", content_range)
    if match is None:
        raise RemoteError(f"a partial answer with Content-Range {content_range!r}")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """What went wrong, without the names of the objects in which it did."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        return _reason_text(error.reason)
    return _reason_text(error)


def _reason_text(error: Exception) -> str:
    # A ProtocolError is printed as a tuple of its text and its cause.
    protocol = isinstance(error, urllib3.exceptions.ProtocolError) and error.args
    text = str(error.args[0] if protocol else error)
    return re.sub(r"^<?[\w.]*HTTPS?Connection\w*(\(.*?\)| object at \w+)>?: ", "", text)


class CommandStream(ForwardStream):
    """What a shell command writes to its standard output.

    Args:
        command: Run by ``/bin/sh``, so of a pipeline ``a | b`` only the status of ``b`` counts.

    Raises:
        RemoteError: When it has ended with another status than 0, with the last line that it
            wrote to standard error, or writes nothing for `COMMAND_TIMEOUT_S`.
    """

    def __init__(self, command: str) -> None:
        super().__init__()
        # A file: a pipe that nobody reads would block a talkative command.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        try:
            self._process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                # Its own group, so that all of a pipeline can be stopped, not the shell alone.
                start_new_session=True,
            )
        except OSError:
            self._errors.close()
            raise
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._ready = select.poll()
        self._ready.register(self._output, select.POLLIN)

    def _receive(self, size: int) -> bytes:
        if not self._ready.poll(COMMAND_TIMEOUT_S * 1000):
            raise RemoteError(f"the command wrote nothing for {COMMAND_TIMEOUT_S:g} s")
        chunk = os.read(self._output.fileno(), min(size, _CHUNK))
        if not chunk:
            self._check_end()
        return chunk

    def finish(self) -> None:
        """Reads on to the end of the output, and checks the command's status."""
        while self._receive(_CHUNK):
            pass

    def _check_end(self) -> None:
        try:
            status = self._process.wait(COMMAND_END_S)
        except subprocess.TimeoutExpired:
            raise RemoteError("the command closed its output and does not end") from None
        if status:
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            raise RemoteError(f"{how}: {lines[-1].strip()}" if lines else how)

    def close(self) -> None:
        """Stops the command, and what it started, if it still runs."""
        self._output.close()
        self._errors.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(COMMAND_END_S)
            # The shell may be gone and a part of its pipeline not.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
