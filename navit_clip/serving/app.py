"""The HTTP side: routes, bodies, answers. Errors are JSON of one form, as in OpenAI's API."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from navit_clip.data.annotations.class_names import unique_names
from navit_clip.errors import UserError
from navit_clip.inference.preprocess import Preprocess
from navit_clip.load import AnyModel
from navit_clip.model import PLAIN_TEMPLATE, NaViTCLIP
from navit_clip.serving.addresses import fetch
from navit_clip.serving.batcher import Batcher, Item, tokens_of
from navit_clip.serving.config import BatchConfig, Limits
from navit_clip.serving.embed import embedder, probabilities
from navit_clip.serving.inputs import Entry, Reader, bad, check_length, read_json, strings
from navit_clip.serving.limits import Admission, Body, RequestError, too_large
from navit_clip.serving.metrics import CONTENT_TYPE, Metrics

_THREADS = 4  # decode and tokenise; Pillow does so without the interpreter's lock
_FETCHERS = 8
_FETCHERS_EACH = 2  # of one request at once
_FETCH_SECONDS = 60.0  # for all addresses of a request
_RETRY_S = "1"
_CLOSED = 499  # nginx's: the client went away, nobody reads the answer

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """One model's answers.

    Attributes:
        embedder: From the model to the function that embeds a batch.

    Raises:
        UserError: If the model does not say how it wants its images.
    """

    embedder = staticmethod(embedder)

    def __init__(
        self,
        model: AnyModel,
        name: str,
        batches: BatchConfig,
        limits: Limits,
        *,
        addresses: bool = False,
    ) -> None:
        if not isinstance(model.preprocess, Preprocess):
            raise UserError(f"{name} has no preprocess to say how large images may be")
        self._model, self._name, self._limits = model, name, limits
        # ImageNet has two missiles, and JSON has one value for a key.
        self._classes = unique_names(model.classes or ())
        self._metrics = Metrics()
        self._admission = Admission(limits)
        self._threads = ThreadPoolExecutor(_THREADS, "decode")
        # Of their own: slow addresses keep no request waiting that names none.
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "fetch")
        self._batcher = Batcher(
            self.embedder(model), batches, limits.max_waiting_tokens, self._metrics
        )
        context = model.config.text.context_length if isinstance(model, NaViTCLIP) else 0
        self._reader = Reader(
            model.image.config, model.preprocess, model.tokenizer, context, limits, addresses
        )

    def app(self) -> Starlette:
        """The application, which any ASGI server runs."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self._batcher.start()
            yield
            await self._batcher.close()
            self._threads.shutdown()
            self._fetchers.shutdown(wait=False, cancel_futures=True)

        return Starlette(
            routes=[
                Route("/v1/embeddings", self._counted(self._embeddings), methods=["POST"]),
                Route("/v1/classify", self._counted(self._classify), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/metrics", self._text),
            ],
            exception_handlers={
                HTTPException: _http_error,
                Exception: _unexpected,
            },
            lifespan=lifespan,
        )

    async def _models(self, request: Request) -> Response:
        listed = {"id": self._name, "object": "model", "kind": self._model.kind}
        return JSONResponse({"object": "list", "data": [listed]})

    async def _health(self, request: Request) -> Response:
        alive = self._batcher.alive
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)

    async def _text(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def _counted(self, handler: Callable[[Request, Body], Awaitable[Any]]) -> Handler:
        """A route that reads its body within the limits, answers mistakes and counts itself."""

        async def route(request: Request) -> Response:
            begun, path = time.monotonic(), request.url.path
            status = 500
            try:
                with self._admission.body() as body:
                    await self._receive(request, body.add)
                    with self._admission.work():
                        answer = JSONResponse(await handler(request, body))
                status = answer.status_code
                return answer
            except RequestError as error:
                status = error.status
                return _answer(error)
            except ClientDisconnect:
                status = _CLOSED
                return Response(status_code=status)
            finally:
                self._metrics.request(path, status, time.monotonic() - begun)

        return route

    async def _receive(self, request: Request, add: Callable[[bytes], None]) -> None:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limits.max_bytes:
            raise too_large(self._limits)

        async def receive() -> None:
            async for chunk in request.stream():
                add(chunk)

        try:
            await asyncio.wait_for(receive(), self._limits.body_seconds)
        except asyncio.TimeoutError as error:
            seconds = self._limits.body_seconds
            raise RequestError(408, "slow", f"the request took more than {seconds:g} s") from error

    async def _embeddings(self, request: Request, body: Body) -> Any:
        known = {"input", "model", "encoding_format", "user"}
        values, entries = await self._read(request, body, known, images_only=False)
        form = values.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise bad("encoding_format must be float or base64")
        items, vectors = await self._embed(entries)
        tokens = sum(map(tokens_of, items))
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, form)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self._name, "usage": usage}

    async def _classify(self, request: Request, body: Body) -> Any:
        known = {"input", "model", "labels", "templates"}
        values, entries = await self._read(request, body, known, images_only=True)
        labels, prompts = self._labels(values, len(entries))
        _, vectors = await self._embed([*entries, *prompts])
        found = await self._in_thread(
            lambda: probabilities(self._model, vectors, len(entries), len(labels))
        )
        data = [
            {
                "index": i,
                "label": labels[int(row.argmax())],
                "scores": dict(zip(labels, row.tolist(), strict=True)),
            }
            for i, row in enumerate(found)
        ]
        return {"object": "list", "data": data, "model": self._name}

    def _labels(self, values: dict[str, Any], images: int) -> tuple[list[str], list[Entry]]:
        """What to choose from, and the prompts of each, one label after the other."""
        if not isinstance(self._model, NaViTCLIP):
            if not self._classes:
                raise bad("this model has no classes")
            if values.get("labels"):
                raise bad("labels belong to models that read texts, this one has its own")
            return self._classes, []
        most = self._limits.max_inputs
        labels = strings(values, "labels", most)
        if len(set(labels)) < len(labels):
            raise bad("labels has a label twice")
        templates = [PLAIN_TEMPLATE]
        if values.get("templates") is not None:
            templates = strings(values, "templates", most)
        if any("{}" not in template for template in templates):
            raise bad("templates must each have {} in the label's place")
        if images + len(labels) * len(templates) > most:
            raise bad(f"images and prompts (labels × templates) are more than {most:,} together")
        for template in templates:  # before they take memory
            longest = len(template) + template.count("{}") * (max(map(len, labels)) - len("{}"))
            check_length("the longest prompt", longest, self._limits)
        return labels, [
            Entry(f"a prompt of labels[{i}]", text=template.replace("{}", label))
            for i, label in enumerate(labels)
            for template in templates
        ]

    async def _embed(self, entries: list[Entry]) -> tuple[list[Item], Tensor]:
        """What the model gets, and the vectors of it."""
        with self._batcher.coming():
            items = await self._in_thread(lambda: self._reader.items(entries))
        return items, await self._batcher.embed(items)

    async def _read(
        self, request: Request, body: Body, known: set[str], *, images_only: bool
    ) -> tuple[dict[str, Any], list[Entry]]:
        """The request's values and inputs; the body may be an image's file in place of JSON."""
        if request.headers.get("content-type", "").startswith("image/"):
            labels = request.query_params.getlist("label")
            return {"labels": labels}, [Entry("the image", image=bytes(body.data))]
        values = await self._in_thread(lambda: read_json(body.data, known))
        entries = await self._in_thread(lambda: self._reader.entries(values, images_only))
        return values, await self._fetched(entries, body)

    async def _fetched(self, entries: list[Entry], body: Body) -> list[Entry]:
        """The same with the files at addresses, which count like the request's own bytes."""
        loop, turn = asyncio.get_running_loop(), asyncio.Semaphore(_FETCHERS_EACH)

        async def one(entry: Entry) -> Entry:
            if entry.address is None:
                return entry
            most = self._limits.max_bytes
            async with turn:
                data = await loop.run_in_executor(self._fetchers, fetch, entry.address, most)
            body.add(data)
            return replace(entry, image=data, address=None)

        tasks = [asyncio.ensure_future(one(entry)) for entry in entries]
        try:
            return await asyncio.wait_for(asyncio.gather(*tasks), _FETCH_SECONDS)
        except asyncio.TimeoutError as error:
            message = f"fetching the images takes more than {_FETCH_SECONDS:g} s"
            raise RequestError(408, "slow", message) from error
        finally:
            for task in tasks:
                task.cancel()  # else others of a refused request would be fetched all the same

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _encoded(vector: Tensor, form: str) -> Any:
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


def _answer(error: RequestError) -> Response:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    content = {"error": {"message": error.message, "type": kind, "code": error.code}}
    headers = {"Retry-After": _RETRY_S} if error.status == 503 else None
    return JSONResponse(content, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(RequestError(error.status_code, "http", str(error.detail)))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _answer(RequestError(500, "internal", "the server failed at this request"))
