"""Bodies and requests are counted against the limits, and the answers to those past them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from navit_clip.serving.config import Limits


class RequestError(Exception):
    """An answer with a status from 400 on.

    Attributes:
        status: Of HTTP.
        code: A short name for programs.
        message: One line for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


# Bodies in memory, in the largest ones allowed: slow clients hold a part of one each.
_BODIES = 16


class Admission:
    """Counts the requests that are worked on and the bytes that they hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = self._working = 0

    @contextmanager
    def body(self) -> Iterator[Body]:
        """A request's bytes as they come, which count until the end."""
        body = Body(self, self._limits)
        try:
            yield body
        finally:
            self._held -= len(body.data)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Work on a request that is here.

        Raises:
            RequestError: 503 if there is enough to do.
        """
        if self._working >= self._limits.max_requests:
            raise busy()
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    def hold(self, count: int) -> None:
        """Takes so many bytes more.

        Raises:
            RequestError: 503 if all requests together hold too many.
        """
        if self._held + count > _BODIES * self._limits.max_bytes:
            raise busy()
        self._held += count


class Body:
    """One request's bytes."""

    def __init__(self, admission: Admission, limits: Limits) -> None:
        self.data = bytearray()
        self._admission, self._limits = admission, limits

    def add(self, chunk: bytes) -> None:
        """More of it.

        Raises:
            RequestError: 413 if that is more than one request may have, or 503.
        """
        if len(self.data) + len(chunk) > self._limits.max_bytes:
            raise too_large(self._limits)
        self._admission.hold(len(chunk))
        self.data += chunk


def too_large(limits: Limits) -> RequestError:
    """The answer to a body past the limit."""
    return RequestError(413, "too_large", f"the request has more than {limits.max_bytes:,} bytes")


def busy() -> RequestError:
    """The answer where there is too much to do."""
    return RequestError(503, "busy", "the server has as much to do as it takes: try again later")
