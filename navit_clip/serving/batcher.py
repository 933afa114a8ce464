"""Inputs of many requests packed into one forward pass, by tokens and under a deadline.

Runs in the server's event loop; the model runs in one thread. What comes in while it runs makes the
next batch, so that batches grow with the load. A batch that is not full waits only while other
requests are being decoded: a lone client's is computed at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from navit_clip.packed.images import ImagePatches
from navit_clip.serving.config import BatchConfig
from navit_clip.serving.limits import busy
from navit_clip.serving.metrics import Metrics

Item = ImagePatches | list[int]  # a sized image, or ids of a text
Embed = Callable[[Sequence[Item]], Tensor]


def tokens_of(item: Item) -> int:
    """Length on the stream of its tower."""
    return len(item) if isinstance(item, list) else len(item.patches)


@dataclass
class _Waiting:
    item: Item
    tokens: int
    future: asyncio.Future[Tensor]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """A queue before a model.

    Args:
        embed: From inputs to [E, D] on the host; runs in a thread, one call at a time.
        config: How inputs are packed.
        max_waiting_tokens: More are turned away.
        metrics: Where batches are counted.
    """

    def __init__(
        self, embed: Embed, config: BatchConfig, max_waiting_tokens: int, metrics: Metrics
    ) -> None:
        self._embed, self._config, self._metrics = embed, config, metrics
        self._most = max_waiting_tokens
        self._queue: deque[_Waiting] = deque()
        self._tokens = self._coming = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether inputs are taken and worked on."""
        return self._task is not None and not self._task.done() and not self._closing

    def start(self) -> None:
        """Begins to work, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Ends after what is waiting."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While a request is prepared that will ask for vectors: batches wait for it."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            self._arrived.set()

    async def embed(self, items: Sequence[Item]) -> Tensor:
        """Vectors [E, D] of a request's inputs, in their order, however they are packed.

        Raises:
            RequestError: 503 if there is no room for all of them.
        """
        tokens = sum(map(tokens_of, items))
        # A request alone may be longer than the queue.
        if not self.alive or (self._queue and self._tokens + tokens > self._most):
            raise busy()
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, tokens_of(item), loop.create_future()) for item in items]
        self._queue += waiting
        self._count(tokens)
        self._arrived.set()
        return torch.stack(await asyncio.gather(*(one.future for one in waiting)))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue or not self._closing:
            await self._fill()
            batch = self._take()
            if not batch:
                continue
            items = [one.item for one in batch]
            begun = time.monotonic()
            try:
                vectors = await loop.run_in_executor(self._thread, self._embed, items)
            except Exception as error:
                # A device's own error stays: this process computes nothing any more.
                is_last = isinstance(error, torch.AcceleratorError)
                for one in [*batch, *self._queue] if is_last else batch:
                    if not one.future.done():
                        one.future.set_exception(error)
                if is_last:
                    return
                continue
            self._metrics.batch(len(batch), sum(map(tokens_of, items)), time.monotonic() - begun)
            for one, vector in zip(batch, vectors, strict=True):
                if not one.future.done():
                    one.future.set_result(vector)

    async def _fill(self) -> None:
        """Waits for a full batch, until nothing more is coming, or for the first one's deadline."""
        while not self._closing:
            left = None
            if self._queue:
                left = self._queue[0].since + self._config.wait_ms / 1000 - time.monotonic()
                if left <= 0 or not self._coming or self._tokens >= self._config.batch_tokens:
                    return
            self._arrived.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _take(self) -> list[_Waiting]:
        """The first inputs whose clients still wait, as many as fit."""
        batch: list[_Waiting] = []
        tokens = 0
        while self._queue:
            first = self._queue[0]
            if batch and tokens + first.tokens > self._config.batch_tokens:
                break
            self._queue.popleft()
            self._count(-first.tokens)
            if not first.future.done():
                batch.append(first)
                tokens += first.tokens
        return batch

    def _count(self, tokens: int) -> None:
        self._tokens += tokens
        self._metrics.waiting(self._tokens)
