"""Shards in an object store that misbehaves, and on the Hub: the same samples as from disk."""

from __future__ import annotations

import os
import random
import re
from contextlib import closing

import huggingface_hub
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from loader_cases import content, pair_pipeline, samples_and_error, take
from s3_server import SECRET, Bucket, serve_bucket
from shard_factory import make_shards, write_shard
from web_server import Site, serve

from navit_clip import retries, stores
from navit_clip.data import patterns, store
from navit_clip.data.fingerprint import fingerprints
from navit_clip.data.patterns import expand_shards
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.data.store import StoreStream
from navit_clip.errors import OutageError, UserError, printable
from navit_clip.retries import RemoteError, Retries
from navit_clip.stores import try_again


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between attempts, which the tests do not sit through."""
    waits: list[float] = []
    monkeypatch.setattr(retries, "sleep", waits.append)
    return waits


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    (path,) = make_shards(tmp_path_factory.mktemp("stored"), [60])
    return path


@pytest.fixture
def small_ranges(monkeypatch):
    """Ranges so small that a shard takes several."""
    monkeypatch.setattr(store, "FIRST_RANGE", 1 << 13)
    monkeypatch.setattr(store, "LARGEST_RANGE", 1 << 15)


def every_third(status):
    return lambda method, key, number: status if number % 3 == 1 else None


BUCKETS = {
    "well behaved": {},
    "503 in between": {"before": every_third(503)},
    "cut at random": {"cut": lambda number: random.Random(number).randrange(100_000)},
    "stalls": {"stall": lambda number: number in (3, 4)},
}


@pytest.mark.parametrize("name", BUCKETS)
def test_the_same_from_a_store_as_from_disk(name, shard, small_ranges, monkeypatch):
    monkeypatch.setattr(retries, "READ_TIMEOUT_S", 1.0 if name == "stalls" else 20.0)
    data = shard.read_bytes()
    with serve_bucket(Bucket({"a/00000.tar": data}, **BUCKETS[name]), monkeypatch) as bucket:
        assert samples_and_error("s3://b/a/00000.tar") == samples_and_error(shard)
        assert samples_and_error("s3://b/a/00000.tar", {3, 50}) == samples_and_error(shard, {3, 50})
        assert bucket.ranges("a/00000.tar") > 6
        with closing(StoreStream("s3://b/a/00000.tar")) as stream:
            assert stream.read(len(data) + 1) == data
            assert stream.read(1) == b""


def test_a_stream_reads_seeks_and_tells_as_a_file_does(shard, small_ranges):
    size, rng = shard.stat().st_size, random.Random(0)
    with closing(StoreStream(f"file://{shard}")) as stream, open(shard, "rb") as file:
        while file.tell() < size:
            ahead = file.tell() + rng.choice((0, 0, -100, 3000, 40_000))
            if file.tell() + 100 < size:
                for each in (stream, file):
                    each.seek(max(0, min(ahead, size)))
            wanted = rng.choice((512, 700, 5000))
            assert stream.read(wanted) == file.read(wanted)
            assert stream.tell() == file.tell()


def test_skipped_payload_is_not_downloaded(small_ranges, tmp_path, monkeypatch):
    noise = os.urandom(100_000)
    path = write_shard(
        tmp_path / "00000.tar", {str(i): {"jpg": noise, "txt": b"x"} for i in range(8)}
    )
    with serve_bucket(Bucket({"00000.tar": path.read_bytes()}), monkeypatch) as bucket:
        assert samples_and_error("s3://b/00000.tar", {6}) == samples_and_error(path, {6})
        assert bucket.sent < path.stat().st_size / 2


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_shard_replaced_in_between_is_an_error(size, shard, small_ranges, monkeypatch):
    everything, _ = samples_and_error(shard)
    data = shard.read_bytes()

    def replace(method, key, number):
        if number == 5:
            bucket.objects[key] = bytes(len(data) - (512 if size == "other" else 0))

    bucket = Bucket({"00000.tar": data}, before=replace)
    with serve_bucket(bucket, monkeypatch):
        samples, error = samples_and_error("s3://b/00000.tar")
    assert error == "it was replaced while it was read"
    assert 0 < len(samples) < 60
    assert samples == everything[: len(samples)]


@pytest.mark.parametrize(
    ("befalls", "reason", "attempts"),
    [
        ({"before": lambda *asked: 503}, "Service Unavailable, after 4 attempts", 4),
        ({"before": lambda *asked: 403}, "Forbidden|Access Denied", 1),
        ({"stall": lambda number: True}, "no answer for 0.2 s, after 4 attempts", 8),
    ],
)
def test_what_does_not_pass_is_one_line(
    befalls, reason, attempts, shard, small_ranges, monkeypatch, capfd
):
    monkeypatch.setattr(retries, "READ_TIMEOUT_S", 0.2 if "stall" in befalls else 20)
    monkeypatch.setattr(retries, "ATTEMPTS", 4)
    with serve_bucket(Bucket({"00000.tar": shard.read_bytes()}, **befalls), monkeypatch) as bucket:
        samples, error = samples_and_error("s3://b/00000.tar")
        assert len(bucket.asked) <= attempts
    assert samples == []
    assert re.search(reason, error), error
    assert "\n" not in error
    assert SECRET not in error + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("error", "outage"), [(TimeoutError("no answer"), True), (PermissionError("Forbidden"), False)]
)
def test_a_store_that_lists_nothing_for_now_is_an_outage(error, outage, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(MemoryFileSystem, "glob", fail)
    with pytest.raises(UserError, match=f"memory://b/.*: {error}") as caught:
        expand_shards(["memory://b/*.tar"])
    assert isinstance(caught.value, OutageError) == outage


class NoCredentialsError(Exception):
    pass


class HttpError(Exception):
    code = 401


class HfUriError(ValueError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("b/0.tar"),
        PermissionError("Access Denied"),
        NoCredentialsError("Unable to locate credentials"),
        HfUriError("Invalid HF URI 'hf://datasets/x/*.tar'"),
        OSError("Forbidden: https://host/b/0.tar\nno access"),  # as gcsfs has them
        HttpError("Anonymous caller does not have storage.objects.get access, 401"),
    ],
)
def test_what_another_attempt_would_not_change(error, waits):
    with pytest.raises(RemoteError) as raised:
        try_again(Retries("gs://b/0.tar"), error)
    assert "\n" not in str(raised.value)
    assert waits == []


def test_a_bucket_that_vanishes(shard, small_ranges, monkeypatch):
    everything, _ = samples_and_error(shard)
    bucket = Bucket({"00000.tar": shard.read_bytes()})
    with serve_bucket(bucket, monkeypatch):
        for sample in (reading := read_shard("s3://b/00000.tar")):
            assert sample == everything[sample.index]
            if sample.index == 3:
                bucket.exists = False
                break
        with pytest.raises(ShardError, match=r"s3://b/00000.tar: no such file or bucket \(.*\)$"):
            list(reading)


def test_without_credentials(shard, monkeypatch):
    with serve_bucket(Bucket({"00000.tar": shard.read_bytes()}), monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        assert samples_and_error("s3://b/00000.tar") == ([], "Unable to locate credentials")
        with pytest.raises(UserError, match=r"^s3://b/\*.tar: Unable to locate credentials$"):
            expand_shards(["s3://b/*.tar"])


def test_patterns(monkeypatch):
    objects = {f"{folder}/{name}": b"" for folder in "ac" for name in ("0.tar", "1.tar", "x.txt")}
    with serve_bucket(Bucket(objects), monkeypatch) as bucket:
        for pattern, found in {
            "s3://b/a": ["a/0.tar", "a/1.tar"],
            "s3://b/a/": ["a/0.tar", "a/1.tar"],
            "s3://b/?/1.tar": ["a/1.tar", "c/1.tar"],
            "s3://b/{c,a}/*.tar": ["c/0.tar", "c/1.tar", "a/0.tar", "a/1.tar"],
            "s3://b/a/{1..2}.tar": ["a/1.tar", "a/2.tar"],
        }.items():
            assert expand_shards([pattern]) == [f"s3://b/{key}" for key in found]
        for pattern in ("s3://b/z", "s3://b/z*.tar", "s3://nobody/*.tar"):
            with pytest.raises(UserError, match=f"^no shard found at {re.escape(pattern)}: check"):
                expand_shards([pattern])
        bucket.exists = False
        with pytest.raises(UserError, match=r"^no shard found at s3://b/a: "):
            expand_shards(["s3://b/a"])


def test_addresses_that_nothing_reads(monkeypatch):
    with pytest.raises(UserError, match=r"^no-such://b/0.tar: Protocol not known: no-such$"):
        expand_shards(["no-such://b/0.tar"])
    with pytest.raises(UserError, match=r"^hf://datasets/0.tar: expected such as hf://datasets/"):
        expand_shards(["hf://datasets/0.tar"])

    def missing(*args, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(stores, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"need another package: pip install 'navit-clip\[s3\]'$"):
        expand_shards(["s3://b/00000.tar"])
    with pytest.raises(UserError, match=r"^sftp:// addresses need another package: Install"):
        expand_shards(["sftp://b/0.tar"])


def test_a_store_is_opened_once_for_a_bucket(monkeypatch):
    opened, hubs = [], []
    monkeypatch.setattr(patterns, "open_store", lambda name: opened.append(name))
    monkeypatch.setattr(patterns, "web_file", lambda name: hubs.append(name))
    names = [f"s3://{bucket}/{number}.tar" for bucket in "ab" for number in range(100)]
    assert expand_shards(names) == names
    assert opened == ["s3://a/0.tar", "s3://b/0.tar"]
    names = [f"hf://datasets/o/{name}/{number}.tar" for name in "nm" for number in range(100)]
    hubs.clear()
    assert expand_shards(names) == names
    assert hubs == ["hf://datasets/o/n/0.tar", "hf://datasets/o/m/0.tar"]


def test_a_repository_that_cannot_be(monkeypatch):
    with pytest.raises(UserError, match=r"^hf://datasets/o/n--m/0.tar: .*'o/n--m'"):
        expand_shards(["hf://datasets/o/n/0.tar", "hf://datasets/o/n--m/0.tar"])
    with pytest.raises(UserError, match=r"^hf://datasets/0.tar: expected such as hf://"):
        expand_shards(["hf://datasets/o/n/0.tar", "hf://datasets/0.tar"])


def test_passwords_are_not_printed():
    assert printable("sftp://user:word@host/a@b.tar?x") == "sftp://host/a@b.tar?x"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_by_worker_processes(workers, tokenizer, tmp_path, monkeypatch):
    """The workers are forked from a process whose own connection and event loop are in use."""
    paths = make_shards(tmp_path, [17, 30, 3, 22])
    objects = {path.name: path.read_bytes() for path in paths}
    from_disk = take(pair_pipeline(paths, tokenizer, workers=workers), 30)
    with serve_bucket(Bucket(objects, before=every_third(503)), monkeypatch):
        shards = expand_shards(["s3://b/*.tar"])
        pipeline = pair_pipeline(shards, tokenizer, workers=workers)
        assert len(fingerprints(pipeline.mixture)) <= 4
        from_store = take(pipeline, 30)
        assert expand_shards(["s3://b/*.tar"]) == shards
    for ours, theirs in zip(from_store, from_disk, strict=True):
        assert content(ours) == content(theirs)


def test_another_shard_of_the_same_name_is_noticed(shard, tokenizer, monkeypatch):
    data = shard.read_bytes()
    with serve_bucket(Bucket({"00000.tar": data}), monkeypatch) as bucket:
        mixture = pair_pipeline(["s3://b/00000.tar"], tokenizer).mixture
        from_disk = pair_pipeline([f"file://{shard}"], tokenizer).mixture
        (before,), (same,) = fingerprints(mixture).values(), fingerprints(from_disk).values()
        assert before == same
        bucket.objects["00000.tar"] = data[:-600] + b"x" + data[-599:]
        assert fingerprints(mixture)["00000"][:2] == before[:2]
        assert fingerprints(mixture)["00000"] != before


def test_a_shard_on_the_hub(shard, monkeypatch):
    """By its web server; the token goes to the Hub and not to where that sends on."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    site = Site({"datasets/o/n/resolve/v1/a/00000.tar": shard.read_bytes()}, redirect=True)
    with serve(site):
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{site.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        site.moved_to = site.url.replace("127.0.0.1", "localhost")
        assert samples_and_error("hf://datasets/o/n@v1/a/00000.tar") == samples_and_error(shard)
        assert site.tokens == ["Bearer hf_secret", None]
        assert samples_and_error("hf://datasets/o/n/0.tar") == ([], "HTTP 404 Not Found")
