"""Fingerprints of shards: other ones of the same names are noticed, wherever they come from."""

from __future__ import annotations

import json
import shutil

import pytest
from shard_factory import make_shards
from web_server import Site, serve

from navit_clip.data import fingerprint
from navit_clip.data.config import DataConfig
from navit_clip.data.fingerprint import difference, fingerprints
from navit_clip.data.mixture import Mixture


def of(*patterns):
    return fingerprints(Mixture.find(DataConfig(train=list(patterns), allow_commands=True)))


def reached(root, way):
    """Fingerprints of the shards of a folder by one of several ways."""
    if way == "files":
        return of(str(root))
    if way == "commands":
        return of(*(f"pipe:cat {path}" for path in sorted(root.glob("*.tar"))))
    files = {path.name: path.read_bytes() for path in root.glob("*.tar")}
    with serve(Site(files, ranges=way == "ranges")) as site:
        return of(*(f"{site.url}/{name}?signature=1" for name in sorted(files)))


WAYS = ["files", "ranges", "whole", "commands"]


@pytest.mark.parametrize("way", WAYS)
def test_other_shards_are_noticed_and_the_same_elsewhere_are_not(tmp_path, way):
    make_shards(tmp_path / "one", [20, 20])
    before = reached(tmp_path / "one", way)
    assert len(before) == 2
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "one", copy)
    assert difference(json.loads(json.dumps(before)), reached(copy, way)) is None
    path = sorted(copy.glob("*.tar"))[1]
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    assert difference(before, reached(copy, way)) == f"{path.stem} has other first bytes"
    if way != "commands":  # which would have to be run to the end
        path.write_bytes(whole + bytes(10240))
        assert "bytes, not" in difference(before, reached(copy, way))
    if way in ("files", "ranges"):
        path.write_bytes(whole[:-12000] + b"xy" + whole[-11998:])
        assert difference(before, reached(copy, way)) == f"{path.stem} has other last bytes"


@pytest.mark.parametrize("one", WAYS)
@pytest.mark.parametrize("other", WAYS)
def test_the_same_shards_by_another_way_are_the_same(tmp_path, one, other):
    make_shards(tmp_path, [3, 4])
    assert difference(reached(tmp_path, one), reached(tmp_path, other)) is None


def test_what_cannot_be_read_now_is_no_other_shard(tmp_path):
    shards = make_shards(tmp_path / "one", [3, 4])
    before = of(str(tmp_path / "one"))
    mixture = Mixture.find(DataConfig(train=str(tmp_path / "one")))
    shards[0].unlink()
    assert difference(before, fingerprints(mixture)) is None
    dead = "http://127.0.0.1:9/00000.tar"
    assert difference(before, of(dead, "pipe:exit 3 # 00001.tar")) is None


def test_of_many_shards_all_sizes_and_some_contents_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_LOCAL", 3)
    shards = make_shards(tmp_path, [2] * 7)
    found = of(str(tmp_path))
    assert [found[path.stem][0] for path in shards] == [path.stat().st_size for path in shards]
    assert sum(one[1] is not None for one in found.values()) == 3


def test_a_manifest_tells_more_and_older_checkpoints_are_still_compared(tmp_path):
    shards = make_shards(tmp_path, [2, 3])
    before = of(str(tmp_path))
    records = [
        {"shard": path.name, "samples": n, "bytes": path.stat().st_size, "sha256": str(n)}
        for path, n in zip(shards, (2, 3), strict=True)
    ]

    def write(text="\n", **changed):
        lines = [{"version": 2}, records[0], {**records[1], **changed}]
        (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + text)
        return of(str(tmp_path))

    now = write()
    assert [found[3:] for found in now.values()] == [(2, "2"), (3, "3")]
    name = shards[1].stem
    assert difference(now, write(samples=4)) == f"{name} has 4 samples, not 3"
    assert difference(now, write(sha256="5")) == f"{name} has other content"
    # Of other files; damaged.
    for other in (write(samples=4, bytes=1), write("\n{\n")):
        assert difference(now, other) is None
    for one, other in ((before, now), (now, before)):
        assert difference(one, other) is None
    shards[1].write_bytes(shards[1].read_bytes() + bytes(10240))
    assert "bytes, not" in difference(before, of(str(tmp_path)))
