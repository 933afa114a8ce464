"""One training batch of one rank: packed inputs, counts, and where the data readers stand.

Knows no task: what a model's forward pass takes is `Inputs`, and each stream of tokens has a name
that the task's sample builder gives it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from navit_clip.packed.movable import Movable

AnyInputs = TypeVar("AnyInputs", bound="Inputs")


class Inputs(Movable):
    """What a model's forward pass takes: a dataclass of tensors, packed streams, ragged targets."""


@dataclass(frozen=True)
class StreamCounts:
    """Tokens of one stream of a batch.

    Attributes:
        tokens: Real tokens, after token drop.
        tokens_before_drop: Tokens of the whole examples.
        budget: Tokens that the batch may hold.
        slots: Tokens that the model computes, padding included.
    """

    tokens: int
    tokens_before_drop: int
    budget: int
    slots: int


@dataclass(frozen=True)
class BatchCounts:
    """What went into one batch, for logs and dashboards.

    Attributes:
        examples: Such as image–caption pairs.
        streams: Tokens of each stream, by name.
        datasets: Examples by dataset of the mixture.
        skipped: Samples skipped since the reader's previous batch, by reason.
        skip_log: A line for the first few of them, naming each.
    """

    examples: int
    streams: dict[str, StreamCounts] = field(default_factory=dict)
    datasets: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    skip_log: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Real tokens of all streams."""
        return sum(stream.tokens for stream in self.streams.values())


@dataclass(frozen=True)
class Batch(Movable, Generic[AnyInputs]):
    """One training batch of one rank.

    Attributes:
        inputs: What the model's forward pass takes.
        ids: A stable id per example, ``shard/key``.
        counts: What the batch holds and what was skipped on the way.
        state: Where the reader stands once this batch is consumed, by the reader's number.
    """

    inputs: AnyInputs
    ids: tuple[str, ...]
    counts: BatchCounts
    state: dict[int, Any] = field(default_factory=dict)
