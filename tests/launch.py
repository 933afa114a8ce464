"""Commands of whole trainings as processes that a test can watch, kill and clean up.

`killed_runs` starts torchrun with them and looks up its ranks and their data workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from forks import ROOT, ForkedCommand

_WAIT_S = 240.0  # less than a test may take, so that what a command printed is shown


def torchrun(flags: Sequence[str], *options: str) -> list[str]:
    """The command of a run under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "train", *flags]


def processes_below(pid: int) -> dict[int, int]:
    """All running descendants of a process and the parent of each; none known without /proc."""
    parents: dict[int, int] = {}
    if not Path("/proc").exists():
        return parents
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # ended meanwhile
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    below: dict[int, int] = {}
    generation = {pid}
    while generation:
        children = {child: p for child, p in parents.items() if p in generation}
        below |= children
        generation = set(children)
    return below


class Launch:
    """One start of a command, and the processes that it starts.

    Args:
        command: The command.
        output: Gets what it prints.
        forked: Whether it is forked from a process that has imported torch (`forks`); Python alone.
    """

    def __init__(self, command: Sequence[str], output: Path, *, forked: bool = False) -> None:
        self.output = output
        self._seen: set[int] = set()
        self.process: subprocess.Popen[bytes] | ForkedCommand
        # Gloo would otherwise look for the host's name, which need not be in any table.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if forked:
            self.process = ForkedCommand(command, output, environment)
            return
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """Processes of the ranks that run now, by rank."""
        below = self._below()
        found: dict[int, int] = {}
        for pid in (pid for pid, parent in below.items() if parent == self.process.pid):
            with suppress(OSError):
                environment = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
                found |= {int(e[5:]): pid for e in environment if e.startswith(b"RANK=")}
        return found

    def workers(self, rank: int) -> list[int]:
        """Data workers of a rank: forks of it, so they share its command line."""
        pid = self.ranks().get(rank)
        if pid is None:
            return []
        own = _command_line(pid)
        children = [child for child, parent in self._below().items() if parent == pid]
        return [child for child in children if own and _command_line(child) == own]

    def wait(self, timeout_s: float = _WAIT_S) -> int:
        """Waits for the end.

        Raises:
            TimeoutError: With the end of the output.
        """
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"no end after {timeout_s:.0f} s:\n{self.tail()}") from error

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits until something is so.

        Raises:
            TimeoutError: If it takes too long, or the command ends before; with its output.
        """
        deadline = time.monotonic() + _WAIT_S
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError(f"{what} was not reached:\n{self.tail()}")
            time.sleep(0.002)

    def send_signal(self, number: int) -> None:
        """Sends the command alone a signal; `close` waits for what it started."""
        self._below()
        self.process.send_signal(number)

    def kill_all(self) -> None:
        """Ends the command and everything that it started, by SIGKILL, as a dying host does."""
        self._below()
        self.process.send_signal(signal.SIGKILL)
        for pid in self._seen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Leaves no process behind."""
        if self.process.poll() is None:
            self.kill_all()
        # Orphans notice by themselves; those that do not must not disturb what comes next.
        deadline = time.monotonic() + 10
        while (left := [pid for pid in self._seen if _command_line(pid)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.05)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def tail(self) -> str:
        """The end of what the command printed."""
        return self.output.read_text(errors="replace")[-4000:]

    def _below(self) -> dict[int, int]:
        below = processes_below(self.process.pid)
        self._seen |= below.keys()
        return below


def is_running(pid: int) -> bool:
    """Whether a process has not ended, whoever is to collect it."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _command_line(pid: int) -> bytes:
    """Of a process; empty if it has ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def launch(command: Sequence[str], output: Path, *, forked: bool = False) -> Iterator[Launch]:
    """Starts a command and leaves no process behind."""
    started = Launch(command, output, forked=forked)
    try:
        yield started
    finally:
        started.close()


def run_to_end(command: Sequence[str], output: Path, *, forked: bool = False) -> None:
    """Runs a command that must succeed.

    Raises:
        RuntimeError: If it does not; with the end of its output.
    """
    with launch(command, output, forked=forked) as running:
        if running.wait() != 0:
            raise RuntimeError(f"the run failed:\n{running.tail()}")
