"""What data workers wait for, as the process they work for can read it, even of one that hangs.

`forward_stream` notes here which shard it has asked for bytes; the trainer's watchdog reports it.
"""

from __future__ import annotations

import re
import time
from multiprocessing.sharedctypes import RawArray
from typing import Any

from navit_clip.errors import printable

_BYTES = 400

_own: Any = None  # the place of this process


class WaitBoard:
    """A line for each worker of a rank."""

    def __init__(self, workers: int) -> None:
        self._places = [RawArray("c", _BYTES) for _ in range(workers)]

    def join(self, worker: int) -> None:
        """Makes this process, or the one it is forked or spawned from, a worker."""
        global _own
        _own = self._places[worker]

    def lines(self) -> list[str]:
        """``data worker 0 has waited 600 s for https://host/a.tar``, of each that waits."""
        found = []
        for worker, place in enumerate(self._places):
            # Read while it is written it may be of two.
            text = re.fullmatch(r"(\d+) (.+)", place.value.decode(errors="replace"))
            if text:
                waited = time.time() - int(text[1])
                found.append(f"data worker {worker} has waited {waited:.0f} s for {text[2]}")
        return found


def note(what: bytes) -> None:
    """Notes what is waited for from now on; empty if nothing is."""
    if _own is not None:
        _own.value = b"%d %s" % (time.time(), what) if what else b""


def noted(name: str) -> bytes:
    """A name as `note` takes it."""
    return printable(name).encode()[: _BYTES - 20]
