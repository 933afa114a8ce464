"""Shards that come out of a shell command, such as a download: ``pipe:aws s3 cp s3://… -``."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from contextlib import suppress

from navit_clip.data.forward_stream import CHUNK, ForwardStream
from navit_clip.retries import RemoteError

# A command has no timeouts of its own unless its author thought of them.
COMMAND_TIMEOUT_S = 300.0
COMMAND_END_S = 10.0  # from the end of its output, or from the signal to stop, to its end


class CommandStream(ForwardStream):
    """What a shell command writes to its standard output.

    Args:
        command: Run by ``/bin/sh``, so of a pipeline ``a | b`` only the status of ``b`` counts.

    Raises:
        RemoteError: When it has ended with another status than 0, with the last line that it
            wrote to standard error, or writes nothing for `COMMAND_TIMEOUT_S`.
    """

    def __init__(self, command: str) -> None:
        super().__init__(command)
        # A file: a pipe that nobody reads would block a talkative command.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        try:
            self._process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                # Its own group, so that all of a pipeline can be stopped, not the shell alone.
                start_new_session=True,
            )
        except OSError:
            self._errors.close()
            raise
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._ready = select.poll()
        self._ready.register(self._output, select.POLLIN)

    def _receive(self, size: int) -> bytes:
        if not self._ready.poll(COMMAND_TIMEOUT_S * 1000):
            raise RemoteError(f"the command wrote nothing for {COMMAND_TIMEOUT_S:g} s")
        chunk = os.read(self._output.fileno(), min(size, CHUNK))
        if not chunk:
            self._check_end()
        return chunk

    def finish(self) -> None:
        """Reads on to the end of the output, and checks the command's status."""
        while self._receive(CHUNK):
            pass

    def _check_end(self) -> None:
        try:
            status = self._process.wait(COMMAND_END_S)
        except subprocess.TimeoutExpired:
            raise RemoteError("the command closed its output and does not end") from None
        if status:
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            raise RemoteError(f"{how}: {lines[-1].strip()}" if lines else how)

    def close(self) -> None:
        """Stops the command, and what it started, if it still runs."""
        self._output.close()
        self._errors.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(COMMAND_END_S)
            # The shell may be gone and a part of its pipeline not.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
