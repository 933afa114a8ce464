"""What one training step costs as images, batches, pairs and captions grow: linear where it should.

This project's own step (`navit_clip.training.step`: both towers, loss, clipping, AdamW) on
generated pixels and ids, on four curves:

- ``image_side``: squares of 64 to 512 px, as many as fill the stream. A token costs more the longer
  its image, since attention is quadratic within an image.
- ``stream``: budgets of 2k to 16k image tokens, filled with images of all sizes.
- ``pairs``: 16 to 256 pairs at equal tokens of both towers; only the loss grows, with their square.
- ``caption``: captions of 8 to 77 tokens under small images.

Each point's matrix products and attention, forward and backward, are counted. Where cost follows
them, ``ms_per_gflop`` is the same all along a curve: ``max_over_min`` says how far from it.
Attention on short segments and many small calls make it rise; 1.0 is exactly linear.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.command import command, default_device
from benchmarks.device.steps import build_stepper
from benchmarks.measure import alternate, flop_counter
from benchmarks.sizes import PATCH, WIDTHS, Widths
from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.patches import cut_patches
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch, BatchCounts, StreamCounts
from navit_clip.packed.images import pack_images
from navit_clip.packed.texts import pack_texts
from navit_clip.training.parallel import ParallelConfig

# Its gradient and update cost the same at every point and, with a large vocabulary and narrow
# towers, would hide what grows.
VOCABULARY = 1024
SIDES = (64, 128, 256, 512)
STREAMS = (2048, 4096, 8192, 16384)
PAIRS = (16, 32, 64, 128, 256)
CAPTIONS = (8, 16, 32, 77)
WORDS = 16  # tokens of a caption where they do not matter


@dataclass(frozen=True)
class Point:
    """The sizes of one batch.

    Attributes:
        x: What grows along the curve.
        grids: Rows and columns of patches of each image.
        caption: Tokens of each caption.
    """

    x: int
    grids: tuple[tuple[int, int], ...]
    caption: int = WORDS

    def batch(self) -> Batch[PairInputs]:
        """Random pixels and ids, the same ones at every call."""
        rng = np.random.default_rng(0)
        sizes = [(rows * PATCH, columns * PATCH, 3) for rows, columns in self.grids]
        pixels = (rng.integers(0, 256, size, dtype=np.uint8) for size in sizes)
        images = pack_images([cut_patches(image, PATCH) for image in pixels])
        texts = pack_texts(rng.integers(0, VOCABULARY, (len(self.grids), self.caption)).tolist())
        lengths = {"image": images.segments.num_tokens, "text": texts.segments.num_tokens}
        streams = {name: StreamCounts(n, n, n, n) for name, n in lengths.items()}
        ids = tuple(map(str, range(len(self.grids))))
        return Batch(PairInputs(images, texts), ids, BatchCounts(len(ids), streams))


def _natural(tokens: int) -> tuple[tuple[int, int], ...]:
    """Images of sides ~ U(64, 256) and aspect ratios of photos until the stream is full."""
    rng = np.random.default_rng(0)
    grids: list[tuple[int, int]] = []
    while (left := tokens - sum(rows * columns for rows, columns in grids)) > 0:
        side, aspect = rng.uniform(4, 16), float(np.clip(np.exp(rng.normal(0.2, 0.35)), 0.4, 3))
        rows, columns = max(1, round(side / aspect**0.5)), max(1, round(side * aspect**0.5))
        grids.append((rows, columns) if rows * columns <= left else (1, min(left, columns)))
    return tuple(grids)


def curves(fraction: float) -> dict[str, list[Point]]:
    """The points of each curve, with this fraction of the tokens but no shorter images or texts."""

    def scaled(number: float) -> int:
        return max(1, round(number * fraction))

    return {
        "image_side": [
            Point(side, ((side // PATCH,) * 2,) * scaled(4096 / (side // PATCH) ** 2))
            for side in SIDES
        ],
        "stream": [Point(tokens, _natural(scaled(tokens))) for tokens in STREAMS],
        "pairs": [
            Point(pairs, ((16, 512 // pairs),) * scaled(pairs), 1024 // pairs) for pairs in PAIRS
        ],
        "caption": [Point(tokens, ((4, 4),) * scaled(128), tokens) for tokens in CAPTIONS],
    }


class Steps:
    """The model and its optimiser, which all points share."""

    def __init__(self, widths: Widths, precision: Literal["fp32", "bf16"], device: str) -> None:
        self.device, model = torch.device(device), widths.config(VOCABULARY)
        self._stepper = build_stepper(model, self.device, ParallelConfig(), precision)
        self._numbers = count()

    def take(self, batch: Batch[PairInputs]) -> None:
        """One step."""
        self._stepper.step([batch.to(self.device)], next(self._numbers))

    def count_flops(self, batch: Batch[PairInputs]) -> int:
        """Of one step, taken."""
        with flop_counter() as counter:
            self.take(batch)
        return counter.get_total_flops()


def measure_curve(points: list[Point], steps: Steps, rounds: int) -> dict[str, Any]:
    """Steps at all points of a curve in turn."""
    batches = {point.x: point.batch() for point in points}
    flops = {x: steps.count_flops(batch) for x, batch in batches.items()}
    seconds = alternate({x: partial(steps.take, b) for x, b in batches.items()}, rounds)
    rows = []
    for x, batch in batches.items():
        tokens = {name: stream.tokens for name, stream in batch.counts.streams.items()}
        rows.append(
            {
                "x": x,
                "pairs": len(batch.ids),
                **{f"{name}_tokens": number for name, number in tokens.items()},
                "gflop": flops[x] / 1e9,
                "seconds": seconds[x],
                "ms_per_gflop": seconds[x] / flops[x] * 1e12,
                "us_per_token": seconds[x] / sum(tokens.values()) * 1e6,
            }
        )
    found: dict[str, Any] = {"points": rows}
    for field, cost in (("", "ms_per_gflop"), ("_per_token", "us_per_token")):
        costs = [row[cost] for row in rows]
        found[f"max_over_min{field}"] = max(costs) / min(costs)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All curves."""
    if args.share <= 0:
        raise UserError(f"--share must be positive, got {args.share}")
    steps = Steps(WIDTHS[args.size], args.precision, default_device())
    found = {
        name: measure_curve(points, steps, args.rounds)
        for name, points in curves(args.share).items()
    }
    ratios = {f"max_over_min_{name}": curve["max_over_min"] for name, curve in found.items()}
    return {**ratios, "share": args.share, **found}


main = command(
    __doc__,
    measure,
    "rounds",
    "precision",
    size={"default": "XS/16"},
    share={"type": float, "default": 1.0, "help": "of each batch's pairs; more suits a GPU"},
)

if __name__ == "__main__":
    main()
