"""Processes that begin with the trainer imported, since that takes most of a short test's time.

They are forked from one that has, unless a test before had another one started for its workers. So
all hash strings alike, which ranks of torchrun do not; and none ends as Python does, with `atexit`.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]


def forked(
    fn: Callable[..., None], *args: Any, environment: Mapping[str, str] = os.environ
) -> mp.Process:
    """A process, not yet started, that calls a function of an importable file."""
    context = mp.get_context("forkserver")
    # The second is what the first optimiser of a process imports.
    context.set_forkserver_preload(["navit_clip.training.trainer", "torch._dynamo"])
    # No daemon: a daemon may not have children, and data loader workers are.
    return context.Process(target=_begin, args=(fn, dict(environment), args))


def _begin(fn: Callable[..., None], environment: dict[str, str], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)  # of now: the process that is forked has that of its own start
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of data workers, as in a process of its own
    fn(*args)


class ForkedCommand:
    """A Python command in a session of its own, with what `launch` uses of `subprocess.Popen`.

    Args:
        command: The interpreter, ``-m`` and a module or a script's path, and its flags.
        output: Gets what it prints.
        environment: Its variables.
    """

    def __init__(
        self, command: Sequence[str], output: Path, environment: Mapping[str, str]
    ) -> None:
        self.args = list(command)
        output.touch()
        self._process = forked(_run_python, self.args[1:], str(output), environment=environment)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit status; the negative of a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        """Exit status, once it has ended.

        Raises:
            subprocess.TimeoutExpired: If it does not.
        """
        self._process.join(timeout_s)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout_s or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal to it and not to what it started; nothing if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _run_python(arguments: list[str], output: str) -> None:
    os.setsid()
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
