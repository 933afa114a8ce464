"""What a run directory owns, what a command may change in it, and who may write to it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from distributed import run_ranks
from forks import forked
from launch import launch
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.checkpoints import lock
from navit_clip.checkpoints.lock import LOCK_FILE, RunLock
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.tools.train_tokenizer import train_tokenizer

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    train_tokenizer(
        [str(path) for path in (root / "shapes/train").glob("*.tar")],
        ["json.captions"],
        128,
        root / "other.model",
        "unigram",
    )
    return root


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A run of 4 steps with checkpoints at 2 and 4."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = tiny_flags(data, run_dir, 4, log__samples=True, checkpoint__every_steps=2)
        assert run(patch, flags) == 0
    return run_dir


@pytest.fixture
def copy(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "run"))


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def resume(monkeypatch, data, run_dir, steps=8, **changes):
    options = {"log__samples": True, "checkpoint__every_steps": 2, **changes}
    return run(monkeypatch, tiny_flags(data, run_dir, steps, **options))


REFUSED = [
    ({"seed": 5}, "another seed (0, now 5)"),
    ({"steps": 3}, "steps=3, but the run in"),
    ({"data__train": "[]", "data__mix": "MIX"}, "datasets of other names (train, now web)"),
    ({"data__train": "FEWER"}, "was taken with other training shards"),
    ({"task__model__embed_dim": 24}, "task.model.embed_dim"),
    ({"tokenizer__path": "other.model"}, "other.model is not the one that the run was begun with"),
    ({"task__model__image__encoder__heads": 4}, "task.model.image.encoder.heads is 4, was 2"),
    ({"task__model__text__encoder__causal": "true"}, "task.model.text.encoder.causal"),
    ({"ema__decay": 0.9}, "ema."),
    ({"task__captions": "{json.no: 1.0}", "data__max_bad_samples": 5}, "no_caption"),
    ({"data__train": "nowhere"}, "nowhere"),
    ({"eval__evaluators": "{a: {kind: zeroshot, data: nowhere}}"}, "nowhere"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_a_refused_command_changes_nothing_in_the_run(
    data, copy, monkeypatch, capsys, change, named
):
    (copy / "checkpoints/step-00000006.partial").mkdir()
    (copy / "checkpoints/step-00000006.partial/left").write_text("by a killed run")
    before = content(copy)
    change = dict(change)
    if change.get("data__mix") == "MIX":
        change["data__mix"] = json.dumps({"web": {"shards": str(data / "shapes/train")}})
    if change.get("data__train") == "FEWER":
        shards = sorted((data / "shapes/train").glob("*.tar"))
        change["data__train"] = json.dumps([str(path) for path in shards[:-1]])
    if "tokenizer__path" in change:
        change["tokenizer__path"] = data / change["tokenizer__path"]
    capsys.readouterr()
    assert resume(monkeypatch, data, copy, **change) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert content(copy) == before


def test_a_refused_first_command_leaves_no_directory(data, tmp_path, monkeypatch):
    flags = tiny_flags(data, tmp_path / "run", 2, data__train="nowhere")
    assert run(monkeypatch, flags) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_owns_its_tokenizer(data, copy, monkeypatch, capsys):
    path = copy.parent / "tok.model"
    shutil.copy(data / "tok.model", path)
    assert resume(monkeypatch, data, copy, 5, tokenizer__path=path) == 0
    path.unlink()
    assert resume(monkeypatch, data, copy, 6, tokenizer__path=path) == 0
    shutil.copy(data / "other.model", path)
    capsys.readouterr()
    assert resume(monkeypatch, data, copy, 7, tokenizer__path=path) == 2
    assert "tok.model is not the one" in capsys.readouterr().err


def test_what_changed_is_printed_and_earlier_configurations_stay(data, copy, monkeypatch, capsys):
    first = (copy / "config.yaml").read_text()
    constant = {
        "optim__schedule__kind": "constant",
        "optim__lr": 0.01,
        "optim__weight_decay": 0,
        "data__look_ahead": 6,
    }
    capsys.readouterr()
    assert resume(monkeypatch, data, copy, 6, **constant) == 0
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since")
    )
    assert line.startswith("changed since step 4: steps 4 → 6; ")
    assert "data.look_ahead 4 → 6; " in line
    assert "optim.lr 0.001 → 0.01; " in line
    assert "optim.weight_decay 0.1 → 0.0; " in line
    assert "optim.schedule.kind cosine → constant" in line
    assert sorted(path.name for path in (copy / "configs").iterdir()) == [
        "step-00000000.yaml",
        "step-00000004.yaml",
    ]
    assert (copy / "configs/step-00000000.yaml").read_text() == first
    assert yaml.safe_load((copy / "config.yaml").read_text())["optim"]["lr"] == 0.01
    assert resume(monkeypatch, data, copy, 6, **constant) == 0
    assert "changed since" not in capsys.readouterr().out


def test_other_shards_of_the_same_names_are_refused(data, copy, monkeypatch, capsys):
    moved = Path(shutil.copytree(data / "shapes/train", copy.parent / "moved"))
    assert resume(monkeypatch, data, copy, 5, data__train=moved) == 0
    shard = sorted(moved.glob("*.tar"))[1]
    whole = shard.read_bytes()
    for changed, named in (
        (whole + bytes(512), "bytes, not"),
        (b"x" + whole[1:], "other first bytes"),
        (whole[:-12000] + b"xy" + whole[-11998:], "other last bytes"),
    ):
        shard.write_bytes(changed)
        capsys.readouterr()
        assert resume(monkeypatch, data, copy, 6, data__train=moved) == 2
        line = capsys.readouterr().err
        assert f"other training shards: {shard.stem} has" in line
        assert named in line
    shard.write_bytes(whole)
    assert resume(monkeypatch, data, copy, 6, data__train=moved) == 0


def hold(run_dir):
    with RunLock(run_dir, ALONE):
        (run_dir.parent / "held").touch()
        time.sleep(300)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    process = forked(hold, tmp_path / "run")
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "held").exists():
            assert process.exitcode is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


def take(run_dir):
    with RunLock(run_dir, ALONE):
        return True


def test_a_second_trainer_is_refused_with_the_holders_name(
    holder, data, tmp_path, monkeypatch, capsys
):
    before = content(tmp_path / "run")
    assert run(monkeypatch, tiny_flags(data, tmp_path / "run", 2)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"in use by a trainer, process {holder.pid} on {socket.gethostname()}: stop it" in line
    assert content(tmp_path / "run") == before


def test_a_dead_trainer_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.join()
    assert (tmp_path / "run" / LOCK_FILE).is_file()
    assert take(tmp_path / "run")
    assert not list(tmp_path.rglob(f"{LOCK_FILE}*"))


def test_a_zombie_and_a_process_of_the_same_number_are_dead(tmp_path):
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    for pid, started in ((zombie.pid, None), (os.getpid(), "12")):
        own = {"host": "h", "machine": lock._machine(), "pid": pid, "started": started}
        (tmp_path / LOCK_FILE).write_text(json.dumps(own))
        assert take(tmp_path)
    zombie.wait()


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"machine": 5}', b'{"pid": "x"}', b"\xff"])
def test_a_holder_elsewhere_is_dead_once_it_no_longer_touches_the_file(
    tmp_path, monkeypatch, capsys, left
):
    monkeypatch.setattr(lock, "SILENT_S", 0.3)
    (tmp_path / LOCK_FILE).write_bytes(left)
    assert take(tmp_path)
    assert "waiting to see if it still runs" in capsys.readouterr().out


def test_a_living_holder_elsewhere_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 20)
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"host": "node7", "machine": "another", "pid": 12}))
    beats = threading.Timer(0.7, os.utime, [path])
    beats.start()
    with pytest.raises(UserError, match="process 12 on node7"):
        take(tmp_path)
    beats.join()


def test_who_loses_the_directory_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    with RunLock(tmp_path, ALONE) as held:
        time.sleep(0.2)
        assert not held.lost
        (tmp_path / LOCK_FILE).write_text("{}")
        time.sleep(0.3)
        assert held.lost
    assert (tmp_path / LOCK_FILE).read_text() == "{}"  # the other one's


def ranks_at_a_held_directory(run_dir):
    ranks = Ranks(torch.distributed.get_rank(), 2, torch.device("cpu"))
    with pytest.raises(UserError) as caught, RunLock(run_dir, ranks):
        pass
    return str(caught.value)


def test_all_ranks_are_refused_together(holder, tmp_path):
    first, second = run_ranks(ranks_at_a_held_directory, 2, tmp_path / "run")
    assert first == second
    assert f"process {holder.pid}" in first


def test_the_directory_is_held_while_a_run_trains_and_free_after(
    data, tmp_path, monkeypatch, capsys
):
    flags = tiny_flags(data, tmp_path / "run", 3000, checkpoint__every_steps=2)
    command = [sys.executable, "-m", "train", *flags]
    with launch(command, tmp_path / "out") as first:
        first.until((tmp_path / "run/metrics.jsonl").exists, "a step")
        assert run(monkeypatch, flags) == 2
        assert f"process {first.process.pid} on" in capsys.readouterr().err
        assert first.process.poll() is None
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 0
    assert not (tmp_path / "run" / LOCK_FILE).exists()
