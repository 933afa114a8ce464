"""Checkpoints: written behind the training's back, whole or not at all, and doubted when read."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import (
    data_state,
    names,
    open_checkpoints,
    read,
    state,
    truncate,
    value_of,
    write,
)
from distributed import run_ranks
from safetensors.torch import load_file
from tiny_run import run, tiny_flags, write_tiny_data
from torch.distributed.checkpoint import filesystem

from navit_clip.checkpoints import checkpoint
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.training.__main__ import main


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_what_is_loaded(tmp_path, asynchronous):
    checkpoints = open_checkpoints(tmp_path, asynchronous=asynchronous)
    saved, where = state(3), data_state(3)
    checkpoints.save(3, saved, where)
    # The training goes on at once.
    saved["model"]["w"].zero_()
    saved["optimizer"]["state"]["w"]["step"] += 1
    where.batches = 99
    checkpoints.wait()
    assert read(tmp_path) == (3, 3.0, [])


def test_nothing_is_visible_before_it_is_complete_and_one_is_written_at_a_time(
    tmp_path, monkeypatch
):
    go_on, writing = threading.Event(), []
    write_data = filesystem._FileSystemWriter.write_data

    def slow(self, plan, planner):
        writing.append(Path(self.path).name)
        assert go_on.wait(30)
        return write_data(self, plan, planner)

    monkeypatch.setattr(filesystem._FileSystemWriter, "write_data", slow)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, state(1), data_state(1))
    assert checkpoints.latest() is None
    assert names(tmp_path) in ([], ["step-00000001.partial"])
    second = threading.Thread(target=checkpoints.save, args=(2, state(2), data_state(2)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert writing in ([], ["step-00000001.partial"])
    go_on.set()
    second.join(30)
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_all_of_it_is_on_the_disk_before_it_takes_anothers_place(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, Path.rename

    def record(handle):
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        return fsync(handle)

    def moved(path, target):
        done.append(f"{path.name} is now {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", moved)
    write(tmp_path, [4, 8], keep=1)
    place = done.index("step-00000008.partial is now step-00000008")
    written = {path.name for path in (tmp_path / "step-00000008").iterdir()}
    flushed = {Path(name).name for name in done[:place] if name.startswith("step-00000008.partial")}
    assert flushed >= written | {"step-00000008.partial"}
    assert done[place + 1 :] == [".", "step-00000004 is now step-00000004.removed"]


def test_the_last_ones_and_every_nth_are_kept(tmp_path):
    write(tmp_path, range(2, 17, 2), keep=2, every_steps=2, keep_every=6)
    assert names(tmp_path) == [f"step-000000{step:02d}" for step in (6, 12, 14, 16)]


def wider(value):
    return state(value, width=400)


def deeper(value):
    return {**state(value), "model": {**state(value)["model"], "more": torch.zeros(2)}}


def shallower(value):
    return {**state(value), "model": {"w": state(value)["model"]["w"]}}


@pytest.mark.parametrize("other", [wider, deeper, shallower])
def test_another_model_is_no_damage(tmp_path, other):
    write(tmp_path, [4])
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.newest() == 4
    with pytest.raises(UserError, match=r"step-00000004: it is of another model, (w|more|b) has"):
        checkpoints.load(4, other(0))
    assert names(tmp_path) == ["step-00000004"]


def test_state_that_the_checkpoint_lacks_is_named_in_one_line(tmp_path):
    write(tmp_path, [4])
    with pytest.raises(UserError, match=r"ema\.w") as caught:
        open_checkpoints(tmp_path).load(4, {**state(0), "ema": {"w": torch.zeros(3)}})
    assert "\n" not in str(caught.value)


def test_random_numbers_go_on(tmp_path):
    torch.manual_seed(7)
    torch.rand(5)
    write(tmp_path, [4])
    expected = torch.rand(8)
    torch.manual_seed(8)
    read(tmp_path)
    assert torch.equal(torch.rand(8), expected)


class FullDisk:
    """A file on a disk that takes 100 bytes more."""

    def __init__(self, file):
        self.file, self.left = file, 100

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def fill_disk(monkeypatch):
    create_stream = filesystem.FileSystem.create_stream

    @contextmanager
    def full(self, path, mode):
        with create_stream(self, path, mode) as stream:
            yield FullDisk(stream) if "w" in mode else stream

    monkeypatch.setattr(filesystem.FileSystem, "create_stream", full)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_says_so_and_keeps_the_previous_one(tmp_path, monkeypatch, asynchronous):
    write(tmp_path, [4])
    fill_disk(monkeypatch)
    checkpoints = open_checkpoints(tmp_path, asynchronous=asynchronous, keep=1)
    said = "step-00000008: No space left on device; the latest complete one is of step 4"

    def save():
        checkpoints.save(8, state(8), data_state(8))
        checkpoints.wait()

    with pytest.raises(UserError, match=said):
        save()
    assert names(tmp_path) == ["step-00000004"]
    assert read(tmp_path)[:2] == (4, 4.0)


def test_a_failure_is_known_before_the_next_checkpoint(tmp_path, monkeypatch):
    fill_disk(monkeypatch)
    checkpoints = open_checkpoints(tmp_path)
    assert not checkpoints.failed
    checkpoints.save(8, state(8), data_state(8))
    checkpoints._writing.exception(timeout=30)
    assert checkpoints.failed
    with pytest.raises(UserError, match="No space left on device; the latest complete one is none"):
        checkpoints.save(9, state(9), data_state(9))
    checkpoints.close()


def test_a_disk_that_really_is_full(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        with pytest.raises(UserError, match="No space left on device") as caught:
            write(small, range(4, 12), keep=9)
        assert "the latest complete one is of step" in str(caught.value)
        assert read(small)[0] == open_checkpoints(small).latest()
        assert not list(small.glob("*.partial"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


def test_a_run_on_a_full_disk_stops_with_one_line_and_goes_on_later(
    data, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "run"
    flags = tiny_flags(
        data, run_dir, 40, checkpoint__every_steps=4, optim__schedule__kind="constant"
    )
    assert run(monkeypatch, [*flags, "--steps", "4"]) == 0
    model = load_file(run_dir / "model/model.safetensors")
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert run(monkeypatch, flags) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.strip()
    assert "step-00000008: File too large; the latest complete one is of step 4" in line
    assert "\n" not in line
    assert names(run_dir / "checkpoints") == ["step-00000004"]
    usage = shutil.disk_usage(run_dir)
    with monkeypatch.context() as full:  # known before a step is trained for nothing
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
        assert run(full, flags) == 2
        line = capsys.readouterr().err.strip()
        assert "has 0 MB of room, and a checkpoint takes 2 MB: make room" in line
        assert "\n" not in line
        assert run(full, [*flags, "--steps", "4"]) == 0  # needs none
    assert run(monkeypatch, [*flags, "--steps", "4"]) == 0
    again = load_file(run_dir / "model/model.safetensors")
    assert all(torch.equal(model[name], again[name]) for name in model)


def test_the_trainer_goes_on_from_the_one_before_a_damaged_one(data, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    flags = tiny_flags(data, run_dir, 8, checkpoint__every_steps=4)
    run(monkeypatch, flags)
    before = (run_dir / "metrics.jsonl").read_text().count("\n")
    truncate(run_dir / "checkpoints/step-00000008")
    capsys.readouterr()
    assert run(monkeypatch, flags) == 0
    out = capsys.readouterr().out
    assert "step-00000008 is damaged (__0_0.distcp has" in out
    assert "continuing from step 4" in out
    assert (run_dir / "metrics.jsonl").read_text().count("\n") == before


def two_ranks_disagree(path):
    """Several cases in one start of two ranks; returns what each of them saw."""
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"))
    seen = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(checkpoint, "_SHARED_S", 0.5)
        try:
            open_checkpoints(path / f"of-{ranks.rank}", ranks).newest()
        except UserError as error:
            seen["not shared"] = str(error)
    checkpoints = open_checkpoints(path / "full", ranks)
    checkpoints.save(2, state(2), data_state(2))
    checkpoints.wait()
    torch.manual_seed(ranks.rank)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if ranks.rank == 1:
            fill_disk(monkeypatch)
        checkpoints.save(4, state(4), data_state(4))
        try:
            checkpoints.wait()
        except UserError as error:
            seen["full"] = str(error)
    checkpoints.close()
    checkpoints = open_checkpoints(path / "full", ranks)
    for step in (6, 8):
        checkpoints.save(step, state(step), data_state(step + 100 * ranks.rank))
    checkpoints.close()
    drawn = torch.rand(3).tolist()
    if ranks.is_first:
        truncate_one = path / "full/step-00000008/rank-1.json"
        truncate_one.write_text(truncate_one.read_text()[:-1])
    dist.barrier()
    lines, loaded = [], state(-1)
    checkpoints = open_checkpoints(path / "full", ranks)
    step = checkpoints.newest()
    states = checkpoints.load(step, loaded)
    if ranks.is_first:
        checkpoints.tidy(lines.append)
    checkpoints.close()
    seen["damaged"] = (step, value_of(loaded), [data.batches for data in states], lines)
    seen["random"] = torch.rand(3).tolist() == drawn
    return seen


def test_ranks_agree_on_what_failed_and_what_is_damaged(tmp_path):
    first, second = run_ranks(two_ranks_disagree, 2, tmp_path)
    assert "the hosts do not share" in first["not shared"]
    assert first["full"] == second["full"]
    assert "No space left on device; the latest complete one is of step 2" in first["full"]
    assert first["damaged"][:3] == second["damaged"][:3] == (6, 6.0, [6, 106])
    assert "step-00000008 is damaged (rank-1.json has" in first["damaged"][3][0]
    assert second["damaged"][3] == []
    assert first["random"]
    assert second["random"]
    assert names(tmp_path / "full") == ["step-00000006", "step-00000008.damaged"]


def train_rank(flags):
    sys.argv = ["train", *flags]
    main()


def test_two_ranks_then_one_then_three(data, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    # Sharded, so that the weights themselves are cut anew.
    constant = {"parallel__kind": "fsdp", "optim__schedule__kind": "constant", "log__samples": True}
    # Small steps and buffers: no reader comes to its second pass.
    constant |= {
        "data__budget__tokens__image": 64,
        "data__shuffle_buffer": 2,
        "data__look_ahead": 1,
    }

    def flags(steps):
        return tiny_flags(data, run_dir, steps, **constant)

    def exported():
        weights = load_file(run_dir / "model/model.safetensors")
        (run_dir / "model/model.safetensors").unlink()
        return weights

    def same(before, after):
        return all(torch.equal(before[name], after[name]) for name in before)

    run_ranks(train_rank, 2, flags(2), initialise=False)
    two = exported()
    assert run(monkeypatch, flags(2)) == 0
    assert same(two, exported())
    assert run(monkeypatch, flags(3)) == 0
    one = exported()
    assert not same(two, one)
    run_ranks(train_rank, 3, flags(4), initialise=False)
    assert (run_dir / "checkpoints/step-00000004").is_dir()
    assert not same(one, exported())
    # The last step by three ranks; no pair twice, since this is less than one pass.
    logs = sorted(run_dir.glob("samples-*.jsonl"))
    assert len(logs) == 3
    ids = [
        name
        for log in logs
        for line in log.read_text().splitlines()
        for name in json.loads(line)["ids"]
    ]
    assert len(ids) == len(set(ids))
