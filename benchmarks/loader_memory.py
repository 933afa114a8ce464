"""Resident memory of a loader's worker over 100,000 generated samples; it must stay flat.

Small JPEGs with captions of random words are written to shards once and read again and again by
one worker, with every part of the pipeline in use. Growth counts from a tenth of the way on: until
then buffers and caches fill.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.command import command
from benchmarks.measure import resident_mb
from benchmarks.needs import need_proc
from benchmarks.pairs import pair_builder
from navit_clip.commands import number
from navit_clip.data.budgets import Budgets
from navit_clip.data.config import DataConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.shards import add_member
from navit_clip.data.sizing import ResolutionConfig

SHARDS, PER_SHARD = 10, 500
POINTS = 20  # of the curve
BAD_FRACTION = 0.02  # unusable samples, whose errors must not pile up either


def write_shards(root: Path) -> None:
    """Shards of small photos of many sizes and captions of many words."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for key in range(PER_SHARD):
                height, width = rng.integers(48, 160, 2)
                coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                photo = io.BytesIO()
                coarse.resize((int(width), int(height))).save(photo, "JPEG")
                words = ["".join(map(chr, rng.integers(97, 123, 6))) for _ in range(8)]
                members = {"jpg": photo.getvalue(), "txt": " ".join(words).encode()}
                if rng.random() < BAD_FRACTION:
                    members["jpg"] = members["jpg"][:200]
                for extension, content in members.items():
                    add_member(tar, f"{key:05d}.{extension}", content)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Lets samples through, the unusable ones counted in, and looks at the worker now and then."""
    need_proc()
    done = 0
    seen: list[int] = []
    resident: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        write_shards(Path(root))
        config = DataConfig(
            train=root,
            resolution=ResolutionConfig(min_side=32, max_side=96, max_tokens=64),
            drop=DropConfig(kind="beta"),
            budget=Budgets({"image": 2048, "text": 4096}, max_examples=256),
            workers=1,
        )
        for batch in load_batches(pair_builder(config), config, 0):
            if done >= len(seen) * args.samples / POINTS:
                (worker,) = multiprocessing.active_children()
                assert worker.pid is not None
                seen.append(done)
                resident.append(round(resident_mb("VmRSS", worker.pid), 1))
            if done >= args.samples:
                break
            done += len(batch.ids) + sum(batch.counts.skipped.values())
    warm = POINTS // 10
    return {
        "samples": seen,
        "rss_mb": resident,
        "growth_mb": round(resident[-1] - resident[warm], 1),
        "from_samples": seen[warm],
    }


main = command(
    __doc__,
    measure,
    samples={"type": number(2000), "default": 100_000, "help": "samples that pass through"},
)

if __name__ == "__main__":
    main()
