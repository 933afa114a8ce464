"""The watchdog: a rank that hangs, or would hang while it fails, is reported, then ended.

Without it a rank that waits without end (a network file system, a dead peer that the network does
not report, a deadlock) makes all others wait with it, silently. `trainer` sends a heartbeat with
whatever it begins; a thread notices when the next one is late. Since the others wait for the one
that hangs, all ranks report at about the same time, and the report whose stack is not inside a
collective is the cause's. After as much time again each ends itself, so that torchrun can restart
them.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from navit_clip.distributed import end_process

STALL_EXIT_CODE = 70
_PATIENCE = 3.0
_STDERR = 2  # the descriptor: whatever has taken the place of `sys.stderr`


class Watchdog:
    """Watches one rank.

    Args:
        run_dir: Reports go to ``stalls/rank-N.txt`` in it, and to standard error.
        rank: This rank.
        timeout_s: Seconds without progress before the report, and again before the end; 0 watches
            nothing.
        waits: Lines on what data workers wait for.
        alert: Takes the line of a report.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        timeout_s: float,
        waits: Callable[[], Sequence[str]] = tuple,
        alert: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path = run_dir / "stalls" / f"rank-{rank}.txt"
        self.rank, self.timeout_s, self.waits = rank, timeout_s, waits
        self.alert = alert
        self._what, self._limit_s, self._since = "", 0.0, 0.0
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches inside; does nothing before the first heartbeat."""
        if not self.timeout_s:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
            thread.join()

    def heartbeat(self, what: str, *, slow: bool = False) -> None:
        """Reports progress.

        Args:
            what: What begins now, named if it never ends.
            slow: It may well take long (compilation, a checkpoint): three times as much is allowed.
        """
        if not self.timeout_s:
            return
        limit_s = self.timeout_s * (_PATIENCE if slow else 1.0)
        self._what, self._limit_s, self._since = what, limit_s, time.monotonic()
        # Its timer is a thread without Python, so it also ends a process whose hanging call keeps
        # the interpreter's lock, in which `_watch` cannot run.
        faulthandler.dump_traceback_later(2 * limit_s + 5, exit=True, file=_STDERR)

    def _watch(self) -> None:
        reported = 0.0
        while not self._ended.wait(min(1.0, self.timeout_s / 10)):
            since, silent_s = self._since, time.monotonic() - self._since
            if not self._limit_s or silent_s < self._limit_s:
                continue
            if reported != since:
                reported = since
                self._report(silent_s, f"ending this process if {self._limit_s:g} s more pass")
            elif silent_s > 2 * self._limit_s:
                self._report(silent_s, "ending this process")
                end_process(STALL_EXIT_CODE)

    def _report(self, silent_s: float, outlook: str) -> None:
        what = "; ".join([self._what, *self.waits(), outlook])
        line = (
            f"rank {self.rank} stalled: no progress for {silent_s:.0f} s in {what}. "
            f"Stacks of its threads, also in {self.path}:\n"
        )
        os.write(_STDERR, line.encode())
        faulthandler.dump_traceback(_STDERR)
        with suppress(OSError):  # a file system that hangs or is full may be the very cause
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), line, end="", file=file, flush=True)
                faulthandler.dump_traceback(file)
        self.alert(line)
