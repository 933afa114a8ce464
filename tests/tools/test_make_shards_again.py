"""Shards made again: the same bytes from parts or after a kill, and verification."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from make_shards_cases import (
    coco,
    content,
    fields,
    make_images,
    records,
    refused,
    run,
)

from navit_clip.tools.make_shards.__main__ import main

# The same bytes, whoever writes them


def test_bytes_depend_on_input_and_seed_alone(tmp_path):
    names = make_images(tmp_path / "images", 20)
    captions = coco(tmp_path, names)

    def make(name: str, *options: object) -> dict[str, bytes]:
        main([*map(str, ("--coco", captions, "--images", tmp_path / "images", "--output",
                         tmp_path / name, "--samples-per-shard", 6, *options))])  # fmt: skip
        return content(tmp_path / name)

    alone = make("alone", "--workers", 1)
    assert make("together", "--workers", 2) == alone
    assert "00003.tar" in alone
    shuffled = make("shuffled", "--workers", 1, "--shuffle-seed", 3)
    assert make("again", "--workers", 1, "--shuffle-seed", 3) == shuffled
    order = [f["file_name"] for f in fields(tmp_path / "shuffled")]
    assert sorted(order) == names
    assert order != names


def test_parts_of_several_machines_merge_to_the_bytes_of_one_run(tmp_path, capsys, monkeypatch):
    names = make_images(tmp_path / "in/ant", 9) + make_images(tmp_path / "in/sea_lion", 5)
    common = ("--classes", tmp_path / "in", "--samples-per-shard", 2, "--shuffle-seed", 0)
    run(*common, "--output", tmp_path / "one")
    parts = [tmp_path / f"part{k}" for k in (3, 1, 2)]
    for part in parts:
        run(*common, "--part", f"{part.name[-1]}/3", "--output", part)
        assert run("--verify", part) == 0
    assert [len([*part.glob("*.tar")]) for part in parts] == [2, 3, 2]
    assert len(names) == 14
    merge = ("--merge", *parts, "--output")
    run(*merge, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "one")
    assert "merged and verified 14 samples in 7 shards" in capsys.readouterr().out

    # Killed in between, and on another disk, where no links can be made.
    again = tmp_path / "again"
    run(*merge, again)
    (again / "00004.tar").unlink()
    (again / ".x.partial").touch()
    monkeypatch.setattr(os, "link", lambda *_: os.stat("/nowhere"))
    run(*merge, again)
    assert content(again) == content(tmp_path / "one")


def test_parts_that_are_not_all_of_one_run_are_refused(tmp_path, capsys):
    make_images(tmp_path / "in/ant", 8)
    folders = {name: tmp_path / name for name in ("a", "b", "other", "half", "whole", "again")}
    common = ("--classes", tmp_path / "in", "--samples-per-shard", 2)
    run(*common, "--output", folders["whole"])
    for name, *words in (
        ("a", "--part", "1/2"),
        ("b", "--part", "2/2"),
        ("again", "--part", "2/2"),
        ("half", "--part", "1/3"),
        ("other", "--part", "2/2", "--shuffle-seed", 1),
    ):
        run(*common, *words, "--output", folders[name])

    def problem(*names: str) -> str:
        return refused(
            capsys, "--merge", *(tmp_path / n for n in names), "--output", tmp_path / "m"
        )

    assert "part 2/2 is missing" in problem("a")
    assert "again are both part 2/2: give one" in problem("a", "b", "again")
    assert "other was made otherwise than" in (line := problem("a", "other"))
    assert "(shuffle_seed was None, now 1)" in line
    assert "(parts was 2, now 3)" in problem("a", "half")
    assert "whole is no part: it was made without --part" in problem("a", "whole")
    assert "no manifest.jsonl" in problem("a", "in")
    manifest = folders["b"] / "manifest.jsonl"
    text = manifest.read_text()
    manifest.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert "b: 1 shards are not made yet, repeat its command" in problem("a", "b")
    manifest.write_text(text)
    shard = folders["b"] / "00003.tar"
    shard.write_bytes(shard.read_bytes().replace(b"ant", b"bee"))
    assert "00003.tar: content differs from its SHA-256: delete it" in problem("a", "b")
    assert "expected such as 3/16" in refused(capsys, *common, "--part", "4/3", "--output", "x")
    assert "part was 1/2, now 2/2" in refused(
        capsys, *common, "--part", "2/2", "--output", folders["a"]
    )


def test_killed_at_any_time_goes_on_to_the_same_bytes(tmp_path):
    images = tmp_path / "images"
    names = make_images(images, 12)
    captions = coco(tmp_path, names)
    stuck = images / names[5]
    kept = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)  # whoever reads it waits for ever
    out = tmp_path / "out"
    words = ["--coco", str(captions), "--images", str(images), "--samples-per-shard", "2"]
    command = [sys.executable, "-m", "navit_clip.tools.make_shards", *words, "--workers", "2"]
    process = subprocess.Popen([*command, "--output", str(out)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (out / "manifest.jsonl").exists() or len(records(out)) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the other shards were not written"
            time.sleep(0.05)
        workers = descendants(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(workers) >= 3  # the server that forks, and two workers
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)

    assert (out / "00002.tar.partial").exists()
    untouched = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(untouched) == 5
    with (out / "manifest.jsonl").open("a") as file:
        file.write('{"shard": "00002.tar", "samp')  # killed while it wrote a line
    stuck.unlink()
    stuck.write_bytes(kept)
    run(*words, "--output", out)
    run(*words, "--output", tmp_path / "undisturbed")
    assert content(out) == content(tmp_path / "undisturbed")
    now = {name: (out / name).stat().st_mtime_ns for name in untouched}
    assert now == untouched


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and those that these started."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("needs Linux's /proc")
    own = [int(word) for word in found.read_text().split()]
    return own + [grandchild for child in own for grandchild in descendants(child)]


def test_a_shard_that_was_deleted_or_cut_is_made_again(tmp_path):
    captions = coco(tmp_path, make_images(tmp_path / "images", 6))
    words = ("--coco", captions, "--images", tmp_path / "images", "--output", tmp_path / "out",
             "--samples-per-shard", 2)  # fmt: skip
    run(*words)
    whole = content(tmp_path / "out")
    (tmp_path / "out" / "00000.tar").unlink()
    (tmp_path / "out" / "00002.tar").write_bytes(whole["00002.tar"][:700])
    run(*words)
    assert content(tmp_path / "out") == whole


def test_other_source_or_settings_are_refused(tmp_path, capsys):
    images = tmp_path / "images"
    names = make_images(images, 4)
    common = ("--images", images, "--output", tmp_path / "out")
    run("--coco", coco(tmp_path, names), *common)
    before = content(tmp_path / "out")
    line = refused(capsys, "--coco", coco(tmp_path, names), *common, "--samples-per-shard", 2)
    assert "samples_per_shard was 1000, now 2" in line
    line = refused(capsys, "--coco", coco(tmp_path, names), *common, "--shuffle-seed", 2)
    assert "shuffle_seed was None, now 2" in line
    line = refused(capsys, "--coco", coco(tmp_path, names, captions=1), *common)
    assert "rows_sha256 was" in line
    assert content(tmp_path / "out") == before


def test_folder_with_other_files_is_refused(tmp_path, capsys):
    captions = coco(tmp_path, make_images(tmp_path / "images", 1))
    line = refused(capsys, "--coco", captions, "--images", tmp_path / "images", "--output",
                   tmp_path)  # fmt: skip
    assert "holds other files" in line


# Verification


def test_verify_names_every_damaged_shard(tmp_path, capsys):
    captions = coco(tmp_path, make_images(tmp_path / "images", 10))
    out = tmp_path / "out"
    run("--coco", captions, "--images", tmp_path / "images", "--output", out,
        "--samples-per-shard", 2)  # fmt: skip
    assert run("--verify", out) == 0
    assert "verified 10 samples in 5 shards" in capsys.readouterr().out

    flipped = bytearray((out / "00001.tar").read_bytes())
    flipped[700] ^= 1
    (out / "00001.tar").write_bytes(flipped)
    (out / "00002.tar").unlink()
    with (out / "00003.tar").open("ab") as file:
        file.write(b"\0")
    (out / "00009.tar").write_bytes(b"")
    assert run("--verify", out) == 1
    found = [line for line in capsys.readouterr().err.splitlines() if "damaged: " in line]
    assert [line.partition("damaged: ")[2].split("/")[-1].split(":")[0] for line in found] == [
        "00001.tar", "00002.tar", "00003.tar", "00009.tar"
    ]  # fmt: skip
    assert "content differs" in found[0]


def test_verify_notices_an_unfinished_folder(tmp_path, capsys):
    captions = coco(tmp_path, make_images(tmp_path / "images", 4))
    out = tmp_path / "out"
    run("--coco", captions, "--images", tmp_path / "images", "--output", out,
        "--samples-per-shard", 2)  # fmt: skip
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[:-1]))
    assert run("--verify", out) == 1
    err = capsys.readouterr().err
    assert "1 shards are not made yet" in err
    assert "00001.tar: not in manifest.jsonl" in err
    assert "no manifest.jsonl" in refused(capsys, "--verify", tmp_path)
