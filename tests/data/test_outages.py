"""Shards out of reach for a while lose nothing; what stays away ends the run in one line."""

from __future__ import annotations

import errno
import io
import runpy
import tarfile
from collections import Counter

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from navit_clip import errors, retries
from navit_clip.data import dataset_reader, shards
from navit_clip.data.builders.base import Origin
from navit_clip.data.config import DataConfig
from navit_clip.data.dataset_reader import DatasetReader, read_again
from navit_clip.data.mixture import Mixture
from navit_clip.data.order import Cursor, ShardOrder
from navit_clip.data.skip_log import SkipLog
from navit_clip.errors import OutageError, may_pass

SHARDS, SAMPLES = 12, 20
EVERYTHING = {(shard, sample) for shard in range(SHARDS) for sample in range(SAMPLES)}


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self, monkeypatch):
        self.now, self.sleeps = 0.0, []
        monkeypatch.setattr(retries, "sleep", self.sleep)
        monkeypatch.setattr(retries, "monotonic", lambda: self.now)

    def sleep(self, seconds):
        self.now += seconds
        self.sleeps.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as written:
        for index in range(SAMPLES):
            shards.add_member(written, f"{index:03d}.txt", b"a caption")
    return file.getvalue()


@pytest.fixture
def stored():
    """The pattern of shards in a store."""
    store = fsspec.filesystem("memory")
    for number in range(SHARDS):
        store.pipe_file(f"/b/{number:03d}.tar", tar())
    yield f"memory://b/{{000..{SHARDS - 1:03d}}}.tar"
    store.store.clear()


@pytest.fixture
def local(tmp_path):
    for number in range(SHARDS):
        (tmp_path / f"{number:03d}.tar").write_bytes(tar())
    return str(tmp_path)


def one_epoch(pattern, each_s=0.3, clock=None):
    """What a reader reads of an epoch, and what it skips."""
    mixture, skips = Mixture.find(DataConfig(train=pattern)), SkipLog(10)
    reader = DatasetReader(mixture, ShardOrder(mixture.datasets[0], 0, 0, 1), Cursor(0), skips)
    seen = Counter()
    for raw, origin in reader:
        if origin.epoch:
            break
        seen[origin.shard, raw.index] += 1
        if clock is not None:
            clock.now += each_s
    assert set(seen.values()) == {1}
    return set(seen), skips.take()


