"""A small configuration of the data pipeline, and batches as values, for tests of the loader."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from navit_clip.data.budgets import Budgets
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair, PairBuilder, PairInputs
from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.reader import Reader
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.data.state import DataState, ReaderState, open_state
from navit_clip.packed.batch import Batch
from navit_clip.tokenizers.base import Tokenizer

PATCH = 8
CONFIG = DataConfig(
    resolution=ResolutionConfig(min_side=16, max_side=48, max_tokens=24),
    drop=DropConfig(kind="beta", rate=0.3),
    budget=Budgets({"image": 64, "text": 96}, max_examples=6),
    look_ahead=3,
    shuffle_buffer=7,
    workers=0,
    prefetch=2,
)
ONE_BY_ONE = {
    "budget": Budgets({"image": 64, "text": 96}, max_examples=1),
    "look_ahead": 1,
    "shuffle_buffer": 1,
}


@dataclass(frozen=True)
class Pipeline:
    """A sample builder, how its samples are read and packed, and the seed of both."""

    build: Any
    config: DataConfig
    seed: int

    @property
    def mixture(self) -> Mixture:
        """The shards."""
        return Mixture.find(self.config)

    def with_mix(self, mix: dict[str, DatasetConfig]) -> Pipeline:
        """The same over several datasets."""
        return replace(self, config=replace(self.config, train=[], mix=mix))

    def begin(
        self, saved: Sequence[DataState] = (), rank: int = 0, world_size: int = 1
    ) -> DataState:
        """Where a rank begins, or goes on."""
        return open_state(
            saved,
            self.mixture,
            self.seed,
            workers=self.config.workers,
            rank=rank,
            world_size=world_size,
        )

    def batches_of(
        self, reader: int = 0, readers: int = 1, state: DataState | None = None
    ) -> Iterator[Batch[Any]]:
        """The batches of one reader of several without end."""
        state = state or self.begin(world_size=readers)
        return Reader(self.mixture, self.build, self.config, self.seed, reader).batches(state)

    def load(self, **options: Any) -> Iterator[Batch[Any]]:
        """The batches of one rank without end."""
        return load_batches(self.build, self.config, self.seed, **options)


def pair_pipeline(
    shards: Iterable[Path], tokenizer: Tokenizer, *, seed: int = 0, **fields: Any
) -> Pipeline:
    """A pipeline of pairs from shards, with fields of `CONFIG` replaced."""
    paths = [str(shard) for shard in shards]
    config = replace(CONFIG, **{"train": paths, **fields})
    build = PairBuilder(
        config.resolution,
        config.drop,
        PATCH,
        64,
        seed,
        {"txt": 1.0},
        tokenizer,
        24,
        augment=config.augment,
    )
    return Pipeline(build, config, seed)


def take(pipeline: Pipeline, count: int, **options: Any) -> list[Batch[Any]]:
    """The next so many batches; ends whatever processes made them."""
    with closing(pipeline.load(**options)) as batches:
        return list(itertools.islice(batches, count))


class EpochInId(PairBuilder):
    """Writes into each pair's id the epoch that it was read in."""

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None = None
    ) -> Pair:
        pair = super().__call__(raw, origin, fields)
        return replace(pair, id=f"{origin.epoch}:{pair.id}")


def naming_epochs(pipeline: Pipeline) -> Pipeline:
    """The same, but with ids such as ``2:00001/7`` for the third epoch."""
    build = EpochInId(**{f.name: getattr(pipeline.build, f.name) for f in fields(pipeline.build)})
    return replace(pipeline, build=build)


def epoch_of(state: ReaderState) -> int:
    """The epoch of the only dataset that a reader with this state is in."""
    return state.cursors[0].epoch


def content(batch: Batch[PairInputs]) -> dict[str, Any]:
    """All of a batch, as values that compare by ==."""
    images, texts = batch.inputs.images, batch.inputs.texts
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
        "state": batch.state,
    }


def samples_and_error(
    path: object, wanted: Collection[int] | None = None
) -> tuple[list[RawSample], str | None]:
    """Readable samples, and the error after them, without the name of the shard."""
    samples: list[RawSample] = []
    try:
        for sample in read_shard(str(path), wanted):
            samples.append(sample)
    except ShardError as error:
        return samples, str(error).removeprefix(f"{path}: ")
    return samples, None
