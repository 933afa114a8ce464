"""A small configuration of the data pipeline, and batches as values, for tests of the loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from navit_clip.data.builders.pairs import Origin, Pair, PairBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.packer import Budgets
from navit_clip.data.shards import RawSample
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.packed.batch import PackedBatch
from navit_clip.tokenizers.base import Tokenizer

PATCH = 8
CONFIG = DataConfig(
    resolution=ResolutionConfig(min_side=16, max_side=48, max_tokens=24),
    drop=DropConfig(kind="beta", rate=0.3),
    budget=Budgets(image_tokens=64, text_tokens=96, max_pairs=6),
    look_ahead=3,
    shuffle_buffer=7,
    workers=0,
    prefetch=2,
)
ONE_BY_ONE = {
    "budget": Budgets(image_tokens=64, text_tokens=96, max_pairs=1),
    "look_ahead": 1,
    "shuffle_buffer": 1,
}


def pair_builder(
    shards: Iterable[Path], tokenizer: Tokenizer, *, seed: int = 0, **fields: Any
) -> PairBuilder:
    """A pair builder for shards, with fields of `CONFIG` replaced."""
    paths = [str(shard) for shard in shards]
    config = replace(CONFIG, **{"train": paths, **fields})
    return PairBuilder(config, tokenizer, 24, PATCH, 64, seed)


def take(build: PairBuilder, count: int, **options: Any) -> list[PackedBatch]:
    """The next so many batches; ends whatever processes made them."""
    with closing(load_batches(build, **options)) as batches:
        return list(itertools.islice(batches, count))


class EpochInId(PairBuilder):
    """Writes into each pair's id the epoch that it was read in."""

    def __call__(
        self, sample: RawSample, origin: Origin, captions: Mapping[str, float] | None = None
    ) -> Pair:
        pair = super().__call__(sample, origin, captions)
        return replace(pair, id=f"{origin.epoch}:{pair.id}")


def naming_epochs(build: PairBuilder) -> EpochInId:
    """The same builder, but with ids such as ``2:00001/7`` for the third epoch."""
    return EpochInId(**{f.name: getattr(build, f.name) for f in fields(build)})


def epoch_of(state: dict[str, Any]) -> int:
    """The pass over the only source that a reader with this state is in."""
    return state["walks"][0][0]


def content(batch: PackedBatch) -> dict[str, Any]:
    """All of a batch, as values that compare by ==."""
    images, texts = batch.images, batch.texts
    return {
        **{
            name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
            for name, tensor in {
                "patches": images.patches,
                "coords": images.coords,
                "grids": images.grids,
                "image_order": images.order,
                "token_ids": texts.token_ids,
                "text_order": texts.order,
            }.items()
        },
        "image_lengths": images.segments.lengths,
        "text_lengths": texts.segments.lengths,
        "ids": batch.ids,
        "counts": batch.counts,
        "position": batch.position,
    }
