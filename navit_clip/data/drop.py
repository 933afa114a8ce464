"""Continuous token drop: how many patches of an image are left out, and which.

After sizing, before packing (NaViT, continuous token dropping): the rate differs per image and
may follow the image's length or the images seen so far. Nothing is dropped at inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from navit_clip.data.sizing import ramp, truncated_normal


@dataclass(frozen=True)
class DropConfig:
    """How the fraction of dropped patches is drawn.

    Attributes:
        kind: ``none``; ``fixed``, the same rate for all; ``beta``, per image around the rate;
            ``resolution``, more from larger images.
        rate: Rate of ``fixed``, mean rate of ``beta``, as long as `schedule` is constant.
        max_rate: Of ``beta``: no image loses more than this fraction.
        low_rate: Of ``resolution``: mean rate at `low_tokens` patches.
        high_rate: Of ``resolution``: mean rate at `high_tokens` patches.
        low_tokens: Of ``resolution``: length at which the rate is `low_rate`.
        high_tokens: Of ``resolution``: length at which the rate is `high_rate`.
        schedule: ``constant``; or ``sigmoid``, the rate of ``fixed`` and ``beta`` moves over
            training as ρ(n) = low + (high - low)·sigmoid((n - μ)/τ) between `schedule_low` and
            `schedule_high`.
        schedule_low: ρ_min.
        schedule_high: ρ_max.
        schedule_images: N, images over which the schedule runs.
        schedule_midpoint: μ / N.
        schedule_width: τ / N; negative for a falling rate. The paper's best falls slowly: -0.2
            around 2/3.
        ramp_images: Images over which every drawn rate rises from zero to its full value, in
            proportion, for a model that has never missed a patch; 0 drops in full at once.
    """

    kind: Literal["none", "fixed", "beta", "resolution"] = "none"
    rate: float = 0.5
    max_rate: float = 0.9
    low_rate: float = 0.2
    high_rate: float = 0.8
    low_tokens: int = 16
    high_tokens: int = 256
    schedule: Literal["constant", "sigmoid"] = "constant"
    schedule_low: float = 0.2
    schedule_high: float = 0.8
    schedule_images: int = 0
    schedule_midpoint: float = 2 / 3
    schedule_width: float = -0.2
    ramp_images: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "max_rate", "low_rate", "high_rate", "schedule_low", "schedule_high"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        lowest = highest = self.rate
        if self.schedule == "sigmoid":
            lowest, highest = self.schedule_low, self.schedule_high
        if lowest > highest:
            raise ValueError(
                "schedule_low must not exceed schedule_high (schedule_width < 0 makes it fall), "
                f"got schedule_low={lowest} schedule_high={highest}"
            )
        if self.kind == "beta" and lowest == 0:
            name = "rate" if self.schedule == "constant" else "schedule_low"
            raise ValueError(f"{name} must be positive for kind beta, got 0")
        if self.kind == "beta" and highest >= self.max_rate:
            raise ValueError(
                f"max_rate must exceed the mean rate, got max_rate={self.max_rate} rate={highest}"
            )
        if self.low_tokens >= self.high_tokens:
            raise ValueError(
                "low_tokens must be below high_tokens, got "
                f"low_tokens={self.low_tokens} high_tokens={self.high_tokens}"
            )
        if self.schedule == "sigmoid":
            if self.schedule_images < 1:
                raise ValueError("schedule_images must be given for a sigmoid schedule")
            if self.schedule_width == 0:
                raise ValueError("schedule_width must not be 0")
            if self.kind not in ("fixed", "beta"):
                raise ValueError(f"schedule must be constant for kind {self.kind}")
        if self.ramp_images < 0:
            raise ValueError(f"ramp_images must not be negative, got {self.ramp_images}")
        if self.ramp_images and self.kind == "none":
            raise ValueError("ramp_images needs a kind of drop, got kind=none")

    def remark(self) -> str | None:
        """A line for the log where fields say how much is dropped and `kind` drops nothing.

        No error: a flag may switch off the drop of a recipe. A value like its default is not seen.
        """
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.kind != "none" or not given:
            return None
        return (
            f"data.drop.kind is none, so no patch is dropped (unused: {', '.join(given)}); fixed, "
            "beta and resolution drop some"
        )


def mean_rate(config: DropConfig, images_seen: float) -> float:
    """The rate of ``fixed`` and ``beta`` after so many images (NaViT, sigmoid schedule)."""
    if config.schedule == "constant":
        return config.rate
    n = images_seen / config.schedule_images
    step = _sigmoid((n - config.schedule_midpoint) / config.schedule_width)
    return config.schedule_low + (config.schedule_high - config.schedule_low) * step


def sample_rate(
    config: DropConfig, tokens: int, images_seen: float, rng: np.random.Generator
) -> float:
    """Draws the fraction to drop of an image of so many patches, less of it during the ramp."""
    if config.kind == "none":
        return 0.0
    if config.kind == "resolution":
        # Normal with deviation 0.02 around a mean linear in the length, cut at two deviations.
        span = config.high_tokens - config.low_tokens
        t = min(max((tokens - config.low_tokens) / span, 0.0), 1.0)
        mean = config.low_rate + (config.high_rate - config.low_rate) * t
        rate = truncated_normal(rng, mean, 0.02, mean - 0.04, mean + 0.04)
        rate = min(max(rate, 0.0), 1.0)
    else:
        rate = mean_rate(config, images_seen)
        if config.kind == "beta":
            # Mean u and variance 0.3·u(1 - u) of a Beta give α = 7u/3, β = 7(1 - u)/3.
            u = rate / config.max_rate
            rate = config.max_rate * rng.beta(7 / 3 * u, 7 / 3 * (1 - u))
    return rate * ramp(images_seen, config.ramp_images)


def keep_patches(tokens: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Which of a grid's patches stay where a fraction `rate` is dropped.

    Returns:
        int64 [n], at least one index, a uniform subset in rising order.
    """
    kept = max(1, round(tokens * (1 - rate)))
    if kept == tokens:
        return np.arange(tokens)
    return np.sort(rng.permutation(tokens)[:kept])


def hide_patches(tokens: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Which of a grid's patches are visible where the others are predicted.

    As `keep_patches`, but of two patches or more at least one is hidden, however low the rate.
    """
    return keep_patches(tokens, max(rate, 1 / tokens), rng)


def _sigmoid(x: float) -> float:
    # exp of a large positive number overflows, of a large negative one does not.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
