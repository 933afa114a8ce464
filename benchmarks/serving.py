"""Serving: requests of mixed sizes packed together, against one by one and against padded batches.

The same server in three ways, which differ in the forward pass alone: ``packed`` is this project's;
``one by one`` gives each request a pass of its own; ``padded`` collects requests in the same way,
pads the images of a batch to its longest for timm's NaFlexViT, and captions to open_clip's 77
slots. Widths, depths and patches are equal, weights random.

Requests go to the application in this process, without a network: photos as JPEG files, sized as
those of `benchmarks.pairs`, and captions as JSON. So many clients send one request each and the
next one when it is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command import command
from benchmarks.measure import in_turn
from benchmarks.pairs import MAX_TOKENS, RealPair, draw_batches, read_samples
from benchmarks.peers import TimmNaFlex, padded
from benchmarks.sizes import CONTEXT, PATCH, WIDTHS
from navit_clip.commands import number
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.inference.preprocess import Preprocess
from navit_clip.load import AnyModel
from navit_clip.model import NaViTCLIP
from navit_clip.packed.images import ImagePatches
from navit_clip.precision import autocast, choose_precision
from navit_clip.serving.app import Service
from navit_clip.serving.batcher import Embed, Item
from navit_clip.serving.config import BatchConfig, Limits
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer

CLIENTS = (1, 8, 32)
Request = tuple[bytes, bytes]  # content type, body


class Padded(Service):
    """Batches of which each part is padded to one length."""

    tower: TimmNaFlex

    def embedder(self, model: AnyModel) -> Embed:
        """Images by timm, captions by open_clip."""
        assert isinstance(model, NaViTCLIP)
        tower, width, device = self.tower, model.config.embed_dim, model.device
        precision = choose_precision(model.precision, device)

        @torch.no_grad()
        def embed(items: Sequence[Item]) -> Tensor:
            images = [item for item in items if isinstance(item, ImagePatches)]
            slots = [ids + [0] * (CONTEXT - len(ids)) for ids in items if isinstance(ids, list)]
            is_text = torch.tensor([isinstance(item, list) for item in items])
            vectors = torch.empty(len(items), width)
            with autocast(precision, device):
                if images:
                    found = tower.tower(padded(images, device))
                    vectors[~is_text] = F.normalize(found.float(), dim=-1).cpu()
                if slots:
                    found = tower.clip.encode_text(torch.tensor(slots).to(device))
                    vectors[is_text] = F.normalize(found.float(), dim=-1).cpu()
            return vectors

        return embed


def requests_of(pairs: Sequence[RealPair]) -> list[Request]:
    """A photo and a caption of each, in turn."""
    found: list[Request] = []
    for real in pairs:
        rows, columns = real.pair.image.grid
        pixels = EncodedImage(find_image(real.sample.members)).pixels(rows * PATCH, columns * PATCH)
        found.append((b"image/jpeg", simplejpeg.encode_jpeg(np.ascontiguousarray(pixels))))
        caption = real.sample.members["txt"].decode()
        found.append((b"application/json", json.dumps({"input": caption}).encode()))
    return found


async def _answer(app: Any, request: Request) -> float:
    """Seconds until a request is answered."""
    kind, body = request
    begun = time.perf_counter()
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "query_string": b"",
        "headers": [(b"content-type", kind)],
    }
    await app(scope, receive, send)
    assert status == 200, status
    return time.perf_counter() - begun


def serve(
    build: type[Service],
    model: NaViTCLIP,
    batches: BatchConfig,
    requests: Sequence[Request],
    clients: int,
) -> tuple[float, list[float]]:
    """Seconds of all requests, and of each."""
    app = build(model, "model", batches, Limits()).app()
    waiting = list(requests)

    async def client() -> list[float]:
        found = []
        while waiting:
            found.append(await _answer(app, waiting.pop()))
        return found

    async def all_clients() -> tuple[float, list[float]]:
        async with app.router.lifespan_context(app):
            begun = time.perf_counter()
            found = await asyncio.gather(*(client() for _ in range(clients)))
            return time.perf_counter() - begun, [seconds for some in found for seconds in some]

    return asyncio.run(all_clients())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Requests per second and latencies of the three ways, for each number of clients."""
    torch.manual_seed(0)
    widths, device = WIDTHS[args.size], torch.device(args.device)
    preprocess = Preprocess(MAX_TOKENS)
    model = NaViTCLIP(widths.config(), OpenClipTokenizer(), preprocess).to(device).eval()
    model.precision = args.precision
    Padded.tower = TimmNaFlex(widths).to(device).eval()
    (pairs,) = draw_batches(read_samples(args.shards), args.requests // 2, 1)
    requests = requests_of(pairs)
    together, alone = BatchConfig(), BatchConfig(batch_tokens=1, wait_ms=0)
    ways: dict[str, tuple[type[Service], BatchConfig]] = {
        "packed": (Service, together),
        "padded": (Padded, together),
        "one by one": (Service, alone),
    }
    found: dict[str, Any] = {}
    for clients in CLIENTS:
        variants = {
            way: partial(serve, build, model, batches, requests, clients)
            for way, (build, batches) in ways.items()
        }
        results = in_turn(variants, args.rounds, warm_up=True)
        found[str(clients)] = {way: _summary(rounds) for way, rounds in results.items()}
    most = found[str(CLIENTS[-1])]
    ratios = {
        f"ratio_{way.replace(' ', '_')}": most["packed"]["requests_per_s"]
        / most[way]["requests_per_s"]
        for way in ("padded", "one by one")
    }
    return {"clients": found, "requests": len(requests), "towers": args.size, **ratios}


def _summary(rounds: Sequence[tuple[float, list[float]]]) -> dict[str, float]:
    latencies = [seconds for _, some in rounds for seconds in some]
    return {
        "requests_per_s": statistics.median(len(some) / whole for whole, some in rounds),
        **{f"ms_{q}": 1000 * float(np.percentile(latencies, q)) for q in (50, 95, 99)},
    }


main = command(
    __doc__,
    measure,
    "rounds",
    "size",
    "precision",
    "shards",
    requests={"type": number(2), "default": 256, "help": "of each round"},
    device={"default": "cpu", "help": "cpu or cuda"},
)


if __name__ == "__main__":
    main()
