"""What an entry point does before torch loads; imported for its effects, first of all.

Threads of OpenMP that wait do not spin, and a rank of torchrun ends when torchrun does.
"""

from __future__ import annotations

import os
import threading
import time

# Spinning threads take the cores from data workers and other programs, at a cost of several times
# the speed. Read once, when the library loads. A user's own choice stays.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_LOOK_S = 0.1


def _wait_passively() -> None:
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _follow_torchrun() -> None:
    """Ends this process soon after torchrun was killed.

    Nobody else would end it: it would train on beside the run that is started in its place, and
    both would write into one directory.
    """
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=follow, name="follow_torchrun", daemon=True).start()


_wait_passively()
if "TORCHELASTIC_RUN_ID" in os.environ:
    _follow_torchrun()
