"""One training batch of one rank: packed inputs, counts, and where the data readers stand.

Knows no task: what a model's forward pass takes is `Inputs`, and each stream of tokens has a name
that the task's sample builder gives it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch

AnyInputs = TypeVar("AnyInputs", bound="Inputs")


class Inputs(Protocol):
    """What a model's forward pass takes; tensors, packed streams, ragged targets."""

    def to(self: AnyInputs, device: torch.device | str, non_blocking: bool = False) -> AnyInputs:
        """The same inputs on another device."""

    def pin_memory(self: AnyInputs) -> AnyInputs:
        """The same inputs in page-locked memory."""


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


@dataclass(frozen=True)
class Batch(Generic[AnyInputs]):
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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch[AnyInputs]:
        """The same batch with its inputs on another device."""
        return replace(self, inputs=self.inputs.to(device, non_blocking))

    def pin_memory(self) -> Batch[AnyInputs]:
        """The same batch in page-locked memory; called by `torch.utils.data.DataLoader`."""
        return replace(self, inputs=self.inputs.pin_memory())