def failing(monkeypatch, clock, begins_s, minutes):
    """The store's answers for the objects fail for a while."""
    answer = MemoryFileSystem.info

    def info(self, path, **options):
        if begins_s <= clock.now < begins_s + 60 * minutes:
            raise OSError("503 SlowDown: please reduce your request rate")
        return answer(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", info)


@pytest.mark.parametrize(("minutes", "begins_s"), [(1, 0.0), (7, 14.0), (4, 50.0)])
def test_an_outage_of_minutes_loses_nothing(minutes, begins_s, stored, clock, monkeypatch):
    failing(monkeypatch, clock, begins_s, minutes)
    seen, skipped = one_epoch(stored, clock=clock)
    assert seen == EVERYTHING
    assert skipped == (Counter(), ())
    assert clock.now > begins_s + 60 * minutes


def test_a_store_that_stays_out_of_reach_ends_the_run_before_it_counts_as_stalled(
    stored, clock, monkeypatch
):
    failing(monkeypatch, clock, 20.0, 60)
    with pytest.raises(
        OutageError, match=r"^shards are out of reach, the last one memory://b/.*503"
    ):
        one_epoch(stored, clock=clock)
    assert 6 * 60 < clock.now < 15 * 60


def failing_disk(monkeypatch, number, times, code=errno.EIO):
    """The disk fails so many times to open a shard, all shards for None."""
    opened, left = shards._open, [times]

    def open_(path):
        if left[0] and (number is None or path.endswith(f"{number:03d}.tar")):
            left[0] -= 1
            raise OSError(code, "Input/output error")
        return opened(path)

    monkeypatch.setattr(shards, "_open", open_)


@pytest.mark.parametrize("number", [None, 3])
@pytest.mark.parametrize("times", [1, len(retries.OUTAGE_WAITS_S)])
def test_a_disk_that_fails_for_a_moment_loses_nothing(number, times, local, clock, monkeypatch):
    failing_disk(monkeypatch, number, times)
    seen, skipped = one_epoch(local)
    assert (seen, skipped) == (EVERYTHING, (Counter(), ()))
    assert len(clock.sleeps) == times


def test_one_bad_place_on_a_disk_is_skipped_in_the_end(local, clock, monkeypatch):
    failing_disk(monkeypatch, 3, -1)
    seen, (counts, lines) = one_epoch(local)
    assert seen == {(shard, sample) for shard, sample in EVERYTHING if shard != 3}
    assert counts == {"bad_shard": 1}
    assert "003.tar: [Errno 5] Input/output error" in lines[0]


def test_a_disk_that_stays_away_ends_the_run(local, clock, monkeypatch):
    failing_disk(monkeypatch, None, -1)
    with pytest.raises(OutageError, match=r"^shards are out of reach"):
        one_epoch(local)


def test_a_shard_behind_one_that_was_given_up_is_waited_for_once_it_has_given_samples(
    local, clock, monkeypatch
):
    down, blips = [], []

    def read(path, wanted, name):
        if not down or path == down[0]:
            down[:] = [path]  # the first one, always
            raise shards.ShardError(path) from OSError(errno.EIO, "Input/output error")
        for raw in shards.read_shard(path, wanted, name):
            if raw.index == 5 and not blips:
                blips.append(path)
                raise shards.ShardError(path) from OSError(errno.EIO, "Input/output error")
            yield raw

    monkeypatch.setattr(dataset_reader, "read_shard", read)
    seen, (counts, _) = one_epoch(local)
    assert len(blips) == 1
    assert len(seen) == len(EVERYTHING) - SAMPLES
    assert counts.keys() == {"bad_shard"}


def test_a_server_that_asks_for_long_again_and_again_is_given_up(clock):
    attempts = retries.Retries("https://h/0.tar")
    for _ in range(2):
        attempts.failed("HTTP 429", asked_s=280.0)
    with pytest.raises(retries.GaveUpError, match="after 3 attempts"):
        attempts.failed("HTTP 429", asked_s=280.0)
    assert clock.now < 600


def test_attempts_that_each_take_long_are_not_taken_up_again(stored, clock, monkeypatch):
    def info(self, path, **options):
        clock.now += 60.0  # nothing comes
        raise TimeoutError("no answer for 60 s")

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    with pytest.raises(OutageError, match=r"^shards are out of reach"):
        one_epoch(stored, clock=clock)
    assert clock.now < 1800


def test_other_systems_know_fewer_errors(monkeypatch):
    for name in ("EREMOTEIO", "ECOMM", "ENOLINK"):
        monkeypatch.delattr(errno, name)
    assert runpy.run_path(errors.__file__)["may_pass"](OSError(errno.EIO, "…"))


def test_what_is_gone_is_not_waited_for(local, clock, monkeypatch):
    failing_disk(monkeypatch, 3, -1, errno.ENOENT)
    seen, (counts, _) = one_epoch(local)
    assert len(seen) == len(EVERYTHING) - SAMPLES
    assert counts == {"bad_shard": 1}
    assert clock.sleeps == []


def test_what_had_been_read_ahead_is_waited_for(stored, clock, monkeypatch):
    failing(monkeypatch, clock, 0.0, 5)
    mixture = Mixture.find(DataConfig(train=stored))
    origins = [Origin(0, 2, 5, 0), Origin(0, 7, 0, 0)]
    assert [raw.index for raw in read_again(mixture, origins).values()] == [5, 0]
    failing(monkeypatch, clock, clock.now, 60)
    with pytest.raises(OutageError, match="had read samples of it ahead"):
        read_again(mixture, origins)


@pytest.mark.parametrize(
    "name",
    [
        "EIO",
        "EREMOTEIO",
        "ESTALE",
        "ETIMEDOUT",
        "ENODEV",
        "ESHUTDOWN",
        "ENOTCONN",
        "ECONNRESET",
        "EHOSTUNREACH",
        "ENETDOWN",
    ],
)
def test_what_network_file_systems_say_may_pass(name):
    assert may_pass(OSError(getattr(errno, name), "…"))


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EISDIR", "ENOTDIR", "EROFS"])
def test_what_a_user_has_to_mend_does_not(name):
    assert not may_pass(OSError(getattr(errno, name), "…"))
