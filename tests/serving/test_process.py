"""The command as a process: many clients, slow and broken ones among them, and a clean end."""

from __future__ import annotations

import base64
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import urllib3
from shard_factory import encode, photo

from navit_clip.model import NaViTCLIP

pytest.importorskip("starlette", reason="starlette (extra serve) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (extra serve) is not installed")
pytest.importorskip("prometheus_client", reason="prometheus_client (extra serve) is not installed")

ROOT = Path(__file__).parents[2]
CLIENTS = 32
UNFINISHED = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
IMAGES = [encode(photo(i, 20 + 7 * i, 50), "PNG") for i in range(5)]
TEXTS = ["a red square", "two stripes", "", "blue"]


@pytest.mark.parametrize("requests", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_mixed_requests_slow_and_broken_clients_and_a_clean_end(model_dir, tmp_path, requests):
    errors = (tmp_path / "errors").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "navit_clip", "serve", "--model", str(model_dir), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    try:
        assert process.stdout is not None
        name, _, address = process.stdout.readline().strip().partition(": ")
        assert name == model_dir.name, (tmp_path / "errors").read_text()
        host, port = address.removeprefix("http://").split(":")
        slow = [socket.create_connection((host, int(port))) for _ in range(8)]
        for client in slow:
            client.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
            )
        _send(requests, address, model_dir, (host, int(port)))
        for client in slow:
            client.close()
        # A request that is here when the server is told to end gets its answer.
        answers: list[int] = []
        pool = urllib3.PoolManager()
        body = json.dumps({"input": TEXTS * 60})
        last = threading.Thread(
            target=lambda: answers.append(
                pool.request("POST", f"{address}/v1/embeddings", body=body).status
            )
        )
        last.start()
        while b"navit_waiting_tokens 0.0" in pool.request("GET", f"{address}/metrics").data:
            if answers:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "errors").read_text()
        last.join(60)
        assert answers == [200]
        assert (tmp_path / "errors").read_text() == ""
    finally:
        process.kill()
        process.wait()
        errors.close()


def _send(requests: int, address: str, model_dir: Path, place: tuple[str, int]) -> None:
    model = NaViTCLIP.from_pretrained(model_dir)
    vectors = torch.cat([model.encode_image(IMAGES), model.encode_text(TEXTS)])
    inputs = [{"image": base64.b64encode(image).decode()} for image in IMAGES]
    inputs += [{"text": text} for text in TEXTS]
    pool = urllib3.PoolManager(maxsize=CLIENTS)

    def one(seed: int) -> bool:
        rng = random.Random(seed)
        if seed % 50 == 0:  # goes away in the middle
            with socket.create_connection(place) as client:
                client.sendall(UNFINISHED)
            return True
        if seed % 50 == 1:
            answer = pool.request("POST", f"{address}/v1/embeddings", body=b"{")
            return answer.status == 400
        chosen = [rng.randrange(len(inputs)) for _ in range(rng.randrange(1, 6))]
        body = json.dumps({"input": [inputs[i] for i in chosen]})
        answer = pool.request("POST", f"{address}/v1/embeddings", body=body, retries=False)
        found = torch.tensor([row["embedding"] for row in answer.json()["data"]])
        return bool((found - vectors[chosen]).abs().max() < 1e-5)

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert all(clients.map(one, range(requests)))
