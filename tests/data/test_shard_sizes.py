"""The number of samples in shards: from what stands beside them, or counted."""

import json
import shutil

import pytest
from s3_server import Bucket, serve_bucket
from shard_factory import make_shards

from navit_clip.data import shard_sizes
from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.data.shard_sizes import samples_per_epoch
from navit_clip.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, [3, 5])


def count(*patterns):
    return samples_per_epoch(DataConfig(list(map(str, patterns))))


def test_headers_are_counted_also_of_a_damaged_shard(shards):
    assert count(*shards) == 8
    with shards[1].open("r+b") as file:
        file.truncate(shards[1].stat().st_size // 2)
    assert 3 < count(*shards) < 8
    shards[0].write_bytes(b"no tar")
    shards[1].write_bytes(b"")
    with pytest.raises(UserError, match="there is none in 2 shards"):
        count(*shards)


def manifest(shards):
    lines = [{"version": 2, "shards": 2}]
    lines += [{"shard": s.name, "samples": 10, "bytes": s.stat().st_size} for s in shards]
    return "manifest.jsonl", "\n".join(map(json.dumps, lines)) + '\n{"shard": "cut o'


def sizes(shards):
    return "sizes.json", json.dumps({shard.name: 10 for shard in shards})


@pytest.mark.parametrize("record", [manifest, sizes])
def test_a_record_beside_the_shards_is_believed(shards, record, monkeypatch):
    monkeypatch.setattr(shard_sizes, "_MOST_COUNTED", 0)
    name, text = record(shards)
    (shards[0].parent / name).write_text(text)
    assert count(*shards) == 20
    assert count(shards[0]) == 10


@pytest.mark.parametrize("record", [manifest, sizes])
def test_a_record_in_a_store_is_believed(shards, record, monkeypatch):
    name, text = record(shards)
    objects = {f"a/{shard.name}": shard.read_bytes() for shard in shards}
    with serve_bucket(Bucket(objects), monkeypatch) as bucket:
        with pytest.raises(UserError, match=r"nothing beside s3://b/a/00000.tar says"):
            count("s3://b/a")
        bucket.objects[f"a/{name}"] = text.encode()
        assert count("s3://b/a") == 20
        bucket.objects["a/00001.tar"] += b"x"
        if record is manifest:
            with pytest.raises(UserError, match=r"nothing beside s3://b/a/00001.tar says"):
                count("s3://b/a")


def test_a_record_of_each_shard_is_believed(shards, monkeypatch):
    for shard in shards:
        stats = {"count": 12, "successes": 10}
        shard.with_name(f"{shard.stem}_stats.json").write_text(json.dumps(stats))
    monkeypatch.setattr(shard_sizes, "_MOST_COUNTED", 0)
    assert count(*shards) == 20


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.jsonl", '{}\n{"shard": "SHARD", "samples": 10, "bytes": 7}\n'),
        ("manifest.jsonl", '{}\n[1]\n{"shard": 3, "samples": "x"}\n' + "[" * 100_000),
        ("sizes.json", '{"SHARD": "many"}'),
        ("sizes.json", "[]"),
        ("manifest.jsonl", "\udcff"),
    ],
)
def test_a_record_of_something_else_is_not(shards, name, text):
    path = shards[0].parent / name
    path.write_bytes(text.replace("SHARD", shards[0].name).encode(errors="surrogateescape"))
    assert count(*shards) == 8


def test_a_mixture_is_all_its_datasets(shards):
    one, both = (DatasetConfig([str(s) for s in part], 2.0) for part in (shards[:1], shards))
    assert samples_per_epoch(DataConfig(mix={"a": one, "b": both})) == 3 + 8
    assert samples_per_epoch(DataConfig(str(shards[0]), samples=1e3)) == 1000


def test_what_would_take_long_to_count_is_to_be_given(shards, monkeypatch):
    with pytest.raises(UserError, match=r"https://host/0\.tar .*give data\.samples"):
        count(shards[0], "https://user:secret@host/0.tar?token=secret")
    monkeypatch.setattr(shard_sizes, "_MOST_COUNTED", 1)
    with pytest.raises(UserError, match=r"give data\.samples"):
        count(*shards)
    (shards[0].parent / "more").mkdir()
    shutil.move(shards[1], shards[0].parent / "more")
    assert count(shards[0]) == 3
