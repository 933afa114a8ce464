"""A rank and the torchrun that started it: neither goes on where the other is at its end.

Only the standard library: entry points import it before torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

_LOOK_S = 0.1
_ENDED_S = 10.0  # torchrun signals its ranks within a second

_torchrun: int | None = None  # its process, of a rank


def follow_torchrun() -> None:
    """Ends this process soon after torchrun was killed; does nothing if torchrun started none.

    Nobody else would end it: it would train on beside the run that is started in its place, and
    both would write into one directory.
    """
    global _torchrun
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = _torchrun = os.getppid()
    log = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents[3:4]

    def follow() -> None:
        killed = _was_killed(parent)
        while os.getppid() == parent and not killed:
            time.sleep(_LOOK_S)
        for folder in log:
            if folder.name.startswith("torchelastic_"):  # in the temporary directory: no --log-dir
                shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=follow, name="follow_torchrun", daemon=True).start()


def _was_killed(parent: int) -> bool:
    """Whether torchrun had ended before this process looked for it, which others then adopted."""
    with suppress(OSError):
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        return bool(command) and b"python" not in command and b"torch" not in command
    return False


def report(line: str, *, final: bool) -> None:
    """Prints why a command ends, which of all ranks of a host one does.

    Args:
        line: What is printed on standard error.
        final: Started again the ranks would come to the same end, so torchrun is ended too.
    """
    if _torchrun is None:
        print(line, file=sys.stderr)
        return
    mine = _is_first_to_report()
    if mine:
        print(line, file=sys.stderr, flush=True)
    if final and _restarts_left():
        if mine:
            with suppress(ProcessLookupError):
                os.kill(_torchrun, signal.SIGTERM)
        # It ends this process now. A rank that ends by itself would first be started again.
        time.sleep(_ENDED_S)


def _is_first_to_report() -> bool:
    """Whether no other rank of this host has reported in this attempt."""
    # torchrun makes ATTEMPT/LOCAL_RANK/error.json for each; without logs there is no such folder.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        Path(error_file).parent.with_name("reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _restarts_left() -> bool:
    count, most = (
        os.environ.get(f"TORCHELASTIC_{n}", "0") for n in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    return count != most
