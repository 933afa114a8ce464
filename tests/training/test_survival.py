"""Runs that are killed or hang: what is said, and what torchrun makes of it.

``python -m pytest -m slow tests/training/test_survival.py --kills 20`` kills a run twenty times.
"""

import getpass
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from killed_runs import (
    RANKS,
    last_step,
    read_losses,
    run_agents,
    run_killed,
    same_weights,
    two_ranks,
    write_run,
)
from launch import is_running, launch, run_to_end
from pairs_seen import count_pairs

STEPS = 30

WATCHED = """
import ctypes, sys, time
from pathlib import Path
from navit_clip.training.watchdog import Watchdog

def hang_here(seconds):
    time.sleep(seconds)

with Watchdog(Path(sys.argv[1]), 3, {timeout}).watching() as watchdog:
    {body}
print("ended well")
"""


def said(script, path, *words, forked=True):
    """Exit status of a Python script in `path`, and what it prints."""
    path.mkdir(exist_ok=True)
    (path / "script.py").write_text(script)
    command = [sys.executable, str(path / "script.py"), *map(str, words)]
    with launch(command, path / "said.txt", forked=forked) as running:
        status = running.wait()
    return status, (path / "said.txt").read_text()


def watched(path, timeout, body, forked=True):
    """Exit status of a process that is watched while it runs `body`, and what it prints."""
    return said(WATCHED.format(timeout=timeout, body=body), path, path, forked=forked)


def test_a_stall_is_reported_with_its_stack_and_then_ended(tmp_path):
    body = "watchdog.heartbeat('step 17'); hang_here(60)"
    status, printed = watched(tmp_path, 0.3, body, forked=False)
    assert status == 70
    report = (tmp_path / "stalls/rank-3.txt").read_text()
    for text in (printed, report):
        assert re.search(r"rank 3 stalled: no progress for \d+ s in step 17", text)
        assert "in hang_here" in text
        assert text.count("stalled") == 2
    assert "ending this process if 0.3 s more pass" in report


def test_progress_slow_parts_and_a_timeout_of_0_are_no_stalls(tmp_path):
    body = "[(watchdog.heartbeat(f'step {i}'), time.sleep(0.1)) for i in range(15)]"
    body += "; watchdog.heartbeat('the first step', slow=True); time.sleep(1.8)"
    assert watched(tmp_path, 0.9, body) == (0, "ended well\n")
    body = "watchdog.heartbeat('step 1'); time.sleep(0.5)"
    assert watched(tmp_path / "0", 0, body) == (0, "ended well\n")
    assert not list(tmp_path.rglob("stalls"))


def test_a_stall_that_ends_by_itself_is_only_reported(tmp_path):
    body = "watchdog.heartbeat('a'); time.sleep(0.8); watchdog.heartbeat('b')"
    status, printed = watched(tmp_path, 0.5, body)
    assert status == 0
    assert printed.count("stalled") == 1


def test_a_call_that_never_lets_go_of_the_interpreter_is_ended_too(tmp_path):
    body = "watchdog.heartbeat('step 1'); ctypes.PyDLL(None).sleep(60)"
    status, printed = watched(tmp_path, 0.1, body)
    assert status == 1
    assert "Timeout" in printed


FAILING = """
import sys, threading, time
import torch
from navit_clip.distributed import Ranks, failing_at_once
from navit_clip.errors import UserError

threading.Thread(target=time.sleep, args=(float(sys.argv[2]),)).start()
with failing_at_once(Ranks(0, int(sys.argv[1]), torch.device("cpu")), "prog"):
    raise {error}("the reason")
"""


@pytest.mark.parametrize(
    ("ranks", "thread_s", "error", "line", "status"),
    [
        (2, 600, "OSError", "OSError: the reason", 1),
        (1, 0, "OSError", "OSError: the reason", 1),
        (2, 600, "UserError", "prog: error: the reason", 2),
    ],
)
def test_a_rank_that_fails_waits_for_no_thread(ranks, thread_s, error, line, status, tmp_path):
    script = FAILING.format(error=error)
    forked = error == "UserError"  # the others end as Python does
    found, printed = said(script, tmp_path, ranks, thread_s, forked=forked)
    assert found == status
    assert line in printed


def run_undisturbed(root, flags):
    """The directory of a run that nothing disturbs."""
    run_to_end(two_ranks([*flags, "--run_dir", str(root / "whole")]), root / "whole.txt")
    return root / "whole"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def flags(root):
    return write_run(root, train=192, steps=STEPS)


@pytest.fixture(scope="module")
def run(root, flags):
    return flags, run_undisturbed(root, flags)


@pytest.mark.slow
def test_the_audit_of_pairs_notices_what_is_lost_and_what_comes_twice(run):
    flags, whole = run
    counts = count_pairs(flags, whole, RANKS)
    assert counts["pairs"] == sum(line[-1] for line in read_losses(whole))
    assert counts["pairs"] > 2 * counts["pairs_in_epoch"]
    assert counts["pairs_missing"] == counts["pairs_repeated"] == 0
    log = whole / "samples-1.jsonl"
    kept = log.read_text()
    lines = kept.splitlines()
    lost, twice = (len(json.loads(lines[i])["ids"]) for i in (4, 7))
    log.write_text("\n".join([*lines[:4], *lines[5:], lines[7]]))
    counts = count_pairs(flags, whole, RANKS)
    log.write_text(kept)
    assert (counts["pairs_missing"], counts["pairs_repeated"]) == (lost, twice)


