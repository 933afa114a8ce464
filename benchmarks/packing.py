"""How much of both token budgets is left unused: the packer's modes, first-fit, rows of examples.

Sizes and captions are those of real shards, by default the photos beside the checkout in
../shared/data; without any, sizes are generated over the aspect ratios of COCO photos (0.4 to 3,
median 4:3) and captions of 6 to 24 tokens. Sides are drawn as in training, ~ U(64, 256) at patches
of 16 px and never enlarged, with Beta token drop of mean 0.53 or none. No pixels are read.

The text budget is the one that matches 16,384 image tokens on average. ``exact`` and ``constant``
get 2% more, see `Packer`; that and what they cut are in the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.command import command
from benchmarks.pairs import default_shards, samples_of
from benchmarks.sizes import CONTEXT, PATCH
from navit_clip.commands import number
from navit_clip.data.budgets import Budgets, PackingMode
from navit_clip.data.captions import find_captions
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.drop import DropConfig, sample_rate
from navit_clip.data.packer import Packer
from navit_clip.data.sizing import ResolutionConfig, sample_grid
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer

STREAM, ROW, ROWS = 16384, 256, 256
NO_LIMIT = 4096  # pairs, more than ever fit
LOOK_AHEAD = 256


@dataclass(frozen=True)
class Lengths:
    """The image and text tokens of one pair, and those of its image before it was trimmed."""

    lengths: tuple[int, int]
    whole: int
    bucket: tuple[()] = ()

    def trimmed(self, tokens: int) -> Lengths:
        """With fewer image tokens."""
        return replace(self, lengths=(tokens, self.lengths[1]))


@dataclass(frozen=True)
class Photo:
    """What one sample's lengths are drawn from: pixels, and the tokens of each caption."""

    height: int
    width: int
    captions: list[int]


def read_photos(patterns: list[str]) -> list[Photo]:
    """Sizes from the images' headers and caption lengths of all samples in the shards.

    Raises:
        UserError: If a shard is damaged, or none holds a photo with a caption.
    """
    tokenizer = OpenClipTokenizer()
    photos = []
    for sample in samples_of(patterns):
        with suppress(SkipSampleError):
            members = sample.members
            image = EncodedImage(find_image(members))
            captions = find_captions(members, "json.captions") or find_captions(members, "txt")
            lengths = [len(tokenizer.encode(caption, CONTEXT)) for caption in captions]
            if lengths:
                photos.append(Photo(image.height, image.width, lengths))
    if not photos:
        raise UserError(f"no photos with captions in {' '.join(patterns)}")
    return photos


def generate_photos(count: int, rng: np.random.Generator) -> list[Photo]:
    """Sizes and caption lengths like those of COCO."""
    photos = []
    for _ in range(count):
        aspect = float(np.clip(4 / 3 * np.exp(rng.normal(0, 0.35)), 0.4, 3))
        height = int(640 / aspect**0.5)
        captions = [int(np.clip(rng.normal(14, 3), 6, 24))]
        photos.append(Photo(height, int(height * aspect), captions))
    return photos


def draw_lengths(
    photos: list[Photo], count: int, drop: DropConfig, rng: np.random.Generator
) -> list[Lengths]:
    """Lengths of many pairs, epoch after shuffled epoch of the photos."""
    resolution = ResolutionConfig(max_tokens=ROW)
    pairs: list[Lengths] = []
    while len(pairs) < count:
        for index in rng.permutation(len(photos)):
            photo = photos[index]
            rows, columns = sample_grid(resolution, photo.height, photo.width, PATCH, 64, rng)
            rate = sample_rate(drop, rows * columns, 0, rng)
            tokens = max(1, round(rows * columns * (1 - rate)))
            pairs.append(Lengths((tokens, int(rng.choice(photo.captions))), tokens))
    return pairs[:count]


def with_packer(
    pairs: list[Lengths], budgets: Budgets, look_ahead: int, mode: PackingMode
) -> Iterator[list[Lengths]]:
    """The packer under test, on an endless stream: what is pending at the end is left."""
    packer: Packer[Lengths] = Packer(budgets, look_ahead, mode)
    for pair in pairs:
        packer.offer(pair)
        while (batch := packer.take()) is not None:
            yield batch


