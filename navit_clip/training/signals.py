"""SIGTERM and SIGINT during a run: remembered, so that the loop can save before it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Catches both signals inside and acknowledges them; a second SIGINT interrupts at once.

    Yields:
        Those received so far.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if os.environ.get("RANK", "0") == "0":
            # Not `print`: what the signal has interrupted may be writing itself.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {sig: signal.signal(sig, remember) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
