"""Shards from a web server that misbehaves: the same samples as from disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import socket
import threading
import time
from contextlib import closing

import pytest
from loader_cases import content, pair_pipeline, samples_and_error, take
from shard_factory import make_shards, write_shard
from web_server import Site, serve

from navit_clip import retries
from navit_clip.data import http
from navit_clip.data.http import HttpStream
from navit_clip.data.loader import load_batches
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.data.waiting import WaitBoard
from navit_clip.training.watchdog import Watchdog


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between attempts, which the tests do not sit through."""
    waits: list[float] = []
    monkeypatch.setattr(retries, "sleep", waits.append)
    return waits


def random_cuts(seed, most):
    rng = random.Random(seed)
    return lambda number: rng.randrange(most)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    (path,) = make_shards(tmp_path_factory.mktemp("remote"), [60])
    return path


# From a web server


SITES = {
    "well behaved": {},
    "chunked": {"chunked": True},
    "without a length": {"length": False},
    "without ranges or a tag": {"ranges": False, "headers": {}},
    "redirected": {"redirect": True},
    "503 and 429 before it answers": {"statuses": [503, 503, 429, 500]},
    "cut at random": {"cut": random_cuts(0, 30_000)},
    "cut at random, after few bytes": {"cut": random_cuts(1, 9_000)},
    "reset at random": {"cut": random_cuts(2, 30_000), "reset": True},
    "cut, chunked": {"cut": random_cuts(3, 30_000), "chunked": True},
    "cut, without a length": {"cut": random_cuts(4, 30_000), "length": False},
    "cut, without a tag": {"cut": random_cuts(5, 30_000), "headers": {}},
    "cut, with a weak tag": {"cut": random_cuts(6, 30_000), "headers": {"ETag": 'W/"1"'}},
    "cut, redirected": {"cut": random_cuts(7, 30_000), "redirect": True},
    "cut, without ranges": {
        "cut": lambda number: None if number > 4 else 15_000 * (number + 1),
        "ranges": False,
    },
    "cut, without ranges or a length": {
        "cut": lambda number: None if number > 4 else 15_000 * (number + 1),
        "ranges": False,
        "length": False,
    },
    "stalls": {"stall": lambda number: None if number > 2 else 20_000 * number},
}


@pytest.mark.parametrize("name", SITES)
def test_the_same_from_a_server_as_from_disk(name, shard, monkeypatch):
    monkeypatch.setattr(retries, "READ_TIMEOUT_S", 0.2 if name == "stalls" else 5.0)
    data = shard.read_bytes()
    with serve(Site({"a/00000.tar": data}, **SITES[name])) as site:
        url = f"{site.url}/a/00000.tar?signature=x"
        assert samples_and_error(url) == samples_and_error(shard)
        if "cut" in name:
            assert len(site.asked) > 3
        with closing(HttpStream(url)) as stream:
            assert stream.read(len(data) + 1) == data
            assert stream.read(1) == b""


def test_a_stream_reads_seeks_and_tells_as_a_file_does(shard):
    data = shard.read_bytes()
    rng = random.Random(0)
    with (
        serve(Site({"0.tar": data}, cut=random_cuts(8, 50_000))) as site,
        closing(HttpStream(f"{site.url}/0.tar")) as stream,
        open(shard, "rb") as file,
    ):
        while file.tell() < len(data):
            if rng.random() < 0.3:
                ahead = file.tell() + rng.randrange(3000)
            elif rng.random() < 0.3:
                ahead = max(0, file.tell() - rng.randrange(200))
            else:
                ahead = file.tell()
            size = rng.choice((512, 700, 5000))
            for each in (stream, file):
                each.seek(min(ahead, len(data)))
            assert stream.read(size) == file.read(size)
            assert stream.tell() == file.tell()


def test_half_a_million_bytes_back_is_refused():
    with (
        serve(Site({"0.tar": bytes(500_000)})) as site,
        closing(HttpStream(f"{site.url}/0.tar")) as stream,
    ):
        stream.read(500_000)
        with pytest.raises(OSError, match="go back"):
            stream.seek(0)


@pytest.mark.parametrize("ranges", [True, False])
def test_skipped_payload_is_not_downloaded(ranges, tmp_path):
    """One request per far jump where the server can, one long body where it cannot."""
    noise = os.urandom(3 << 20)
    path = write_shard(tmp_path / "0.tar", {str(i): {"jpg": noise, "txt": b"x"} for i in range(8)})
    size = path.stat().st_size
    with serve(Site({"0.tar": path.read_bytes()}, ranges=ranges)) as site:
        assert samples_and_error(f"{site.url}/0.tar", {6}) == samples_and_error(path, {6})
        if ranges:
            assert len(site.asked) == 1 + 7  # all but the wanted one are jumped over
            assert site.asked == sorted(site.asked)
            assert site.sent < size / 2
        else:
            assert len(site.asked) == 1


