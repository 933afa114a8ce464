"""Mistakes of a user's that a command reports in one line, without a traceback.

Raised anywhere in the library where the message alone says what is wrong and what to do; the
command lines (`train`, `eval`, `navit_clip.data.*`) wrap their work in `one_line_errors`. Samples
that cannot be used are no mistakes: they are skipped and counted (`SkipSampleError`).
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from navit_clip.torchrun import report

_PASSWORD = re.compile(r"(\w://)[^\s/?#]*@")
_QUERY = re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)


def printable(text: str) -> str:
    """Text of foreign origin, fit for a terminal, a log or a card.

    Addresses lose passwords, and web addresses queries, which may be signatures; control
    characters, with which a file's name can move the cursor or forge a line, are spelt as escapes.
    """
    text = _QUERY.sub(r"\1", _PASSWORD.sub(r"\1", text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """Something that the user can fix; its message names the thing and the fix."""


class OutageError(UserError):
    """A `UserError` that another start may be spared: torchrun may start the ranks again."""


class StopAskedError(UserError):
    """No mistake: a signal asks the run to stop, and what takes long ends early."""


# Of a disk, perhaps a network's, that is full or out of reach; ESHUTDOWN is what a client of Lustre
# gets that its servers have dropped.
_PASSING = (
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT),
    *(errno.ESHUTDOWN, errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNRESET, errno.ECONNREFUSED),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    # Linux's alone.
    *(getattr(errno, name, errno.EIO) for name in ("EREMOTEIO", "ECOMM", "ENOLINK")),
)


def may_pass(error: BaseException) -> bool:
    """Whether what caused an error may be over when the ranks are started again."""
    return isinstance(error, TimeoutError) or (
        isinstance(error, OSError) and error.errno in _PASSING
    )


class SkipSampleError(Exception):
    """A sample is unusable and is skipped.

    Attributes:
        reason: A short name that skipped samples are counted under.
        detail: What is wrong with this one.
    """

    def __init__(self, reason: str, detail: str) -> None:
        # Both, because an error from a worker process is made again from its arguments.
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def report_error(command: str, error: UserError) -> None:
    """Prints "COMMAND: error: …" on standard error, of the ranks of a host one."""
    line = f"{command}: error: {printable(' '.join(str(error).split()))}"
    report(line, final=not isinstance(error, OutageError))


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turns a `UserError` into a line "COMMAND: error: …" on standard error and exit code 2.

    Likewise Ctrl-C, with exit code 130. Of the ranks that torchrun started one prints a mistake,
    and the run is not started again.
    """
    try:
        yield
    except UserError as error:
        report_error(command, error)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)
