"""Packs batches of shards as a configuration would, and keeps how full they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tqdm import tqdm

from navit_clip.data.builders.base import Origin, Sample, SampleBuilder
from navit_clip.data.builders.labelled import LabelledBuilder, LabelledImage
from navit_clip.data.builders.masked import MaskedSample
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.captions import choose_caption
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import sample_generator
from navit_clip.packed.batch import BatchCounts, Inputs
from navit_clip.packed.images import ImagePatches, PackedImages
from navit_clip.packed.texts import PackedTexts
from navit_clip.tasks.draw_batch import DrawnSample

MAX_BATCHES = 32  # enough for means; a whole epoch would decode everything twice


class PackingEfficiency(NamedTuple):
    """How full batches are.

    Attributes:
        batches: Counts of each batch.
        samples: Those of the first batch, in the order of the image stream.
    """

    batches: list[BatchCounts]
    samples: list[DrawnSample]


@dataclass(frozen=True)
class _Recorder:
    """Builds samples as another builder does, and keeps what a packed batch does not hold."""

    build: SampleBuilder[Any, Inputs]
    texts: dict[Origin, str] = field(default_factory=dict)
    first_batch: list[DrawnSample] = field(default_factory=list)

    @property
    def streams(self) -> tuple[str, ...]:
        return self.build.streams

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None
    ) -> Sample:
        sample: Sample = self.build(raw, origin, fields)
        if isinstance(self.build, PairBuilder):
            # The caption is the first that is drawn of a sample.
            rng = sample_generator(self.build.seed, origin.epoch, raw.id)
            caption = choose_caption(raw.members, fields or self.build.captions, rng)
            self.texts[origin] = caption
        elif isinstance(self.build, LabelledBuilder):
            assert isinstance(sample, LabelledImage)
            names = (self.build.labels.names[label] for label in sample.labels)
            self.texts[origin] = ", ".join(names)
        return sample

    def collate(self, samples: Sequence[Any], pad_to: tuple[int, ...] | None) -> Inputs:
        inputs = self.build.collate(samples, pad_to)
        if not self.first_batch:
            packed = (v for v in vars(inputs).values() if isinstance(v, PackedImages | PackedTexts))
            orders = [stream.order.tolist() for stream in packed]
            for sample, *segments in zip(samples, *orders, strict=True):
                image: ImagePatches = sample.image
                if isinstance(sample, MaskedSample):
                    image = image.kept(sample.visible)
                drawn = DrawnSample(
                    sample.id,
                    image,
                    self.texts.get(sample.origin, ""),
                    dict(zip(self.streams, sample.lengths, strict=True)),
                    dict(zip(self.streams, segments, strict=True)),
                )
                self.first_batch.append(drawn)
            self.first_batch.sort(key=lambda drawn: drawn.segments["image"])
        return inputs


def measure_packing(
    mixture: Mixture,
    build: SampleBuilder[Any, Inputs],
    config: DataConfig,
    seed: int,
    samples: int,
) -> PackingEfficiency:
    """Packs one epoch of the shards, or as much of it as fills `MAX_BATCHES`.

    Args:
        mixture: The shards; at least one of their samples must be usable.
        build: Makes samples.
        config: How they are packed.
        seed: Of the order.
        samples: Samples of one epoch. A batch that holds more has some of them twice.

    Raises:
        UserError: If the shards cannot be read.
    """
    recorder = _Recorder(build)
    # Efficiency does not depend on who reads, and one process keeps one record.
    stream = load_batches(recorder, replace(config, workers=0), seed, mixture=mixture)
    counts: list[BatchCounts] = []
    for batch in tqdm(itertools.islice(stream, MAX_BATCHES), desc="packing", unit="batch"):
        counts.append(batch.counts)
        if sum(batch.examples for batch in counts) >= samples:
            break
    return PackingEfficiency(counts, recorder.first_batch)