def test_short_gaps_are_read_over(shard):
    with serve(Site({"0.tar": shard.read_bytes()})) as site:
        samples_and_error(f"{site.url}/0.tar", {50})
        assert len(site.asked) == 1


def test_a_reader_closed_early_lets_go_of_the_connection(shard):
    with serve(Site({"0.tar": shard.read_bytes()})) as site:
        samples = read_shard(f"{site.url}/0.tar")
        next(samples)
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
        samples.close()
        if before is not None:
            assert len(os.listdir("/proc/self/fd")) < before


# What cannot be mended


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_not_tried_again(status, waits):
    with serve(Site({}, statuses=[status] * 99)) as site:
        samples, error = samples_and_error(f"{site.url}/0.tar")
        assert samples == []
        assert error.startswith(f"HTTP {status} ")
        assert len(site.asked) == 1
        assert waits == []


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ({"statuses": [503] * 99}, "HTTP 503 Service Unavailable"),
        ({"cut": lambda number: 0}, "Connection broken"),
        ({"cut": lambda number: 0, "reset": True}, "Connection"),
        ({"stall": lambda number: 0}, "Read timed out"),
        ({"cut": lambda number: 9_000, "ranges": False}, "Connection broken"),
    ],
)
def test_gives_up_after_attempts_without_progress(site, reason, shard, monkeypatch):
    monkeypatch.setattr(retries, "READ_TIMEOUT_S", 0.05)
    monkeypatch.setattr(retries, "ATTEMPTS", 4)
    with serve(Site({"0.tar": shard.read_bytes()}, **site)) as running:
        url = f"{running.url}/0.tar"
        with pytest.raises(ShardError) as raised:
            list(read_shard(f"{url}?token=secret"))
        message = str(raised.value)
        assert message.startswith(f"{url}: {reason}")
        assert message.endswith("after 4 attempts")
        assert "\n" not in message
        assert "secret" not in message
        assert len(running.asked) == 4


def test_nobody_listens(waits, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/0.tar"
        samples, error = samples_and_error(url)
    assert samples == []
    assert re.fullmatch(
        r"Failed to establish a new connection: .*refused, after 10 attempts", error
    )
    assert len(waits) == 9
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"waiting for {url}: .*refused, attempt 4 of 10", line)


