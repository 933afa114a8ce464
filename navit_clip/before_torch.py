"""What an entry point does before torch loads; imported for its effects, first of all.

Threads of OpenMP that wait do not spin, a rank of torchrun ends when torchrun does, and what torch
will change one day is no warning to a user.
"""

from __future__ import annotations

import os
import sys
import warnings

from navit_clip.torchrun import follow_torchrun

# Spinning threads take the cores from data workers and other programs, at a cost of several times
# the speed. Read once, when the library loads. A user's own choice stays.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def _wait_passively() -> None:
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


_wait_passively()
if not sys.warnoptions:
    warnings.simplefilter("ignore", FutureWarning)
follow_torchrun()
