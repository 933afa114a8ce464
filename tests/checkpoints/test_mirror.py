"""The copy of a run in a store: whole or not at all, and what a new machine goes on from."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import fsspec
import pytest
import torch
from s3_server import Bucket, serve_bucket
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip import retries
from navit_clip.checkpoints.folder import find_damage, saved_steps
from navit_clip.checkpoints.mirror import Mirror
from navit_clip.distributed import Ranks

STEPS, EVERY = 6, 2


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Without the waits between attempts."""
    monkeypatch.setattr(retries, "sleep", lambda seconds: None)
    monkeypatch.setattr(retries, "ATTEMPTS", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("mirrored")
    write_tiny_data(root, train=24, shard_size=24)
    return root


def flags(data, run_dir, mirror="s3://b/run", **options):
    options = {"checkpoint__every_steps": EVERY, "checkpoint__keep": 2, **options}
    if mirror is not None:
        options["checkpoint__mirror"] = mirror
    return tiny_flags(data, run_dir, STEPS, **options)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run without a mirror."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, flags(data, run_dir, mirror=None)) == 0
    return run_dir


@pytest.fixture(scope="module")
def mirrored(data, tmp_path_factory):
    """A run with a mirror, and what that held before each of the requests that it answered."""
    run_dir, states = tmp_path_factory.mktemp("mirrored"), []
    bucket = Bucket(before=lambda *asked: states.append(dict(bucket.objects)))
    with pytest.MonkeyPatch.context() as monkeypatch, serve_bucket(bucket, monkeypatch):
        assert run(monkeypatch, flags(data, run_dir)) == 0
    return run_dir, [*states, dict(bucket.objects)]


def outcome(run_dir):
    """Exported weights, and losses by step."""
    return (run_dir / "model/model.safetensors").read_bytes(), losses(run_dir)


def losses(run_dir):
    """Losses by step, of complete lines."""
    lines = (run_dir / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]


def download(objects, folder):
    """All objects, as a reader would find them."""
    shutil.rmtree(folder, ignore_errors=True)
    for key, content in objects.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "run"


def whole_steps(run_dir):
    """Steps of checkpoints that have their manifest, all of which must be whole."""
    folder = run_dir / "checkpoints"
    found = [s for s in saved_steps(folder) if (folder / f"step-{s:08d}/run.json").exists()]
    assert not any(find_damage(folder / f"step-{step:08d}") for step in found)
    return found


def test_the_mirror_is_the_run_directory(mirrored, undisturbed, tmp_path):
    run_dir, states = mirrored
    there = download(states[-1], tmp_path)
    assert outcome(there) == outcome(run_dir) == outcome(undisturbed)
    assert whole_steps(there) == [STEPS - EVERY, STEPS], "the first is removed as it is locally"
    local = {path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file()}
    assert {path.relative_to(there) for path in there.rglob("*") if path.is_file()} == local


def test_whenever_the_writer_dies_what_looks_whole_is_whole(mirrored, tmp_path):
    _, states = mirrored
    seen = [whole_steps(download(state, tmp_path)) for state in states]
    assert seen[0] == []
    assert seen[-1] == [STEPS - EVERY, STEPS]
    assert all(earlier[-1:] <= later[-1:] for earlier, later in pairwise(seen))


@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_another_machine_goes_on_bit_for_bit(
    fraction, mirrored, data, undisturbed, tmp_path, monkeypatch
):
    """The writer was killed after this fraction of its requests, and its disk is gone."""
    _, states = mirrored
    found = states[int(fraction * len(states))]
    newest = max(whole_steps(download(found, tmp_path / "there")), default=0)
    with serve_bucket(Bucket(dict(found)), monkeypatch) as bucket:
        assert run(monkeypatch, flags(data, tmp_path / "b")) == 0
        assert outcome(tmp_path / "b") == outcome(undisturbed)
        assert max(whole_steps(download(bucket.objects, tmp_path / "there"))) == STEPS
    assert (tmp_path / "b" / "configs" / f"step-{newest:08d}.yaml").exists(), (
        "it went on from there"
    )


@pytest.mark.slow
def test_killed_while_it_uploads_and_its_disk_lost(data, undisturbed, tmp_path, monkeypatch):
    left = 0  # uploads of a checkpoint's files until the kill

    def before(method, key, number):
        nonlocal left
        if method == "PUT" and "step-" in key:
            left -= 1
            if left == 0:
                process.kill()

    command = [sys.executable, "-m", "navit_clip.training", *flags(data, tmp_path / "a")]
    with serve_bucket(Bucket(before=before), monkeypatch) as bucket:
        for uploads in (5, 14, 8):
            left, process = uploads, subprocess.Popen(command)
            assert process.wait() == -signal.SIGKILL
            whole_steps(download(bucket.objects, tmp_path / "there"))
            shutil.rmtree(tmp_path / "a")
        process = subprocess.Popen(command)
        assert process.wait() == 0
    assert outcome(tmp_path / "a") == outcome(undisturbed)


def test_no_step_waits_for_an_upload(data, tmp_path, monkeypatch):
    """The store answers only once the last step is logged; what it reads meanwhile stays."""
    run_dir, waited, seen = tmp_path / "a", threading.Event(), set()

    def before(method, key, number):
        if method == "PUT" and "/checkpoints/" in key and not waited.is_set():
            seen.add(key.split("/")[2])
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                if len(losses(run_dir)) == STEPS:
                    waited.set()
                    break
                time.sleep(0.01)
            (uploading,) = seen
            assert (run_dir / "checkpoints" / uploading / "run.json").exists()

    with serve_bucket(Bucket(before=before), monkeypatch) as bucket:
        assert run(monkeypatch, flags(data, run_dir)) == 0
        assert waited.is_set()
        assert STEPS in whole_steps(download(bucket.objects, tmp_path / "there"))


def test_an_outage_is_logged_and_made_up_for(data, undisturbed, tmp_path, monkeypatch, capfd):
    failed = []

    def before(method, key, number):
        if method == "PUT" and "step-" in key and len(failed) < 2:
            failed.append(key)
            return 503
        return None

    with serve_bucket(Bucket(before=before), monkeypatch) as bucket:
        assert run(monkeypatch, flags(data, tmp_path / "a")) == 0
        there = download(bucket.objects, tmp_path / "there")
    assert outcome(there) == outcome(undisturbed)
    assert re.search("cannot copy the run to s3://b/run: .*; tried", capfd.readouterr().out)


def test_damage_in_the_store_gives_way_to_the_checkpoint_before(
    mirrored, data, undisturbed, tmp_path, monkeypatch, capfd
):
    objects = dict(mirrored[1][-1])
    objects[f"run/checkpoints/step-{STEPS:08d}/model.json"] += b" "
    with serve_bucket(Bucket(objects), monkeypatch) as bucket:
        assert run(monkeypatch, flags(data, tmp_path / "b")) == 0
        assert f"step {STEPS} is damaged there (model.json has" in capfd.readouterr().out
        assert outcome(tmp_path / "b") == outcome(undisturbed)
        there = download(bucket.objects, tmp_path / "there")
        assert whole_steps(there) == [STEPS - EVERY, STEPS]


def test_what_is_damaged_here_is_fetched(mirrored, data, undisturbed, tmp_path, monkeypatch, capfd):
    here = tmp_path / "here"
    shutil.copytree(mirrored[0], here)
    shutil.rmtree(here / "model")
    (here / "metrics.jsonl").write_text((here / "metrics.jsonl").read_text() + "{}\n")
    for step in (STEPS - EVERY, STEPS):
        with (here / f"checkpoints/step-{step:08d}/model.json").open("ab") as file:
            file.write(b" ")
    objects = dict(mirrored[1][-1])
    del objects[f"run/checkpoints/step-{STEPS:08d}/run.json"]  # no longer whole
    with serve_bucket(Bucket(objects), monkeypatch):
        assert run(monkeypatch, flags(data, here)) == 0
    printed = capfd.readouterr().out
    assert f"step {STEPS} is damaged in {here} (model.json has" in printed
    assert f"fetching step {STEPS - EVERY} from s3://b/run" in printed
    assert outcome(here) == outcome(undisturbed)


def test_what_is_to_be_trained_again_is_no_longer_whole(mirrored, tmp_path, monkeypatch):
    with serve_bucket(Bucket(dict(mirrored[1][-1])), monkeypatch) as bucket:
        ranks = Ranks(0, 1, torch.device("cpu"))
        Mirror("s3://b/run", tmp_path, lambda steps: [], ranks).begin(print, STEPS - EVERY)
        assert whole_steps(download(bucket.objects, tmp_path / "there")) == [STEPS - EVERY]


def test_what_is_refused_in_one_line(mirrored, data, undisturbed, tmp_path, monkeypatch, capfd):
    def refused(run_dir, **options):
        assert run(monkeypatch, flags(data, run_dir, **options)) == 2
        return capfd.readouterr().err.strip().split("\n")[-1]

    objects = dict(mirrored[1][-1])
    with serve_bucket(Bucket(dict(objects)), monkeypatch) as bucket:
        # Another configuration: nothing that was fetched stays.
        assert "task.model.embed_dim is 8" in refused(tmp_path / "b", task__model__embed_dim=8)
        assert not (tmp_path / "b").exists()
        assert "the copy of another run than" in refused(undisturbed)
        assert bucket.objects == objects
        assert "no such file or bucket" in refused(tmp_path / "d", mirror="s3://nobody/run")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        assert refused(tmp_path / "d").endswith("s3://b/run: Unable to locate credentials")
        assert not (tmp_path / "d").exists()
    assert "checkpoint.mirror" in refused("s3://b/run")
    assert "Protocol not known: no-such" in refused(tmp_path / "d", mirror="no-such://b/run")


def test_a_mirror_that_another_trainer_took_is_left_to_it(data, tmp_path, monkeypatch, capfd):
    def before(method, key, number):
        if method == "PUT" and key.endswith("run.json"):
            bucket.objects["run/mirror.json"] = b"{}"

    with serve_bucket(Bucket(before=before), monkeypatch) as bucket:
        assert run(monkeypatch, flags(data, tmp_path / "a")) == 2
        assert bucket.objects["run/mirror.json"] == b"{}"
    said = capfd.readouterr()
    assert said.out.count("another trainer writes to s3://b/run; this one no longer does") == 1
    assert "another trainer has taken s3://b/run" in said.err.strip().split("\n")[-1]
