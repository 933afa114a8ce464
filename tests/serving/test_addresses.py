"""Addresses that clients name: none by default, never private ones, whatever they are called."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from shard_factory import encode, photo
from web_server import Site, serve

pytest.importorskip("starlette", reason="starlette (extra serve) is not installed")
pytest.importorskip("prometheus_client", reason="prometheus_client (extra serve) is not installed")

from starlette.testclient import TestClient

from navit_clip.model import NaViTCLIP
from navit_clip.serving import addresses
from navit_clip.serving import app as serving
from navit_clip.serving.app import Service
from navit_clip.serving.config import BatchConfig, Limits
from navit_clip.serving.limits import RequestError

PRIVATE = [
    *("http://127.0.0.1:80/a.jpg", "https://localhost/a.jpg", "http://127.1/", "http://0/"),
    *("http://2130706433/", "http://0x7f000001/", "http://169.254.169.254/latest/meta-data"),
    *("http://10.0.0.1/", "http://192.168.1.1/", "http://172.16.0.1/", "http://100.64.0.1/"),
    *("http://0.0.0.0/", "http://224.0.0.1/", "http://255.255.255.255/"),
    *("http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[fe80::1]/"),
    *("http://user:password@example.com/", "http://", "http://[", "http://a:99999/"),
    *("http://\u2488/", "http://a..b/", "http://" + "a" * 300 + "/"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_never_connected_to(address, monkeypatch):
    def connect(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(RequestError, match="cannot fetch") as error:
        addresses.fetch(address, 1000)
    assert error.value.status == 400


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    def both(*args: Any) -> list[Any]:
        return [(0, 0, 0, "", (ip, 80)) for ip in ("93.184.216.34", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(RequestError, match="not a public address"):
        addresses.fetch("http://example.com/", 1000)


@pytest.fixture
def _as_if_public(monkeypatch):
    """This machine's own servers count as public ones."""
    monkeypatch.setattr(addresses, "_public_ip", lambda *args: "127.0.0.1")


@pytest.mark.usefixtures("_as_if_public")
def test_an_image_at_an_address_is_like_one_that_was_sent(model_dir):
    model = NaViTCLIP.from_pretrained(model_dir)
    image = encode(photo(0, 40, 60), "JPEG")
    service = Service(model, "tiny", BatchConfig(), Limits(), addresses=True)
    with serve(Site({"a.jpg": image})) as site, TestClient(service.app()) as client:
        found = client.post("/v1/embeddings", json={"input": {"image": f"{site.url}/a.jpg"}})
        expected = client.post("/v1/embeddings", content=image, headers={"Content-Type": "image/x"})
        assert found.json()["data"] == expected.json()["data"]
        lost = client.post("/v1/embeddings", json={"input": {"image": f"{site.url}/b.jpg"}})
        assert lost.status_code == 400
        assert "it answered 404" in lost.json()["error"]["message"]


@pytest.mark.usefixtures("_as_if_public")
def test_redirects_large_files_and_broken_ones_are_refused():
    file = {"a.jpg": b"a" * 5000}
    sites = {
        "it answered 3": Site(file, redirect=True),
        "cannot be read": Site(file, cut=lambda number: 100),
        "more than 5,000 bytes": Site({"a.jpg": b"a" * 5001}),
    }
    for message, broken in sites.items():
        with serve(broken) as site, pytest.raises(RequestError, match=message):
            addresses.fetch(f"{site.url}/a.jpg", 5000)
    with serve(Site(file)) as site:
        assert addresses.fetch(f"{site.url}/a.jpg", 5000) == file["a.jpg"]


@contextmanager
def dripping(begin: bytes, drop: bytes) -> Iterator[str]:
    """A server that answers without an end; its address."""
    over = threading.Event()

    def answer() -> None:
        link, _ = server.accept()
        with link:
            link.sendall(begin)
            while not over.wait(0.05):
                link.sendall(drop)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/a.jpg"
        finally:
            over.set()
            thread.join()


@pytest.mark.usefixtures("_as_if_public")
@pytest.mark.parametrize(
    ("begin", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nA: ", b"a"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"a"),  # whole wherever it ends, for all its header says
    ],
)
def test_an_answer_that_does_not_end_is_cut(begin, drop, monkeypatch):
    monkeypatch.setattr(addresses, "_ALL_SECONDS", 0.5)
    with dripping(begin, drop) as address, pytest.raises(RequestError, match="takes too long"):
        addresses.fetch(address, 10_000_000)


def test_what_a_refused_request_named_is_not_fetched(model_dir, monkeypatch):
    model = NaViTCLIP.from_pretrained(model_dir)
    image, fetched, over = encode(photo(0, 40, 60), "JPEG"), list[str](), threading.Event()

    def fetch(address: str, most: int) -> bytes:
        fetched.append(address)
        if "bad" in address:
            raise RequestError(400, "address", "bad")
        if "slow" in address:
            over.wait(60)
        return image

    monkeypatch.setattr(serving, "fetch", fetch)
    service = Service(model, "tiny", BatchConfig(), Limits(), addresses=True)

    def ask(*addresses: str) -> int:
        inputs = [{"image": address} for address in addresses]
        return client.post("/v1/embeddings", json={"input": inputs}).status_code

    with TestClient(service.app()) as client:
        try:
            assert ask("http://bad/", *["http://slow/"] * 200) == 400
            assert ask(*["http://good/"] * 3) == 200  # though one thread is still waiting
        finally:
            over.set()
    assert fetched.count("http://slow/") <= 2


def test_all_addresses_of_a_request_have_a_limit_of_time(model_dir, monkeypatch):
    over = threading.Event()

    def fetch(address: str, most: int) -> bytes:
        over.wait(60)
        return b""

    monkeypatch.setattr(serving, "fetch", fetch)
    monkeypatch.setattr(serving, "_FETCH_SECONDS", 0.2)
    model = NaViTCLIP.from_pretrained(model_dir)
    service = Service(model, "tiny", BatchConfig(), Limits(), addresses=True)
    with TestClient(service.app()) as client:
        try:
            answer = client.post("/v1/embeddings", json={"input": {"image": "http://a/"}})
        finally:
            over.set()
    assert answer.status_code == 408
    assert "more than 0.2 s" in answer.json()["error"]["message"]
