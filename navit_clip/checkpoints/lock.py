"""One trainer at a time in a run directory.

A file names the process that holds the directory. `flock` would be shorter, but shared file systems
have it in name only. On the holder's own machine its process shows whether it lives; one on another
machine touches the file every few seconds, so whoever finds the file waits and sees whether it is
still touched, whatever the clocks say.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from navit_clip.distributed import Ranks
from navit_clip.errors import UserError

LOCK_FILE = "trainer.lock"
BEAT_S = 5.0
SILENT_S = 30.0  # a holder elsewhere that has not touched the file for so long is dead


class RunLock:
    """Holds a run directory while it is entered; every rank enters it, rank 0 holds the file.

    A directory that it made is removed if it is empty at the end: the command was refused.

    Args:
        run_dir: Made if it is missing.
        ranks: This process among all of them.

    Attributes:
        lost: Another trainer has taken the directory, as it may from one that stood still for
            longer than `SILENT_S`: nothing may be written any more. Only rank 0 knows.

    Raises:
        UserError: On entering, the same on all ranks: if a trainer holds the directory (names its
            host and process), or it cannot be written.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self.path, self.ranks, self.lost = run_dir / LOCK_FILE, ranks, False
        self._made = False
        self._own = json.dumps(
            {
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "token": uuid.uuid4().hex,
            }
        ).encode()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> RunLock:
        problem = None
        if self.ranks.is_first:
            try:
                self._take()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"cannot write {self.path}: {error.strerror or error}"
        problem = self.ranks.broadcast(problem)
        if problem is not None:
            raise UserError(problem)
        if self.ranks.is_first:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ranks.is_first:
            return
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if self.path.read_bytes() == self._own:
                self.path.unlink()
        for folder in (self.path.parent / "checkpoints", self.path.parent):
            with suppress(OSError):
                if self._made:
                    folder.rmdir()

    def _take(self) -> None:
        self._made = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                file = self.path.open("xb")
            except FileExistsError:
                self._remove_dead()
                continue
            try:
                with file:
                    file.write(self._own)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise
            return

    def _remove_dead(self) -> None:
        """Removes the file of a dead holder.

        Raises:
            UserError: If the holder lives.
        """
        found = _content(self.path)
        if found is None:
            return
        holder = _parsed(found)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
        if _lives(self.path, found, holder, who):
            raise UserError(
                f"{self.path.parent} is in use by a trainer, {who}: stop it first, or use another "
                "run_dir"
            )
        aside = self.path.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_bytes() != found:
                # Another one was faster, and this file is its: it gets it back.
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):
                if self.path.read_bytes() == self._own:
                    os.utime(self.path)
                else:
                    self.lost = True


def _lives(path: Path, found: bytes, holder: dict[str, Any], who: str) -> bool:
    if holder.get("machine") == _machine():
        started = _started(holder["pid"]) if isinstance(holder.get("pid"), int) else None
        # Another user's process may hide when it was started.
        return started == "" or (started is not None and started == holder.get("started"))
    print(f"{path.parent} was left locked by {who}; waiting to see if it still runs", flush=True)
    first, deadline = _touched(path), time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(0.5, SILENT_S / 4))
        if (now := _content(path)) is None:
            return False
        if now != found or _touched(path) != first:
            return True
    return False


def _content(path: Path) -> bytes | None:
    """What stands in a file, None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> dict[str, Any]:
    """What a holder wrote; empty if it has not yet, or was killed before."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _touched(path: Path) -> int:
    with suppress(OSError), path.open("rb") as file:  # opened: else NFS answers from its cache
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _machine() -> str:
    """What two processes have in common that see each other's numbers."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process was started, as the machine counts; "" if unknown, None if it has ended."""
    with suppress(OSError, IndexError):
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if values[0] in "ZX" else values[19]
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        pass
    return ""
