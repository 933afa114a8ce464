"""Memory of a process that computes on a CPU: what is freed stays with it.

A step frees and asks for gigabytes. glibc returns large blocks to the kernel, which hands them out
zeroed, page by page: 200,000 page faults a step, 7 to 12% of its time (benchmarks/LOG.md).
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Keeps it from now on, in processes forked later too; the most ever needed stays the same.

    Does nothing where the C library is not glibc.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_MAX, 0)
