"""Shards from commands that misbehave: the same samples as from disk, and nothing left behind."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from loader_cases import samples_and_error
from shard_factory import make_shards

from navit_clip.data import command as command_stream
from navit_clip.data.command import CommandStream
from navit_clip.data.shards import read_shard


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    (path,) = make_shards(tmp_path_factory.mktemp("remote"), [60])
    return path


def test_the_same_from_a_command_as_from_disk(shard, tmp_path):
    for command in (f"cat {shard}", f"cat {shard} | cat"):
        assert samples_and_error(f"pipe:{command}") == samples_and_error(shard)
        assert samples_and_error(f"pipe:{command}", {3, 50}) == samples_and_error(shard, {3, 50})


def test_a_command_that_writes_much_to_standard_error(shard):
    command = f"head -c 1000000 /dev/zero >&2; cat {shard}"
    assert samples_and_error(f"pipe:{command}") == samples_and_error(shard)


@pytest.mark.parametrize(
    ("command", "readable", "reason"),
    [
        ("cat {}; echo one >&2; echo two >&2; exit 3", 59, "exit status 3: two"),
        ("head -c 50000 {}; echo broken >&2; exit 1", None, "exit status 1: broken"),
        ("exit 22", 0, "exit status 22"),
        ("no-such-command {}", 0, "exit status 127: .*not found"),
        ("kill -9 $$", 0, "SIGKILL"),
        ("true", 0, "not a tar file: empty file"),
        ("head -c 50000 {}", None, "cut off: it has no end mark"),
    ],
)
def test_a_command_that_fails(command, readable, reason, shard):
    everything, _ = samples_and_error(shard)
    samples, error = samples_and_error(f"pipe:{command.format(shard)}")
    assert re.search(reason, error)
    assert samples == everything[: len(samples)]
    assert readable is None or len(samples) == readable


def test_a_command_that_hangs(monkeypatch, shard):
    monkeypatch.setattr(command_stream, "COMMAND_TIMEOUT_S", 1)
    samples, error = samples_and_error(f"pipe:head -c 50000 {shard}; sleep 60")
    assert samples
    assert error == "the command wrote nothing for 1 s"
    monkeypatch.setattr(command_stream, "COMMAND_END_S", 0.1)
    samples, error = samples_and_error(f"pipe:cat {shard}; exec >&-; sleep 60")
    assert len(samples) == 59  # the last is given out once its source has ended well
    assert error == "the command closed its output and does not end"


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # An orphan is reaped by whoever adopts it, which may take a moment or never happen.
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    "command",
    [
        "echo $$ >> {pids}; cat {shard}; sleep 60",
        "echo $$ >> {pids}; sh -c 'echo $$ >> {pids}; cat {shard}; exec sleep 60' | cat",
        "trap '' TERM; echo $$ >> {pids}; cat {shard}; while true; do sleep 60; done",
    ],
)
def test_no_process_is_left_behind(command, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(command_stream, "COMMAND_END_S", 0.2)
    pids = tmp_path / "pids"
    samples = read_shard(f"pipe:{command.format(pids=pids, shard=shard)}")
    next(samples)
    started = [int(line) for line in pids.read_text().split()]
    assert started
    assert not any(map(gone, started))
    samples.close()
    deadline = time.monotonic() + 5
    while not all(map(gone, started)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(map(gone, started))


def test_a_command_that_cannot_start_leaves_nothing_open():
    with pytest.raises(OSError, match="too long"):
        CommandStream("x" * 10_000_000)
