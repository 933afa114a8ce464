"""Mistakes of a run under torchrun: said once, and not tried again; an outage is tried again."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from launch import ROOT, is_running, launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1"]
HERE = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
RANK = """
import os
from navit_clip import before_torch
import torch.distributed
from navit_clip.distributed import failing_at_once, join_ranks
from navit_clip.errors import OutageError, UserError, one_line_errors

# As NCCL's, it may wait for the other ranks: the line comes before, and nobody waits.
torch.distributed.destroy_process_group = lambda *group: os._exit(77)
with one_line_errors("prog"), join_ranks("cpu") as ranks, failing_at_once(ranks, "prog"):
    print("starts", flush=True)
    ranks.barrier()
    if ranks.rank in {wrong}:
        raise {error}("wrong\\n here")
    ranks.barrier()
"""
LATE = """
import os, time
from pathlib import Path
from navit_clip.torchrun import follow_torchrun

parent = os.getpid()
if pid := os.fork():
    Path("{out}").write_text(str(pid))
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.001)
follow_torchrun()
time.sleep(60)
"""


def said(command: list[str], output: Path, *, forked: bool = True) -> tuple[int, str]:
    """Exit status and output of torchrun; forked or not, it starts its ranks as usual."""
    with launch(command, output, forked=forked) as running:
        return running.wait(), running.tail()


@pytest.mark.parametrize("module", ["train", pytest.param("eval", marks=pytest.mark.slow)])
def test_flags_that_do_not_exist_are_named_once(tmp_path, module):
    command = [*HERE, "-m", module, "--no-such-flag"]
    status, output = said(command, tmp_path / "out", forked=False)
    assert status == 1
    assert output.count("error: ") == output.count(f"python -m {module}: error: ") == 1
    assert "exitcode" not in output  # torchrun's report of a rank that failed


@pytest.mark.parametrize("wrong", [pytest.param((0, 1), marks=pytest.mark.slow), (1,)])
def test_a_mistake_ends_all_ranks_of_all_attempts(tmp_path, wrong):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(wrong=wrong, error="UserError"))
    status, output = said([*HERE, str(script)], tmp_path / "out")
    assert status == 1
    assert output.count("starts") == 2
    assert re.findall("prog: error: .*", output) == ["prog: error: wrong here"]
    assert "closed by peer" not in output


def test_an_outage_is_said_once_an_attempt_and_tried_again(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(wrong=(0, 1), error="OutageError"))
    status, output = said([*HERE, str(script)], tmp_path / "out")
    assert status == 1
    assert output.count("prog: error: wrong here") == 2


def test_a_rank_notices_that_torchrun_was_killed_before_it_looked(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(LATE.format(out=tmp_path / "pid"))
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "a", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], env=env) as parent:
        assert parent.wait() == 0
    rank = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while is_running(rank):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 1])
def test_a_mistake_on_one_host_ends_the_others(tmp_path, shared):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(wrong=(1,), error="UserError"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        hosts = []
        for number in range(2):
            command = [
                "env",
                f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE={1 - shared}",
                *TORCHRUN,
                "--nnodes=2",
                "--nproc-per-node=1",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{port}",
                f"--rdzv-conf=is_host={1 - number}",
                f"--local-addr=127.0.0.{1 + number}",
                str(script),
            ]
            hosts.append(stack.enter_context(launch(command, tmp_path / f"out{number}")))
        for host in hosts:
            assert host.wait() == 1
            assert host.tail().count("starts") == 1
            assert host.tail().count("prog: error: wrong here") == 1
