"""SIGTERM and SIGINT during a run: remembered, so that the loop can save before it ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Remembers that the run was asked to stop.

    Attributes:
        received: Whether it was.
    """

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches both signals inside; a second SIGINT interrupts at once."""
        previous = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}

        def remember(number: int, frame: FrameType | None) -> None:
            self.received = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for sig in previous:
            signal.signal(sig, remember)
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
