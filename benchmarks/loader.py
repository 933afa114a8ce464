"""Loading on one core: this pipeline's images per second, open_clip's, and a plain Pillow path's.

All three read the same shards to the end and tokenise the captions to the same ids, each on one
thread of the same core, in turns. Seconds are CPU time, so waiting for other work on the machine
does not count. open_clip's loader is the one its trainer uses, with its training transform at
224 px. The plain path is this pipeline with the decoder exchanged: Pillow's full decode and its
bicubic resize to the same sampled sizes; reading, drawing, tokenising and packing are the same.

open_clip's loader works with webdataset up to 0.2.86 only, so give it an environment of its own:

    python -m venv peer && peer/bin/pip install "open_clip_torch[training]"
    python -m benchmarks.loader --shards SHARDS --peer-python peer/bin/python --output out.json
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.measure import output_argument, report
from benchmarks.pairs import samples_of
from navit_clip.data.builders import pairs as sample
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.shards import expand_shards
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.errors import UserError, one_line_errors
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer

PATCH = 16
CONTEXT_LENGTH = 77
RESOLUTION = ResolutionConfig(min_side=64, max_side=256)
PEER = {"image_size": 224, "batch_size": 64, "webdataset": "0.2.86"}
PEER_SCRIPT = Path(__file__).with_name("loader_peer.py")

# A pass over the data: images and seconds of CPU time.
Pass = Callable[[], tuple[int, float]]


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


def packed_passes(shards: list[str], images: int, decoder: type | None = None) -> Pass:
    """Passes through this pipeline, each going on where the last one ended.

    Args:
        shards: Tar files.
        images: Images of one pass, to the next full batch.
        decoder: Instead of `EncodedImage`.
    """
    config = DataConfig(train=shards, resolution=RESOLUTION, workers=0)
    build = PairBuilder(config, OpenClipTokenizer(), CONTEXT_LENGTH, PATCH, 64, 0)
    batches = load_batches(build)

    def once() -> tuple[int, float]:
        count = 0
        with mock.patch.object(sample, "EncodedImage", decoder or sample.EncodedImage):
            begin = time.process_time()
            while count < images:
                count += len(next(batches).ids)
            return count, time.process_time() - begin

    return once


@contextmanager
def open_clip_passes(
    python: str, shards: list[str], images: int
) -> Iterator[tuple[Pass, dict[str, str]]]:
    """Passes through open_clip's loader in a subprocess, and the versions it runs with.

    Args:
        python: Interpreter of an environment with open_clip and the webdataset it needs.
        shards: Tar files.
        images: Samples they hold.

    Raises:
        UserError: If that environment lacks something.
    """
    settings = {"shards": shards, "images": images, "context_length": CONTEXT_LENGTH, **PEER}
    try:
        process = subprocess.Popen(
            [python, str(PEER_SCRIPT), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except OSError as error:
        raise UserError(f"--peer-python {python}: {error.strerror}") from error
    with process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> dict[str, Any]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise UserError(f"open_clip's loader failed under {python}, its message is above")
            return json.loads(line)

        versions = answer()
        if "missing" in versions.values() or versions["webdataset"] != PEER["webdataset"]:
            raise UserError(
                f"{python} has open_clip_torch {versions['open_clip_torch']} and webdataset "
                f"{versions['webdataset']}, but open_clip's loader needs webdataset "
                f"{PEER['webdataset']}: python -m venv peer && peer/bin/pip install "
                '"open_clip_torch[training]", then --peer-python peer/bin/python'
            )

        def once() -> tuple[int, float]:
            assert process.stdin is not None
            process.stdin.write("pass\n")
            process.stdin.flush()
            result = answer()
            return result["images"], result["seconds"]

        yield once, versions
        process.stdin.close()


def measure(ways: dict[str, Pass], rounds: int) -> dict[str, float]:
    """Median images per second of each way, in turns, after one round that warms up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, once in ways.items():
            images, seconds = once()
            if round_:
                rates[name].append(images / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """The command line."""
    parser = output_argument(__doc__)
    parser.add_argument("--shards", nargs="+", required=True, help="tar files, folders, patterns")
    parser.add_argument("--rounds", type=int, default=5, help="measured passes of each")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has open_clip's loader"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux only
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with one_line_errors("benchmarks.loader"):
        shards = expand_shards(args.shards)
        images = sum(1 for _ in samples_of(shards))
        with open_clip_passes(args.peer_python, shards, images) as (open_clip, peer_versions):
            rates = measure(
                {
                    "ours": packed_passes(shards, images),
                    "open_clip": open_clip,
                    "pil": packed_passes(shards, images, PlainImage),
                },
                args.rounds,
            )
    report(
        {
            **{f"{name}_images_per_s": rate for name, rate in rates.items()},
            "ratio_open_clip": rates["ours"] / rates["open_clip"],
            "ratio_pil": rates["ours"] / rates["pil"],
            "images": images,
            "rounds": args.rounds,
            "patch": PATCH,
            "sides": [RESOLUTION.min_side, RESOLUTION.max_side],
            "open_clip": PEER,
            "open_clip_versions": peer_versions,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
