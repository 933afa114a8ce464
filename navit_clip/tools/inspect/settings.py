"""The parts of a training configuration that concern data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.config import DataConfig, check_captions
from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.models.clip import CLIPConfig
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.tokenizers.load import TokenizerConfig, build_tokenizer


@dataclass(frozen=True)
class TaskSettings:
    """The parts of a task's configuration that decide what becomes of a sample.

    Attributes:
        model: Patch size, longest side and caption length.
        captions: Caption field to sampling weight.
    """

    model: CLIPConfig = field(default_factory=CLIPConfig)
    captions: dict[str, float] = field(default_factory=lambda: {"txt": 1.0})

    def __post_init__(self) -> None:
        check_captions("captions", self.captions)


@dataclass(frozen=True)
class DataSettings:
    """The parts of a training configuration that decide what a batch holds.

    Attributes:
        data: What is read and how it is packed.
        task: What becomes of a sample.
        tokenizer: How captions become token ids; None counts words instead.
        seed: Of everything random about the data.
    """

    data: DataConfig = field(default_factory=DataConfig)
    task: TaskSettings = field(default_factory=TaskSettings)
    tokenizer: TokenizerConfig | None = None
    seed: int = 0


class WordCounter(Tokenizer):
    """Stands in where no tokenizer is given: one token per word."""

    kind = "words"

    @property
    def vocab_size(self) -> int:
        """Ids are hashes."""
        return 1 << 31

    def encode(self, text: str, context_length: int) -> list[int]:
        """An id per word, and one for the end."""
        # Ids tell texts apart, since the picture finds a caption by its ids.
        words = [zlib.crc32(word.encode()) >> 1 for word in text.split()]
        return [*words[: context_length - 1], 0]


def read_settings(path: Path) -> DataSettings:
    """The data's part of a training configuration; the rest of it is not read.

    Args:
        path: A YAML file as ``navit-clip train --config`` takes it, or a run's ``config.yaml``.

    Raises:
        UserError: If it cannot be read, or an entry is unknown or out of range; names it.
    """
    with reading(f"--config {path} as YAML", UnicodeDecodeError, yaml.YAMLError):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = [f.name for f in fields(DataSettings)]
    if not isinstance(content, Mapping) or "data" not in content:
        raise UserError(f"--config {path} has no data section: give a training configuration")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataSettings)
    try:
        known = {name: content[name] for name in names if name in content}
        if isinstance(task := known.get("task"), Mapping):
            if task.get("kind", "contrastive") != "contrastive":
                raise ValueError(f"task.kind is {task['kind']}, only contrastive is inspected")
            parts = [f.name for f in fields(TaskSettings)]
            known["task"] = {name: task[name] for name in parts if name in task}
        values = parser.instantiate(parser.parse_object(known))
        return DataSettings(**{name: values[name] for name in names})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"--config {path}: {error}") from error


def with_choices(
    settings: DataSettings,
    shards: Sequence[str],
    captions: Sequence[str] | None,
    tokenizer: str | None,
) -> DataSettings:
    """The settings with those of the command line instead.

    Args:
        settings: Read from a configuration, or the defaults.
        shards: Patterns; none keeps the configuration's.
        captions: Caption fields of equal weight; None keeps the configuration's.
        tokenizer: A SentencePiece model's path, or ``open_clip``.

    Raises:
        UserError: If a caption field is not one.
    """
    data, task = settings.data, settings.task
    if shards:
        data = replace(data, train=list(shards), mix={})
    if captions is not None:
        try:
            task = replace(task, captions=dict.fromkeys(captions, 1.0))
        except ValueError as error:
            raise UserError(f"--captions: {error}") from error
    config = settings.tokenizer
    if tokenizer is not None:
        config = (
            TokenizerConfig("open_clip")
            if tokenizer == "open_clip"
            else TokenizerConfig("sentencepiece", tokenizer)
        )
    return replace(settings, data=data, task=task, tokenizer=config)


def pair_builder(settings: DataSettings) -> PairBuilder:
    """Makes pairs as training would.

    Raises:
        UserError: If the tokenizer cannot be read.
    """
    image, text = settings.task.model.image, settings.task.model.text
    return PairBuilder(
        settings.task.captions,
        settings.data.resolution,
        settings.data.drop,
        WordCounter() if settings.tokenizer is None else build_tokenizer(settings.tokenizer),
        text.context_length,
        image.patch_size,
        image.position.max_grid_side,
        settings.seed,
    )
