"""Configuration of the data pipeline: what is read, how it is sized, dropped and packed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.augment import AugmentConfig
from navit_clip.data.budgets import Budgets, PackingMode
from navit_clip.data.drop import DropConfig
from navit_clip.data.sizing import ResolutionConfig


def check_captions(name: str, captions: Mapping[str, float]) -> None:
    """Refuses weights of caption fields that cannot be drawn from.

    Raises:
        ValueError: If there is none, one is not positive or names no field; begins with `name`.
    """
    if not captions or not all(0 < weight < math.inf for weight in captions.values()):
        raise ValueError(f"{name} must name fields with positive weights: {captions}")
    for caption_field in captions:
        extension, _, json_field = caption_field.partition(".")
        if extension == "json" and not json_field:
            raise ValueError(f"{name} must name a field of the JSON, such as json.caption")


@dataclass(frozen=True)
class DatasetConfig:
    """One of several datasets that are mixed.

    Attributes:
        shards: Its shards or image files, written as data.train is.
        weight: How many samples come from it, relative to the other datasets.
        captions: Its own weights of caption fields; null takes task.captions.
        files: How its image files are read, if it is no shards; null takes data.files.
    """

    shards: str | list[str]
    weight: float = 1.0
    captions: dict[str, float] | None = None
    files: FilesConfig | None = None

    @property
    def patterns(self) -> list[str]:
        """`shards` as a list."""
        return [self.shards] if isinstance(self.shards, str) else self.shards

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be a positive number, got {self.weight}")
        if self.captions is not None:
            check_captions("captions", self.captions)


@dataclass(frozen=True)
class DataConfig:
    """From shards to packed batches.

    Attributes:
        train: Shards, one or a list: paths, folders, globs, brace ranges, addresses (``https``,
            ``s3``, ``gs``, ``hf``, …), list files (``.txt``, one of these a line), or
            ``pipe:COMMAND``. Or image files as they are: a CSV, TSV, JSON-lines or Parquet table, a
            JSON of captions, a folder of images.
        mix: Instead of `train`, several datasets by name, each with its shards and weight.
        validation: Shards for the validation loss, given as `train` is; see eval.validation.
        samples: How many samples the shards of all datasets hold, for a run of `epochs`; null
            takes what stands beside them (manifest.jsonl, NAME_stats.json, sizes.json) or counts.
        allow_commands: Run the shell commands of ``pipe:`` shards.
        files: How image files are read that are no shards.
        validation_files: The same for validation; null takes files.
        resolution: How large an image becomes.
        drop: Which patches are left out.
        augment: How images are varied.
        budget: What one batch of one rank holds.
        packing: ``fill`` fills all budgets nearly; ``exact`` leaves no padding, dropping a few
            more patches; ``constant`` gives every batch budget.max_examples examples.
        look_ahead: Examples that wait beyond those of a batch, to choose from; more of them, less
            padding.
        pad_to_budget: Pad all streams to their budgets, so that compiled code sees one shape;
            without it a stream ends with its last token.
        shuffle_buffer: Samples that each reader shuffles among; 1 keeps the shards' order.
        workers: Reader processes per rank; 0 reads in the training process.
        prefetch: Batches that each worker prepares ahead.
        max_bad_samples: Unusable samples in a row after which a reader gives up.
    """

    train: str | list[str] = field(default_factory=list)
    mix: dict[str, DatasetConfig] = field(default_factory=dict)
    validation: str | list[str] = field(default_factory=list)
    samples: float | None = None
    allow_commands: bool = False
    files: FilesConfig = field(default_factory=FilesConfig)
    validation_files: FilesConfig | None = None
    resolution: ResolutionConfig = field(default_factory=ResolutionConfig)
    drop: DropConfig = field(default_factory=DropConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    budget: Budgets = field(default_factory=Budgets)
    packing: PackingMode = "fill"
    look_ahead: int = 256
    pad_to_budget: bool = True
    shuffle_buffer: int = 1000
    workers: int = 4
    prefetch: int = 4
    max_bad_samples: int = 10_000

    @property
    def datasets(self) -> dict[str, DatasetConfig]:
        """What is read, by name; nothing if neither `train` nor `mix` is given."""
        return self.mix or ({"train": DatasetConfig(self.train)} if self.train else {})

    def __post_init__(self) -> None:
        if self.train and self.mix:
            raise ValueError("train and mix exclude each other: give all datasets to mix")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        for name in ("look_ahead", "shuffle_buffer", "prefetch", "max_bad_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
