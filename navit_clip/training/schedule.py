"""Learning rate over a run: linear warm-up, then cosine, rsqrt or constant, then cool-down."""

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
        warmup_samples: If given, instead of `warmup_steps`: samples of all ranks.
        cooldown_steps: Last steps, over which the rate falls linearly to zero. In a run of samples
            or epochs they are the last ones if steps go on to have as many samples as so far.
        cooldown_samples: If given, instead of `cooldown_steps`: the last samples.
        timescale: Of ``rsqrt``: steps after warm-up until the rate has fallen to 1/√2.
        final_share: Of ``cosine``: share of the peak that is left at the end.
    """

    kind: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_samples: float | None = None
    cooldown_steps: int = 0
    cooldown_samples: float | None = None
    timescale: int = 10_000
    final_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "warmup_samples", "cooldown_steps", "cooldown_samples"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise ValueError(f"{name} must not be negative, got {number}")
        if self.timescale < 1:
            raise ValueError(f"timescale must be at least 1, got {self.timescale}")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"final_share must lie in [0, 1], got {self.final_share}")

    def in_steps(self, per_step: float) -> tuple[float, float]:
        """Steps of warm-up and of cool-down, if a step has so many samples."""
        warmup, cooldown = float(self.warmup_steps), float(self.cooldown_steps)
        if self.warmup_samples is not None:
            warmup = self.warmup_samples / per_step if per_step else math.inf
        if self.cooldown_samples is not None:
            cooldown = self.cooldown_samples / per_step if per_step else 0.0
        return warmup, cooldown

    def misfit(self, steps: float, per_step: float) -> str | None:
        """Names a warm-up or cool-down that a run cannot hold; None if there is none.

        Args:
            steps: Of the run.
            per_step: Samples of a step; infinity leaves out what is given in samples.
        """
        warmup, cooldown = self.in_steps(per_step)
        if warmup + cooldown <= steps:
            return None
        part = "warmup" if warmup > cooldown else "cooldown"
        unit = "steps" if getattr(self, f"{part}_samples") is None else "samples"
        return (
            f"optim.schedule.{part}_{unit}: {steps:,.0f} steps cannot hold {warmup:,.0f} of "
            f"warm-up and {cooldown:,.0f} of cool-down: lower those or make the run longer"
        )


def lr_multiplier(config: ScheduleConfig, step: int, steps: float, seen: int = 0) -> float:
    """Multiple of the peak learning rate.

    What is given in samples becomes steps at the mean number of samples of the steps so far, which
    makes progress within it one in samples.

    Args:
        config: Of the schedule.
        step: For which step, from 0.
        steps: Of the run, as many as are expected at this step.
        seen: Samples seen before this step.
    """
    warmup, cooldown = config.in_steps(seen / step if step else 0.0)
    multiplier = 1.0
    past_warmup = step - warmup
    if past_warmup < 0:
        multiplier = (step + 1) / (warmup + 1)
    elif config.kind == "cosine":
        span = max(1, steps - warmup - cooldown)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, past_warmup / span)))
        multiplier = config.final_share + (1 - config.final_share) * cosine
    elif config.kind == "rsqrt":
        multiplier = math.sqrt(config.timescale / (config.timescale + past_warmup))
    if cooldown:
        multiplier *= min(1.0, (steps - step) / (cooldown + 1))
    return multiplier