@pytest.mark.slow
def test_torchrun_restarts_ranks_that_hang_or_are_killed(run, tmp_path):
    flags, whole = run
    shards = sorted((whole.parent / "shapes/train").glob("*.tar"))
    own = tmp_path / "shards"
    own.mkdir()
    for shard in shards:
        os.link(shard, own / shard.name)
    # Whoever opens this one waits for ever.
    blocked = own / shards[5].name
    blocked.unlink()
    os.mkfifo(blocked)
    run_dir = tmp_path / "run"
    stalls = [run_dir / f"stalls/rank-{rank}.txt" for rank in (0, 1)]
    options = ["--run_dir", str(run_dir), "--data.train", str(own), "--stall_timeout_s", "2"]
    command = two_ranks([*flags, *options], "--max-restarts=3")
    with launch(command, tmp_path / "output.txt") as running:
        running.until(lambda: all(stall.exists() for stall in stalls), "a report of both ranks")
        os.link(shards[5], own / "whole.part")
        (own / "whole.part").rename(blocked)
        running.until(lambda: last_step(run_dir) >= STEPS // 2, "the middle of the run")
        os.kill(running.ranks()[1], signal.SIGKILL)
        assert running.wait() == 0, running.tail()
    for rank, stall in enumerate(stalls):
        assert re.search(rf"rank {rank} stalled: no progress for \d+ s in", stall.read_text())
        assert "trainer.py" in stall.read_text()
    assert (tmp_path / "output.txt").read_text().count("continuing from step") >= 1
    assert read_losses(run_dir) == read_losses(whole)
    assert same_weights(run_dir, whole)
    assert count_pairs(flags, run_dir, RANKS) == count_pairs(flags, whole, RANKS)


@pytest.mark.parametrize("moment", ["start", pytest.param("step", marks=pytest.mark.slow)])
def test_ranks_end_soon_after_torchrun_is_killed(request, flags, tmp_path, moment, monkeypatch):
    # Not in tmp_path: the path of a socket has 100 characters.
    temporary = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(temporary))
    run_dir = tmp_path / "run"
    command = two_ranks([*flags, "--run_dir", str(run_dir)])
    with launch(command, tmp_path / "output.txt") as running:
        running.until(lambda: len(running.ranks()) == RANKS, "both ranks")
        orphans = [*running.ranks().values()]
        if moment == "step":
            running.until(lambda: last_step(run_dir) >= STEPS // 2, "the middle of the run")
            orphans += running.workers(0) + running.workers(1)
        running.process.kill()
        deadline = time.monotonic() + 20
        while left := [pid for pid in orphans if is_running(pid)]:
            assert time.monotonic() < deadline, f"{left} outlive torchrun:\n{running.tail()}"
            time.sleep(0.05)
    if moment == "step":
        assert {path.name for path in temporary.iterdir()} <= {f"torchinductor_{getpass.getuser()}"}
        run_to_end(command, tmp_path / "output.txt")
        _, whole = request.getfixturevalue("run")
        assert read_losses(run_dir) == read_losses(whole)
        assert same_weights(run_dir, whole)
    shutil.rmtree(temporary)


def test_a_stop_signal_to_torchrun_saves_what_is_done(flags, tmp_path):
    run_dir = tmp_path / "run"
    options = ["--run_dir", str(run_dir), "--steps", "3000", "--checkpoint.every_steps", "1000"]
    with launch(two_ranks([*flags, *options]), tmp_path / "output.txt", forked=True) as running:
        running.until(lambda: last_step(run_dir) >= 10, "step 10")
        # torchrun passes it on to the whole process group of each rank, data workers included.
        running.process.send_signal(signal.SIGTERM)
        running.wait()
        assert "stopped at step" in running.output.read_text(), running.tail()
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name == f"step-{last_step(run_dir):08d}"


@pytest.mark.slow
def test_a_host_that_dies_and_comes_back(run, tmp_path):
    flags, whole = run
    found = run_agents(flags, tmp_path / "agents", step=STEPS // 2)
    assert 0 < found["resumed_from"] <= found["killed_at"] + 3
    assert read_losses(tmp_path / "agents") == read_losses(whole)
    assert same_weights(tmp_path / "agents", whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("task", "train"), [("contrastive", 768), ("classify", 240), ("masked_image", 240)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path, pytestconfig, task, train
):
    kills = pytestconfig.getoption("--kills")
    steps = 50 + 6 * kills
    flags = write_run(tmp_path, train=train, steps=steps, task=task)
    whole = run_undisturbed(tmp_path, flags)
    hits = run_killed(flags, tmp_path / "killed", kills, steps)
    assert len(hits) == kills
    assert len(read_losses(whole)) == steps
    assert read_losses(tmp_path / "killed") == read_losses(whole)
    assert same_weights(tmp_path / "killed", whole)
    counts = count_pairs(flags, tmp_path / "killed", RANKS)
    assert counts["pairs"] > 2 * counts["pairs_in_epoch"]
    assert counts["pairs_missing"] == counts["pairs_repeated"] == 0
