"""When a web server or an object store that fails is asked again: one policy for all."""

from __future__ import annotations

import random
import sys
from time import monotonic, sleep

from navit_clip.errors import printable

# Between two packets, or for one range: long enough for a store with cold disks.
READ_TIMEOUT_S = 60.0
# For a folder of millions of objects, of which a request lists a thousand.
LISTING_TIMEOUT_S = 600.0
# Slower than any line that one could train over, in bytes a second.
SLOWEST = 1024
# Attempts without a byte of progress. The waits between them add up to two minutes, which outlasts
# a server's restart and most rate limits. After progress the count starts again.
ATTEMPTS = 10
# Attempts, or seconds, after which a server that has not sent anything yet is named.
SAID, SAID_S = 4, 5.0
BACK_OFF_S = 0.5  # doubles with every attempt
BACK_OFF_LIMIT_S = 30.0
# The longest that a server may ask for; the Hub counts requests in windows of five minutes.
ASKED_LIMIT_S = 300.0
# Before something out of reach, for which all attempts have failed, is taken up again: with the
# attempts themselves about nine minutes of refused connections.
OUTAGE_WAITS_S = (2.0, 10.0, 30.0, 60.0)
# After which nothing is taken up again whatever the failures take; a run counts as stalled after
# ten minutes, and is ended after twenty.
LONGEST_OUTAGE_S = 500.0


class RemoteError(OSError):
    """Something remote cannot be read or written; the message says why, but not what it was."""


class GaveUpError(RemoteError, TimeoutError):
    """A `RemoteError` that may pass: it was tried again and again."""


class Retries:
    """Counts attempts without progress, and waits between them.

    Args:
        address: What is asked, named on standard error while nothing at all comes.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._failures, self._waited_s = 0, 0.0
        self._since, self._quiet = monotonic(), False

    def progress(self) -> None:
        """Something came."""
        self._failures, self._waited_s, self._quiet = 0, 0.0, True

    def failed(self, reason: str, asked_s: float = 0.0) -> None:
        """Waits before the next attempt, at least for as long as the server asked.

        Raises:
            GaveUpError: After `ATTEMPTS` without progress, or `LONGEST_OUTAGE_S` of waiting.
        """
        self._failures += 1
        if self._failures >= ATTEMPTS or self._waited_s > LONGEST_OUTAGE_S:
            raise GaveUpError(f"{reason}, after {self._failures} attempts")
        late = self._failures >= SAID or monotonic() - self._since > SAID_S
        if late and not self._quiet:
            # At the start of a run nobody else can say what is waited for.
            self._quiet = True
            line = f"waiting for {self._address}: {reason}"
            line += f", attempt {self._failures} of {ATTEMPTS}"
            print(printable(line), file=sys.stderr, flush=True)
        wait = min(BACK_OFF_LIMIT_S, BACK_OFF_S * 2 ** (self._failures - 1))
        asked_s = min(asked_s, ASKED_LIMIT_S)
        self._waited_s += asked_s + wait
        pause(wait, at_least_s=asked_s)


def pause(seconds: float, at_least_s: float = 0.0) -> None:
    """Sleeps for `at_least_s`, and for half to all of `seconds` more.

    Hundreds of workers that a server turned away at once must not come back at once.
    """
    # A generator of its own: the global one belongs to the caller, seed and state.
    sleep(at_least_s + seconds * random.Random().uniform(0.5, 1.0))
