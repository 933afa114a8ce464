"""Requests are packed together, in order, within bounds, and nothing waits for a slow client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("prometheus_client", reason="prometheus_client (extra serve) is not installed")
pytest.importorskip("starlette", reason="starlette (extra serve) is not installed")

from navit_clip.model import NaViTCLIP
from navit_clip.serving.app import Service
from navit_clip.serving.batcher import Batcher, Item
from navit_clip.serving.config import BatchConfig, Limits
from navit_clip.serving.limits import RequestError
from navit_clip.serving.metrics import Metrics


class Model:
    """A vector is the sum of a text's ids; batches are kept."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.error: Exception | None = None

    def __call__(self, items: Sequence[Item]) -> Tensor:
        self.batches.append(list(items))
        if self.error is not None:
            raise self.error
        return torch.tensor([[float(sum(item))] for item in items])


def run(
    work: Callable[[Batcher], Awaitable[Any]],
    model: Model,
    *,
    tokens: int = 10,
    wait_ms: float = 20,
    waiting: int = 1000,
) -> Any:
    async def inside() -> Any:
        batcher = Batcher(model, BatchConfig(tokens, wait_ms), waiting, Metrics())
        batcher.start()
        try:
            return await work(batcher)
        finally:
            await batcher.close()

    return asyncio.run(inside())


def test_requests_are_packed_together_up_to_the_tokens_and_keep_their_order():
    requests = [[[i] * (1 + i % 4), [100 + i] * 3] for i in range(20)]

    async def work(batcher: Batcher) -> Any:
        return await asyncio.gather(*map(batcher.embed, requests))

    model = Model()
    for found, items in zip(run(work, model), requests, strict=True):
        assert found[:, 0].tolist() == [sum(item) for item in items]
    lengths = [[len(item) for item in batch] for batch in model.batches]
    assert all(sum(batch) <= 10 for batch in lengths)
    # First come, first served: a batch ends where the next input does not fit.
    assert all(sum(a) + b[0] > 10 for a, b in pairwise(lengths))
    assert [item for batch in model.batches for item in batch] == [
        item for request in requests for item in request
    ]


def test_an_input_longer_than_a_batch_goes_alone():
    model = Model()

    async def work(batcher: Batcher) -> Any:
        return await batcher.embed([[1], [2] * 50, [3]])

    assert run(work, model)[:, 0].tolist() == [1, 100, 3]
    assert [len(batch) for batch in model.batches] == [1, 1, 1]


def test_a_batch_that_is_not_full_waits_for_what_is_coming():
    model = Model()

    async def work(batcher: Batcher) -> None:
        with batcher.coming():
            first = asyncio.ensure_future(batcher.embed([[1]]))
            await asyncio.sleep(0.01)
            assert not model.batches
        await asyncio.gather(first, batcher.embed([[2]]))
        # Nothing is coming.
        await batcher.embed([[3]])

    run(work, model, wait_ms=60_000 - 1)
    assert model.batches == [[[1], [2]], [[3]]]


def test_a_batch_waits_no_longer_than_the_deadline():
    model = Model()

    async def work(batcher: Batcher) -> None:
        with batcher.coming():
            await batcher.embed([[1]])

    run(work, model, wait_ms=20)
    assert model.batches == [[[1]]]


def test_past_the_bound_requests_are_turned_away_and_those_before_are_served():
    model = Model()

    async def work(batcher: Batcher) -> Any:
        return await asyncio.gather(
            *(batcher.embed([[i] * 10]) for i in range(5)), return_exceptions=True
        )

    found = run(work, model, waiting=30)
    assert [type(one) for one in found] == [Tensor] * 3 + [RequestError] * 2
    assert found[4].status == 503
    # Alone a request may be longer than the queue.
    assert run(lambda batcher: batcher.embed([[1] * 99]), model, waiting=30)[0] == 99


def test_what_waits_is_served_before_the_end():
    model = Model()
    results: list[asyncio.Future[Tensor]] = []

    async def work(batcher: Batcher) -> None:
        results.extend(asyncio.ensure_future(batcher.embed([[i] * 4])) for i in range(7))
        await asyncio.sleep(0)

    run(work, model, wait_ms=10_000)
    assert [float(one.result()[0]) for one in results] == [4.0 * i for i in range(7)]


def test_a_failing_batch_fails_its_requests_alone():
    model = Model()

    async def work(batcher: Batcher) -> Any:
        model.error = RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.embed([[1], [2]])
        model.error = None
        return await batcher.embed([[3]])

    assert run(work, model)[0] == 3


def test_an_error_of_the_device_ends_the_work():
    model = Model()
    model.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    async def work(batcher: Batcher) -> None:
        requests = [batcher.embed([[i] * 10]) for i in range(3)]
        found = await asyncio.gather(*requests, return_exceptions=True)
        assert found == [model.error] * 3
        assert not batcher.alive
        with pytest.raises(RequestError):
            await batcher.embed([[1]])

    run(work, model)
    assert len(model.batches) == 1


def test_clients_that_went_away_cost_no_forward_pass():
    model = Model()

    async def work(batcher: Batcher) -> None:
        gone = asyncio.ensure_future(batcher.embed([[1]]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        await batcher.embed([[2]])

    run(work, model)
    assert model.batches == [[[2]]]


def post(app: Any, chunks: list[bytes], *, end: bool) -> Awaitable[list[dict[str, Any]]]:
    """A request to an application, whose body perhaps never ends."""
    waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        if not end:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def call() -> list[dict[str, Any]]:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "headers": [],
            "query_string": b"",
        }
        await app(scope, receive, send)
        return sent

    return call()


def test_a_slow_client_is_told_so_and_keeps_nobody_waiting(model_dir):
    limits = Limits(body_seconds=0.3, max_requests=1)
    service = Service(NaViTCLIP.from_pretrained(model_dir), "tiny", BatchConfig(), limits)
    app = service.app()

    async def work() -> None:
        async with app.router.lifespan_context(app):
            slow = [asyncio.ensure_future(post(app, [b'{"in'], end=False)) for _ in range(8)]
            await asyncio.sleep(0)
            quick = await post(app, [b'{"input": ', b'"red"}'], end=True)
            assert quick[0]["status"] == 200
            assert not any(one.done() for one in slow)
            assert {(await one)[0]["status"] for one in slow} == {408}

    asyncio.run(work())


def test_slow_clients_together_hold_bounded_memory(model_dir):
    limits = Limits(body_seconds=0.2, max_bytes=1000)
    service = Service(NaViTCLIP.from_pretrained(model_dir), "tiny", BatchConfig(), limits)
    app = service.app()

    async def work() -> None:
        async with app.router.lifespan_context(app):
            slow = [asyncio.ensure_future(post(app, [b" " * 999], end=False)) for _ in range(20)]
            statuses = sorted(sent[0]["status"] for sent in await asyncio.gather(*slow))
            assert statuses == [408] * 16 + [503] * 4
            assert (await post(app, [b'{"input": "red"}'], end=True))[0]["status"] == 200

    asyncio.run(work())
