"""Packs batches of shards as a configuration would, and keeps how full they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tqdm import tqdm

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair, PairBuilder, PairInputs
from navit_clip.data.captions import choose_caption
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.seeding import sample_generator
from navit_clip.data.shards import RawSample
from navit_clip.packed.batch import BatchCounts
from navit_clip.packed.images import ImagePatches

MAX_BATCHES = 32  # enough for means; a whole epoch would decode everything twice


class DrawnPair(NamedTuple):
    """One pair of a batch.

    Attributes:
        id: ``shard/key``.
        image: Kept patches and the grid.
        caption: The text that was tokenised.
        tokens: Number of its tokens in each packed stream.
        segments: Number of its segment in each packed stream.
    """

    id: str
    image: ImagePatches
    caption: str
    tokens: dict[str, int]
    segments: dict[str, int]


class PackingEfficiency(NamedTuple):
    """How full batches are.

    Attributes:
        batches: Counts of each batch.
        pairs: The first batch's pairs, in the order of the image stream.
    """

    batches: list[BatchCounts]
    pairs: list[DrawnPair]


@dataclass(frozen=True)
class _Recorder(PairBuilder):
    """Builds pairs, and keeps what a packed batch does not hold of them."""

    captions_of: dict[Origin, str] = field(default_factory=dict)
    first_batch: list[DrawnPair] = field(default_factory=list)

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None = None
    ) -> Pair:
        # The caption is the first that is drawn of a sample.
        rng = sample_generator(self.seed, origin.epoch, raw.id)
        self.captions_of[origin] = choose_caption(raw.members, fields or self.captions, rng)
        return super().__call__(raw, origin, fields)

    def collate(self, samples: Sequence[Pair], pad_to: tuple[int, ...] | None) -> PairInputs:
        packed = super().collate(samples, pad_to)
        if not self.first_batch:
            orders = packed.images.order.tolist(), packed.texts.order.tolist()
            for pair, image, text in zip(samples, *orders, strict=True):
                caption, segments = self.captions_of[pair.origin], {"image": image, "text": text}
                tokens = dict(zip(self.streams, pair.lengths, strict=True))
                drawn = DrawnPair(pair.id, pair.image, caption, tokens, segments)
                self.first_batch.append(drawn)
            self.first_batch.sort(key=lambda pair: pair.segments["image"])
        return packed


def measure_packing(
    mixture: Mixture, build: PairBuilder, config: DataConfig, pairs: int
) -> PackingEfficiency:
    """Packs one epoch of the shards, or as much of it as fills `MAX_BATCHES`.

    Args:
        mixture: The shards; at least one of their samples must be usable.
        build: Makes pairs.
        config: How they are packed.
        pairs: Pairs of one epoch. A batch that holds more has some of them twice.

    Raises:
        UserError: If the shards cannot be read.
    """
    recorder = _Recorder(**vars(build))
    # Efficiency does not depend on who reads, and one process keeps one record.
    stream = load_batches(recorder, replace(config, workers=0), build.seed, mixture=mixture)
    counts: list[BatchCounts] = []
    for batch in tqdm(itertools.islice(stream, MAX_BATCHES), desc="packing", unit="batch"):
        counts.append(batch.counts)
        if sum(batch.examples for batch in counts) >= pairs:
            break
    return PackingEfficiency(counts, recorder.first_batch)
