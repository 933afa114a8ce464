"""What stores list for the patterns of a run, asked for by one rank alone.

The first look at a run's data, before `mixture`. Stores and the Hugging Face Hub limit how often
they are asked: a run of 512 ranks that each list ``s3://bucket/*.tar``, and more than once, would
be refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.config import DataConfig
from navit_clip.data.patterns import expand_shards, is_list, is_stored, is_url
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError

_PATTERN = re.compile(r"[*?\[\]{}\\]")  # in a name it would be taken for a pattern once more


def list_once(config: DataConfig, ranks: Ranks) -> DataConfig:
    """The configuration with the objects' names in place of the patterns that a store resolves.

    What is local, and a list with a line that is, stays: each rank looks for its own. Every rank
    calls it.

    Raises:
        OutageError: If a store does not answer.
        UserError: If a pattern of a store, or a list, cannot be resolved.
    """
    found: dict[str, list[str]] = {}
    problem: UserError | None = None
    if ranks.is_first:
        try:
            for dataset in config.datasets.values():
                found |= _listed(dataset.patterns, config, dataset.files)
            try:
                validation = _as_list(config.validation)
                found |= _listed(validation, config, config.validation_files)
            except UserError as error:
                raise type(error)(f"data.validation: {error}") from error
        except UserError as error:
            problem = error
    ranks.raise_together(problem)
    if not (found := ranks.broadcast(found)):
        return config
    return replace(
        config,
        train=_resolved(_as_list(config.train), found),
        mix={
            name: replace(dataset, shards=_resolved(dataset.patterns, found))
            for name, dataset in config.mix.items()
        },
        validation=_resolved(_as_list(config.validation), found),
    )


def _listed(
    patterns: Sequence[str], config: DataConfig, files: FilesConfig | None
) -> dict[str, list[str]]:
    """Names by pattern, of the patterns that stand for nothing but objects and web files."""
    found = {}
    for pattern in patterns:
        if is_stored(pattern) or is_url(pattern) or is_list(pattern):
            names = expand_shards(
                [pattern], allow_commands=config.allow_commands, files=files or config.files
            )
            if not any(map(_stays, names)):
                found[pattern] = names
    return found


def _stays(name: str) -> bool:
    remote = is_stored(name) or is_url(name)
    return not remote or _PATTERN.search(name) is not None


def _resolved(patterns: Sequence[str], found: Mapping[str, list[str]]) -> list[str]:
    return [name for pattern in patterns for name in found.get(pattern, [pattern])]


def _as_list(shards: str | list[str]) -> list[str]:
    return [shards] if isinstance(shards, str) else shards
