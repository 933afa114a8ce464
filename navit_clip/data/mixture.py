"""The sources of a run: all shards by number, and which of them belong together.

From the configuration's patterns to the one numbered list of shards that every reader shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from navit_clip.data.config import DataConfig
from navit_clip.data.shards import expand_shards, shard_names
from navit_clip.errors import UserError


@dataclass(frozen=True)
class Source:
    """One source of samples.

    Attributes:
        name: As configured.
        weight: Share of the samples that come from it.
        captions: Caption source to sampling weight.
        shards: Numbers of its shards.
    """

    name: str
    weight: float
    captions: Mapping[str, float]
    shards: range


@dataclass(frozen=True)
class Sources:
    """All shards of a run, in the order in which they are numbered.

    Attributes:
        shards: Path or address of each.
        names: Short name of each, which begins the ids of its samples.
        sources: What they belong to; weights sum to 1.
    """

    shards: tuple[str, ...]
    names: tuple[str, ...]
    sources: tuple[Source, ...]

    @classmethod
    def find(cls, config: DataConfig) -> Sources:
        """Looks up the shards of a configuration.

        Raises:
            UserError: If no shards are configured, or a pattern matches none.
        """
        if not config.sources:
            raise UserError("data.train is empty: give the training shards, --data.train PATH")
        total = sum(source.weight for source in config.sources.values())
        shards: list[str] = []
        sources = []
        for name, source in config.sources.items():
            first = len(shards)
            shards += expand_shards(source.patterns, allow_commands=config.allow_commands)
            captions = source.captions or config.captions
            sources.append(Source(name, source.weight / total, captions, range(first, len(shards))))
        # Two sources may share shards, with other captions say.
        unique = list(dict.fromkeys(shards))
        names = dict(zip(unique, shard_names(unique), strict=True))
        return cls(tuple(shards), tuple(names[shard] for shard in shards), tuple(sources))

    @cached_property
    def of_shard(self) -> tuple[int, ...]:
        """Number of the source of each shard."""
        return tuple(i for i, source in enumerate(self.sources) for _ in source.shards)

    @cached_property
    def digest(self) -> str:
        """Tells these shards from others, wherever they lie and whatever their weights."""
        lines = [f"{name} {source}" for name, source in zip(self.names, self.of_shard, strict=True)]
        return f"{len(lines)} shards {hashlib.sha256('|'.join(lines).encode()).hexdigest()[:12]}"
