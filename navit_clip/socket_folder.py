"""The temporary folder of the sockets over which data workers hand memory over.

`multiprocessing` makes it, and removes it when its maker ends of itself. A rank that is killed
leaves that to its data workers, but only of a folder that it made: a program that forked the rank
uses the same one, and without it would wait for its own workers without end.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from multiprocessing.util import get_temp_dir

_maker = 0


def make_socket_folder() -> None:
    """Makes it before workers are started, which otherwise would make one each."""
    global _maker
    # No public function tells whether there is one.
    if multiprocessing.current_process()._config.get("tempdir") is None:  # type: ignore[attr-defined]
        get_temp_dir()
        _maker = os.getpid()


def remove_socket_folder(process: int | None) -> None:
    """Removes it if the process of this number made it."""
    if _maker == process:
        shutil.rmtree(get_temp_dir(), ignore_errors=True)
