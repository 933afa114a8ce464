"""The mixture of a run: all shards by number, and which of them belong to which dataset.

From the configuration's patterns to the one numbered list of shards that every reader has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from navit_clip.data.config import DataConfig
from navit_clip.data.patterns import (
    expand_shards,
    first_shard,
    is_stored,
    is_url,
    shard_names,
)
from navit_clip.errors import UserError

_MUCH_UNREAD = 0.05


@dataclass(frozen=True)
class Dataset:
    """One of the datasets that are mixed.

    Attributes:
        name: As configured.
        weight: Fraction of the samples that come from it.
        captions: Caption field to sampling weight; None takes those of the task.
        shards: Numbers of its shards.
    """

    name: str
    weight: float
    captions: Mapping[str, float] | None
    shards: range


@dataclass(frozen=True)
class Mixture:
    """All shards of a run, in the order in which they are numbered.

    Attributes:
        shards: Path or address of each.
        names: Short name of each, which begins the ids of its samples.
        datasets: What they belong to; weights sum to 1.
    """

    shards: tuple[str, ...]
    names: tuple[str, ...]
    datasets: tuple[Dataset, ...]

    @classmethod
    def find(cls, config: DataConfig) -> Mixture:
        """Looks up the shards of a configuration.

        Raises:
            UserError: If no shards are configured, or a pattern matches none.
        """
        _check_given(config)
        total = sum(dataset.weight for dataset in config.datasets.values())
        shards: list[str] = []
        datasets = []
        for name, dataset in config.datasets.items():
            first = len(shards)
            shards += expand_shards(
                dataset.patterns,
                allow_commands=config.allow_commands,
                files=dataset.files or config.files,
            )
            own = range(first, len(shards))
            datasets.append(Dataset(name, dataset.weight / total, dataset.captions, own))
        # Two datasets may share shards, with other captions say.
        unique = list(dict.fromkeys(shards))
        names = dict(zip(unique, shard_names(unique), strict=True))
        return cls(tuple(shards), tuple(names[shard] for shard in shards), tuple(datasets))

    def remarks(self, readers: int) -> Iterator[str]:
        """Lines on datasets whose shards do not go well among so many readers."""
        for dataset in self.datasets:
            shards, first = len(dataset.shards), self.shards[dataset.shards[0]]
            counts = f"dataset {dataset.name} has {shards:,} shards for {readers:,} readers"
            if shards < readers and (is_url(first) or is_stored(first)):
                yield (
                    f"{counts}: each is downloaded by {math.ceil(readers / shards):,} of them; "
                    f"{readers:,} or more are downloaded once an epoch"
                )
            if (unread := _unread(shards, readers)) > _MUCH_UNREAD:
                yield (
                    f"{counts}, which do not divide evenly: when as many samples as an epoch has "
                    f"are read, {unread:.0%} of them are not, and as many twice; a multiple of "
                    f"{readers:,}, or many more, is better"
                )

    def dataset_of(self, shard: int) -> Dataset:
        """The dataset that a shard belongs to."""
        return next(dataset for dataset in self.datasets if shard in dataset.shards)

    @cached_property
    def digest(self) -> str:
        """A checksum of the shards' names, wherever they lie and whatever their weights."""
        lines = [
            f"{self.names[shard]} {number}"
            for number, dataset in enumerate(self.datasets)
            for shard in dataset.shards
        ]
        return f"{len(lines)} shards {hashlib.sha256('|'.join(lines).encode()).hexdigest()[:12]}"


def first_shards(config: DataConfig) -> dict[str, str]:
    """The first shard of each dataset by name, without a look at most of the others.

    Raises:
        UserError: If no shards are configured, or the first pattern of a dataset matches none.
    """
    _check_given(config)
    return {
        name: first_shard(
            dataset.patterns,
            allow_commands=config.allow_commands,
            files=dataset.files or config.files,
        )
        for name, dataset in config.datasets.items()
    }


def _check_given(config: DataConfig) -> None:
    if not config.datasets:
        raise UserError("data.train is empty: give the training shards, --data.train PATH")


def _unread(shards: int, readers: int) -> float:
    """Fraction of an epoch that is not read when each reader has read its share of as many samples.

    `navit_clip.data.order` deals them in whole shards, or shards in whole fractions.
    """
    if shards >= readers:
        number, more = divmod(shards, readers)
        return more * (number + 1 - shards / readers) / shards if more else 0.0
    number, more = divmod(readers, shards)
    return (1 - more / shards) * (1 - number * shards / readers)
