"""Memory that a process frees is its own again, without a page fault."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
from navit_clip.host_memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_a_block_that_was_freed_is_handed_out_without_page_faults():
    faults = [
        int(subprocess.check_output([sys.executable, "-c", _FAULTS.format(keep=keep)]))
        for keep in (False, True)
    ]
    assert faults[1] < 8 < faults[0]