def first_fit(pairs: list[Lengths], budgets: Budgets, look_ahead: int) -> Iterator[list[Lengths]]:
    """Greedy first-fit: a pair that does not fit waits; the batch closes once many wait."""
    most = tuple(budgets.tokens.values())
    arriving = iter(pairs)
    waiting: list[Lengths] = []
    while True:
        batch: list[Lengths] = []
        used = np.zeros(2, int)
        candidates, waiting = chain(waiting, arriving), []
        for pair in candidates:
            if (used + pair.lengths <= most).all():
                batch.append(pair)
                used += pair.lengths
            else:
                waiting.append(pair)
            if len(waiting) == look_ahead:
                break
        else:
            return
        yield batch


def usage(packing: Iterator[list[Lengths]], budgets: Budgets, look_ahead: int) -> dict[str, float]:
    """Padding of both towers, pairs per batch, what was cut, and the packer's CPU time."""
    begin = time.process_time()
    batches = list(packing)
    seconds = time.process_time() - begin
    counts = np.array([len(batch) for batch in batches])
    packed = [pair for batch in batches for pair in batch]
    image, text = np.sum([pair.lengths for pair in packed], axis=0).tolist()
    return {
        "image_padding": 1 - image / (budgets.tokens["image"] * len(batches)),
        "text_padding": 1 - text / (budgets.tokens["text"] * len(batches)),
        "pairs_mean": float(counts.mean()),
        "pairs_cv": float(counts.std() / counts.mean()),
        "image_tokens_cut": 1 - image / sum(pair.whole for pair in packed),
        "image_budget": budgets.tokens["image"],
        "text_budget": budgets.tokens["text"],
        "look_ahead": look_ahead,
        "batches": len(batches),
        "us_per_pair": seconds / len(packed) * 1e6,
    }


def row_padding(lengths: Iterable[int], row: int) -> float:
    """Unused fraction of the paper's rows: greedy first-fit into 256 open rows of `row` tokens."""
    used = rows = 0
    space = np.full(ROWS, row)
    for length in lengths:
        fits = np.flatnonzero(space >= length)
        if not len(fits):
            used, rows = used + int((row - space).sum()), rows + ROWS
            space = np.full(ROWS, row)
            fits = np.array([0])
        space[fits[0]] -= length
    return 1 - used / (row * rows)


def compare(pairs: list[Lengths]) -> dict[str, dict[str, float]]:
    """Every mode of packing, by name."""
    image, text = np.mean([pair.lengths for pair in pairs], axis=0).tolist()

    def matching(room: float = 0.0, most: int = NO_LIMIT) -> Budgets:
        budget = round(STREAM * text / image * (1 + room))
        return Budgets({"image": STREAM, "text": budget}, max_examples=most)

    fixed = round(STREAM / image * 1.01)
    modes: dict[str, tuple[Budgets, int, PackingMode]] = {
        "fill": (matching(), LOOK_AHEAD, "fill"),
        "fill_look_ahead_64": (matching(), 64, "fill"),
        "exact": (matching(0.02), LOOK_AHEAD, "exact"),
        "exact_without_room": (matching(), LOOK_AHEAD, "exact"),
        "constant": (matching(0.02, fixed), LOOK_AHEAD, "constant"),
    }
    table = {name: usage(with_packer(pairs, *mode), *mode[:2]) for name, mode in modes.items()}
    fitted = (matching(), LOOK_AHEAD)
    table["first_fit"] = usage(first_fit(pairs, *fitted), *fitted)
    table["paper_rows_256"] = {"image_padding": row_padding((p.lengths[0] for p in pairs), ROW)}
    table["one_example_a_row"] = {
        "image_padding": 1 - image / ROW,
        "text_padding": 1 - text / CONTEXT,
    }
    return table


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Without token drop and with it."""
    patterns = args.shards or default_shards()
    rng = np.random.default_rng(0)
    photos = read_photos(patterns) if patterns else generate_photos(args.pairs, rng)
    drops = {"no_drop": DropConfig(), "beta_drop": DropConfig(kind="beta", rate=0.53)}
    tables = {
        name: compare(draw_lengths(photos, args.pairs, drop, rng)) for name, drop in drops.items()
    }
    fields = ("image_padding", "text_padding", "pairs_cv", "us_per_pair")
    return {
        # The headline is the worse of the two.
        **{field: max(table["fill"][field] for table in tables.values()) for field in fields},
        "samples": len(photos),
        "real_data": bool(patterns),
        **tables,
    }


main = command(
    __doc__,
    measure,
    "shards",
    # Enough to fill a few batches and the 256 open rows.
    pairs={"type": number(2000), "default": 60_000, "help": "pairs to pack"},
)

if __name__ == "__main__":
    main()
