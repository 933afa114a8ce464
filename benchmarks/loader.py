"""Loading on one core: this pipeline's images per second, open_clip's, and a plain Pillow path's.

All three read the same shards to the end and tokenise the captions to the same ids, each on one
thread of the same core, in turns. Seconds are CPU time, so waiting for other work on the machine
does not count. open_clip's loader is the one its trainer uses, with its training transform at
224 px. The plain path is this pipeline with the decoder exchanged: Pillow's full decode and its
bicubic resize to the same sampled sizes; reading, drawing, tokenising and packing are the same.

open_clip's loader has an environment of its own, see `benchmarks.end_to_end`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.command import command
from benchmarks.measure import in_turn
from benchmarks.needs import need_peer
from benchmarks.pairs import COCO, MAX_SIDE, MIN_SIDE, pair_builder, samples_of
from benchmarks.sizes import CONTEXT, PATCH, SQUARE
from navit_clip.data.builders import images as sample
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.patterns import expand_shards
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.errors import UserError

PEER = {"image_size": SQUARE, "batch_size": 64}
PEER_SCRIPT = Path(__file__).with_name("open_clip_peer.py")


class PlainImage:
    """Pillow as one would write it down, with the interface of `EncodedImage`."""

    def __init__(self, data: bytes) -> None:
        self._image = Image.open(io.BytesIO(data))
        ImageOps.exif_transpose(self._image, in_place=True)
        self.width, self.height = self._image.size

    def pixels(self, height: int, width: int) -> np.ndarray:
        """Full decode, then an antialiased resize."""
        rgb = self._image.convert("RGB")
        return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))


def packed_epochs(
    shards: list[str], images: int, decoder: type = sample.EncodedImage
) -> Callable[[], float]:
    """Reads so many images at each call, to the next full batch; images per second of CPU time.

    Goes on where the last call ended; `decoder` takes the place of `EncodedImage`.
    """
    config = DataConfig(
        train=shards, resolution=ResolutionConfig(min_side=MIN_SIDE, max_side=MAX_SIDE), workers=0
    )
    batches = load_batches(pair_builder(config), config, 0)

    def once() -> float:
        count = 0
        with mock.patch.object(sample, "EncodedImage", decoder):
            begin = time.process_time()
            while count < images:
                count += len(next(batches).ids)
            return count / (time.process_time() - begin)

    return once


def open_clip_epochs(python: str, shards: list[str], images: int) -> Iterator[float]:
    """Images per second of each epoch through open_clip's loader, which `python` runs."""
    settings = {"shards": shards, "images": images, "context_length": CONTEXT, **PEER}
    with subprocess.Popen(
        [python, str(PEER_SCRIPT), "load", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            process.stdin.write("epoch\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise UserError(f"open_clip's loader failed under {python}, its message is above")
            answer = json.loads(line)
            yield answer["images"] / answer["seconds"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All three loaders on one core."""
    peer_versions = need_peer(args.peer_python)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux only
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    shards = expand_shards(args.shards or [COCO])
    images = sum(1 for _ in samples_of(shards))
    loaders: dict[str, Callable[[], float]] = {
        "ours": packed_epochs(shards, images),
        "open_clip": partial(next, open_clip_epochs(args.peer_python, shards, images)),
        "pil": packed_epochs(shards, images, PlainImage),
    }
    results = in_turn(loaders, args.rounds, warm_up=True)
    rates = {name: statistics.median(found) for name, found in results.items()}
    return {
        **{f"{name}_images_per_s": rate for name, rate in rates.items()},
        "ratio_open_clip": rates["ours"] / rates["open_clip"],
        "ratio_pil": rates["ours"] / rates["pil"],
        "images": images,
        "patch": PATCH,
        "sides": [MIN_SIDE, MAX_SIDE],
        "open_clip": PEER,
        "open_clip_versions": peer_versions,
    }


main = command(__doc__, measure, "shards", "peer-python", rounds={"default": 5})

if __name__ == "__main__":
    main()
