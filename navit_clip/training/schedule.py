"""Learning rate over the steps: linear warm-up, then cosine, rsqrt or constant, then cool-down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule of the learning rate.

    Attributes:
        kind: ``cosine`` to `final_share` of the peak; ``rsqrt``, the paper's, falling with the
            root of the step; ``constant``.
        warmup_steps: Steps of linear rise from zero.
        cooldown_steps: Last steps, over which the rate falls linearly to zero.
        timescale: Of ``rsqrt``: steps after warm-up until the rate has fallen to 1/√2.
        final_share: Of ``cosine``: share of the peak that is left at the end.
    """

    kind: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    timescale: int = 10_000
    final_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "cooldown_steps"):
            steps = getattr(self, name)
            if steps < 0:
                raise ValueError(f"{name} must not be negative, got {steps}")
        if self.timescale < 1:
            raise ValueError(f"timescale must be at least 1, got {self.timescale}")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"final_share must lie in [0, 1], got {self.final_share}")


def lr_multiplier(config: ScheduleConfig, step: int, steps: int) -> float:
    """Multiple of the peak learning rate for step `step`, from 0, of a run of `steps`."""
    multiplier = 1.0
    past_warmup = step - config.warmup_steps
    if past_warmup < 0:
        multiplier = (step + 1) / (config.warmup_steps + 1)
    elif config.kind == "cosine":
        span = max(1, steps - config.warmup_steps - config.cooldown_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, past_warmup / span)))
        multiplier = config.final_share + (1 - config.final_share) * cosine
    elif config.kind == "rsqrt":
        multiplier = math.sqrt(config.timescale / (config.timescale + past_warmup))
    if config.cooldown_steps:
        multiplier *= min(1.0, (steps - step) / (config.cooldown_steps + 1))
    return multiplier
