"""How much of a token budget is left unused: look-ahead streams, the paper's rows, one image a row.

Lengths are drawn as in training, side ~ U(64, 256) at patches of 16 px over the aspect ratios of
COCO photos (0.4 to 3, median 4:3), with Beta token drop of mean 0.53 or none. No pixels are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.measure import output_argument, report
from navit_clip.data.drop import DropConfig, sample_rate
from navit_clip.data.sizing import ResolutionConfig, sample_grid
from navit_clip.packing import Budgets, FirstFitPacker

IMAGES = 20_000
STREAM, ROW = 16384, 256


@dataclass(frozen=True)
class Lengths:
    """The tokens of one pair."""

    image_length: int
    text_length: int


def draw_lengths(drop: DropConfig, rng: np.random.Generator) -> list[Lengths]:
    """Image and text lengths of many pairs."""
    resolution = ResolutionConfig(max_tokens=ROW)
    pairs = []
    for _ in range(IMAGES):
        aspect = float(np.clip(4 / 3 * np.exp(rng.normal(0, 0.35)), 0.4, 3))
        height = int(640 / aspect**0.5)
        rows, columns = sample_grid(resolution, height, int(height * aspect), 16, 64, rng)
        rate = sample_rate(drop, rows * columns, 0, rng)
        tokens = max(1, round(rows * columns * (1 - rate)))
        pairs.append(Lengths(tokens, int(np.clip(rng.normal(14, 3), 6, 24))))
    return pairs


def stream_padding(pairs: list[Lengths], look_ahead: int) -> tuple[float, float]:
    """Unused share of the image stream, and variation of the pairs per batch."""
    # The text budget is generous, so that the image tower alone decides.
    packer: FirstFitPacker[Lengths] = FirstFitPacker(Budgets(STREAM, STREAM, 4096), look_ahead)
    used, counts = 0, []
    for pair in pairs:
        packer.offer(pair)
        while (batch := packer.take()) is not None:
            used += sum(item.image_length for item in batch)
            counts.append(len(batch))
    return 1 - used / (STREAM * len(counts)), float(np.std(counts) / np.mean(counts))


def row_padding(pairs: list[Lengths]) -> float:
    """Unused share of the paper's rows: greedy first-fit into 256 open rows of 256 tokens."""
    used = rows = 0
    space = np.full(256, ROW)
    for pair in pairs:
        fits = np.flatnonzero(space >= pair.image_length)
        if not len(fits):
            used, rows = used + int((ROW - space).sum()), rows + len(space)
            space = np.full(256, ROW)
            fits = np.array([0])
        space[fits[0]] -= pair.image_length
    return 1 - used / (ROW * rows)


def main() -> None:
    """The command line."""
    args = output_argument(__doc__).parse_args()
    result: dict[str, dict[str, float]] = {}
    for name, drop in (
        ("no_drop", DropConfig()),
        ("beta_drop", DropConfig(kind="beta", rate=0.53)),
    ):
        pairs = draw_lengths(drop, np.random.default_rng(0))
        padding, variation = stream_padding(pairs, look_ahead=64)
        result[name] = {
            "stream_look_ahead_64": padding,
            "stream_look_ahead_1": stream_padding(pairs, look_ahead=1)[0],
            "first_fit_rows_256": row_padding(pairs),
            "one_image_a_row": 1 - sum(p.image_length for p in pairs) / (ROW * len(pairs)),
            "pairs_per_batch_cv": variation,
        }
    report({"images": IMAGES, "stream_tokens": STREAM, "padding": result}, args.output)


if __name__ == "__main__":
    main()
