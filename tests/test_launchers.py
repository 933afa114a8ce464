"""The scripts that start a training on several nodes, with stand-ins for torchrun and Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[1] / "train"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A folder of commands that come before the real ones."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    return tmp_path


def put(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_parse_and_explain_themselves(script):
    assert subprocess.run(["bash", "-n", str(TRAIN / script)], check=False).returncode == 0
    command = ["bash", str(TRAIN / script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_torchrun_gets_the_nodes_and_the_trainers_words(path, monkeypatch):
    put(path, "torchrun", 'printf "%s\\n" "$@"; exit 7')
    words = ["2", "node1:29500", "--config", "demo", "--data.train", "a b/{0..9}.tar"]
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    done = subprocess.run(
        [TRAIN / "torchrun.sh", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    given = done.stdout.splitlines()
    assert {"--nnodes=2", "--nproc-per-node=3", "--rdzv-endpoint=node1:29500"} <= set(given)
    assert given[-6:] == ["-m", "navit_clip.training", *words[2:]]


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, True)])
def test_slurm_requeues_a_run_that_was_stopped(path, monkeypatch, status, requeued):
    for name, value in {"JOB_ID": "41", "JOB_NODELIST": "n[1-2]", "JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    put(path, "scontrol", f'echo "$@" >> {path}/scontrol.log; echo node1')
    put(path, "scancel", f"touch {path}/stop")
    wait = f"while [ ! -e {path}/stop ]; do sleep 0.05; done"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "96")
    srun = f'echo "$SRUN_CPUS_PER_TASK" "$@" > {path}/srun.log; {wait}; exit {status}'
    put(path, "srun", srun)
    with subprocess.Popen(["bash", TRAIN / "slurm.sbatch", "--config", "demo"]) as process:
        while not (path / "srun.log").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    assert ("requeue 41" in (path / "scontrol.log").read_text()) == requeued
    words = "--rdzv-endpoint=node1:20041 -m navit_clip.training --config demo"
    started = (path / "srun.log").read_text()
    assert words in started
    assert started.startswith("96 ")


def test_slurm_passes_a_failure_on(path, monkeypatch):
    for name, value in {"JOB_ID": "41", "JOB_NODELIST": "n1", "JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    put(path, "scontrol", "echo node1")
    put(path, "srun", "exit 3")
    command = ["bash", TRAIN / "slurm.sbatch", "--config", "demo"]
    assert subprocess.run(command, check=False).returncode == 3