def test_waits_grow_and_heed_the_server(waits, monkeypatch):
    with serve(Site({}, statuses=[503] * 99)) as site:
        samples_and_error(f"{site.url}/0.tar")
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, longest, strict=True))
    for name, asked, heeded in (
        ("Retry-After", "7", 7),
        ("Retry-After", "100000", 300),
        ("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("RateLimit", '"resolvers";r=0;t=271', 271),
        ("RateLimit", '"resolvers";r=0', 0),
    ):
        waits.clear()
        with serve(Site({}, statuses=[429, 404], refusal={name: asked})) as site:
            samples_and_error(f"{site.url}/0.tar")
        assert heeded + 0.25 <= waits[0] <= heeded + 0.5
    waits.clear()
    window = {"RateLimit": '"resolvers";r=4980;t=287'}  # is no reason to wait for its end
    with serve(Site({}, statuses=[502, 404], refusal=window)) as site:
        samples_and_error(f"{site.url}/0.tar")
    assert waits[0] <= 0.5


@pytest.mark.parametrize(
    ("headers", "other"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}),
        (
            {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"},
            {"Last-Modified": "Wed, 21 Oct 2015 07:29:00 GMT"},
        ),
        ({}, {}),  # recognised by its length alone
    ],
)
@pytest.mark.parametrize("heeds_if_range", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_shard_replaced_in_between_is_an_error(headers, other, heeds_if_range, ranges, shard):
    everything, _ = samples_and_error(shard)
    data = shard.read_bytes()
    site = Site({"0.tar": data}, ranges=ranges, headers=headers, heeds_if_range=heeds_if_range)

    def replace(number):
        if number == 1:
            site.headers = other
            site.files["0.tar"] = bytes(len(data) if other else len(data) - 1024)

    site.replace, site.cut = replace, lambda number: 40_000
    with serve(site):
        samples, error = samples_and_error(f"{site.url}/0.tar")
    assert error == "it was replaced on the server while it was read"
    assert [s.members for s in samples] == [s.members for s in everything[: len(samples)]]
    assert len(site.asked) == 2


@pytest.mark.parametrize("length", [True, False])
def test_a_tar_that_is_damaged_at_the_source(length, shard):
    """The file is whole as the server has it: its own faults are reported as from disk."""
    data = shard.read_bytes()
    contents = [b"", b"<html>404</html>", b"<html>404</html>" * 100, b"\x1f\x8b\x08" * 300]
    contents += [data[:100], data[:50_000], data[: data.index(b"9.txt\0") + 100]]
    for content_ in contents:
        path = shard.with_name("damaged.tar")
        path.write_bytes(content_)
        with serve(Site({"damaged.tar": content_}, length=length)) as site:
            assert samples_and_error(f"{site.url}/damaged.tar") == samples_and_error(path)
            assert len(site.asked) <= (1 if length else 2)


def test_a_body_encoded_on_the_way_is_refused(shard):
    site = Site({"0.tar": b"\x1f\x8b"}, headers={"Content-Encoding": "gzip"})
    with serve(site):
        assert samples_and_error(f"{site.url}/0.tar") == ([], "sent with Content-Encoding gzip")


class Drip:
    """A response of one byte a second, on a clock that a test turns."""

    def __init__(self, clock):
        self.clock = clock

    def read1(self, size):
        self.clock[0] += 1.0
        return b"x"


def test_a_server_that_drips_is_given_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(http, "monotonic", lambda: clock[0])
    stream = HttpStream("http://host/0.tar")
    stream._response = Drip(clock)
    with pytest.raises(OSError, match="less than 1,024 bytes a second"):
        stream.read(1 << 20)
    assert clock[0] < 200


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 302 x\r\nLocation: http://[::1\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: http://" + b"a" * 300 + b".b/\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: http://h:99999999/\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: //\xff\xfe:x/\r\n\r\n",
        b"HTTP/1.1 206 x\r\nContent-Range: bytes " + b"9" * 5000 + b"-1/2\r\n\r\n",
        b"HTTP/1.1 206 x\r\nContent-Range: words\r\n\r\n",
        b"HTTP/1.1 200 x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 x\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 999999 x\r\n\r\n",
        b"\x00\xff\r\n\r\n",
    ],
)
def test_a_malformed_answer_is_an_error_of_the_shard(answer):
    def serve_it(listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve_it, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/0.tar"
        samples, error = samples_and_error(url)
        assert (samples, error is not None) == ([], True)
        listener.shutdown(socket.SHUT_RDWR)


# All of the pipeline


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_from_a_server_that_drops_every_tenth_connection(
    workers, tokenizer, tmp_path
):
    paths = make_shards(tmp_path, [17, 30, 3, 41, 22, 9])
    count = itertools.count(1)
    files = {path.name: path.read_bytes() for path in paths}
    dropped = []

    def cut(number):
        if next(count) % 10 == 0:
            dropped.append(number)
            return 7_000
        return None

    from_disk = take(pair_pipeline(paths, tokenizer, workers=workers), 200)
    with serve(Site(files, cut=cut)) as site:
        urls = [f"{site.url}/{path.name}" for path in paths]
        from_server = take(pair_pipeline(urls, tokenizer, workers=workers), 200)
    assert len(dropped) >= 4
    assert len(from_server) == 200
    for ours, theirs in zip(from_server, from_disk, strict=True):
        assert content(ours) == content(theirs)


def test_a_stall_names_the_shard_that_a_data_worker_waits_for(
    tokenizer, shard, tmp_path, monkeypatch
):
    monkeypatch.setattr(retries, "READ_TIMEOUT_S", 0.5)
    board = WaitBoard(1)
    watchdog = Watchdog(tmp_path, 0, 1.0, board.lines)

    def report():
        deadline = time.monotonic() + 60
        while not board.lines() and time.monotonic() < deadline:
            time.sleep(0.001)
        watchdog._report(9, "patience")

    site = Site({"0.tar": shard.read_bytes()}, stall=lambda number: None if number else 5000)
    with serve(site):
        thread = threading.Thread(target=report)
        thread.start()
        pipeline = pair_pipeline([f"{site.url}/0.tar?key=secret"], tokenizer, workers=1)
        with closing(load_batches(pipeline.build, pipeline.config, 0, board=board)) as batches:
            next(batches)
        thread.join()
    report = (tmp_path / "stalls" / "rank-0.txt").read_text()
    assert re.search(rf"; data worker 0 has waited \d s for {site.url}/0.tar; patience", report)
    assert "secret" not in report
