"""What stores list for the patterns of a run, asked for by one rank alone.

The first look at a run's data, before `mixture`, and at that of its evaluators. Stores and the
Hugging Face Hub limit how often they are asked: a run of 512 ranks that each list
``s3://bucket/*.tar``, and more than once, would be refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.config import DataConfig
from navit_clip.data.patterns import Listed, expand_shards, is_stored, is_url, lists_remote
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError

_FILES = FilesConfig()

Found = dict[str, list[str]]  # names of shards by pattern


def list_once(config: DataConfig, ranks: Ranks) -> DataConfig:
    """The configuration with `Listed` in place of the patterns that a store resolves.

    What is local, and a list with a line that is, stays: each rank looks for its own. Every rank
    calls it.

    Raises:
        OutageError: If a store does not answer.
        UserError: If a pattern of a store, or a list, cannot be resolved.
    """

    def look() -> Found:
        found: Found = {}
        for dataset in config.datasets.values():
            files = dataset.files or config.files
            found |= list_stored(dataset.patterns, config.allow_commands, files)
        files = config.validation_files or config.files
        try:
            return found | list_stored(_as_list(config.validation), config.allow_commands, files)
        except UserError as error:
            raise type(error)(f"data.validation: {error}") from error

    if not (found := ranks.of_first(look)):
        return config
    return replace(
        config,
        train=as_listed(_as_list(config.train), found),
        mix={
            name: replace(dataset, shards=as_listed(dataset.patterns, found))
            for name, dataset in config.mix.items()
        },
        validation=as_listed(_as_list(config.validation), found),
    )


def list_stored(
    patterns: Sequence[str], allow_commands: bool = False, files: FilesConfig = _FILES
) -> Found:
    """Shards by pattern, of the patterns that stand for nothing but objects and web files.

    Raises:
        OutageError: If a store does not answer.
        UserError: If one of them cannot be resolved.
    """
    found = {}
    for pattern in patterns:
        if _is_remote(pattern) or lists_remote(pattern):
            names = expand_shards([pattern], allow_commands=allow_commands, files=files)
            if all(map(_is_remote, names)):
                found[pattern] = names
    return found


def as_listed(patterns: Sequence[str], found: Mapping[str, list[str]]) -> list[str]:
    """The patterns, as `Listed` where it is known what they stand for."""
    return [Listed(one, found[one]) if one in found else one for one in patterns]


def _is_remote(name: str) -> bool:
    return is_stored(name) or is_url(name)


def _as_list(shards: str | list[str]) -> list[str]:
    return ([shards] if shards else []) if isinstance(shards, str) else shards
