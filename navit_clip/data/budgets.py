"""What one batch may hold: a token budget for each stream of the task, and a number of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

PackingMode = Literal["fill", "exact", "constant"]


@dataclass(frozen=True)
class Budgets:
    """What one batch of one rank may hold.

    Attributes:
        tokens: Tokens per batch, for each stream of the task.
        max_examples: Examples per batch, such as image–caption pairs.

    Raises:
        ValueError: If any of them is below 1.
    """

    tokens: dict[str, int] = field(default_factory=lambda: {"image": 16384, "text": 4096})
    max_examples: int = 512

    def __post_init__(self) -> None:
        named = {f"tokens.{stream}": count for stream, count in self.tokens.items()}
        for name, value in {**named, "max_examples": self.max_examples}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @cached_property
    def limits(self) -> tuple[int, ...]:
        """Token budgets in the order of the streams."""
        return tuple(self.tokens.values())

    @cached_property
    def most_examples(self) -> int:
        """Examples that can fit, each being at least one token in each stream."""
        return min(self.max_examples, *self.limits)

    def ordered(self, streams: Sequence[str]) -> Budgets:
        """The same with `tokens` in the order of a task's streams.

        Raises:
            ValueError: If they are not the same streams.
        """
        if set(streams) != set(self.tokens):
            raise ValueError(
                f"data.budget.tokens must name the streams {', '.join(streams)}, "
                f"got {', '.join(self.tokens) or 'none'}"
            )
        return replace(self, tokens={stream: self.tokens[stream] for stream in streams})

    def check(self, longest: Mapping[str, tuple[int, str]]) -> None:
        """Checks that a task's streams all have a budget, which holds their longest example.

        Args:
            longest: For each stream of the task the most tokens of one example, and the field of
                the configuration that limits it.

        Raises:
            ValueError: If not; the message names the fields.
        """
        for stream, budget in self.ordered([*longest]).tokens.items():
            tokens, limit = longest[stream]
            if tokens > budget:
                raise ValueError(
                    f"data.budget.tokens.{stream}={budget} cannot hold one example of "
                    f"{limit}={tokens}: raise the first or lower the second"
                )
