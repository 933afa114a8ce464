"""Configuration of the data pipeline: what is read, how it is sized, dropped and packed."""

from __future__ import annotations

from dataclasses import dataclass, field

from navit_clip.data.drop import DropConfig
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.packing import Budgets


@dataclass(frozen=True)
class DataConfig:
    """From shards to packed batches.

    Attributes:
        train: Shards, one or a list: paths, folders, globs or brace ranges.
        captions: Caption source to sampling weight; ``txt`` or ``json.FIELD``.
        resolution: How large an image becomes.
        drop: Which patches are left out.
        budget: What one batch of one rank holds.
        look_ahead: Pairs that may wait for a better fitting batch.
        pad_to_budget: Pad both streams to their budgets, so that compiled code sees one shape;
            without it a stream ends with its last token.
        shuffle_buffer: Samples that each reader shuffles among; 1 keeps the shards' order.
        workers: Reader processes per rank; 0 reads in the training process.
        prefetch: Batches that each worker prepares ahead.
        max_bad_samples: Unusable samples in a row after which a reader gives up.

    Raises:
        ValueError: If a field is out of range or one image cannot fit the budget.
    """

    train: str | list[str] = field(default_factory=list)
    captions: dict[str, float] = field(default_factory=lambda: {"txt": 1.0})
    resolution: ResolutionConfig = field(default_factory=ResolutionConfig)
    drop: DropConfig = field(default_factory=DropConfig)
    budget: Budgets = field(default_factory=Budgets)
    look_ahead: int = 64
    pad_to_budget: bool = True
    shuffle_buffer: int = 1000
    workers: int = 4
    prefetch: int = 4
    max_bad_samples: int = 10_000

    @property
    def train_patterns(self) -> list[str]:
        """`train` as a list."""
        return [self.train] if isinstance(self.train, str) else self.train

    def __post_init__(self) -> None:
        if not self.captions or any(weight <= 0 for weight in self.captions.values()):
            raise ValueError(f"captions must name sources with positive weights: {self.captions}")
        for name in ("look_ahead", "shuffle_buffer", "prefetch", "max_bad_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if self.resolution.max_tokens > self.budget.image_tokens:
            raise ValueError(
                f"budget.image_tokens={self.budget.image_tokens} cannot hold one image of "
                f"resolution.max_tokens={self.resolution.max_tokens}: raise the first or lower "
                "the second"
            )
