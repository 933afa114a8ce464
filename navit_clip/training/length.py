"""How long a run is: so many steps, or so many samples."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunLength:
    """Where a run ends; one of the two is set.

    Attributes:
        steps: Optimiser steps.
        samples: Samples that all ranks together train on; the run ends with the first step at which
            so many are seen.
    """

    steps: int | None = None
    samples: int | None = None

    @property
    def total(self) -> int:
        """The number that is set."""
        total = self.samples if self.steps is None else self.steps
        assert total is not None
        return total

    def done(self, step: int, seen: int) -> int:
        """What `step` steps with `seen` samples are of `total`."""
        return seen if self.steps is None else step

    def is_over(self, step: int, seen: int) -> bool:
        """Whether nothing is left to do after so many steps and samples."""
        return self.done(step, seen) >= self.total

    def expected_steps(self, step: int, seen: int) -> float:
        """Steps of the whole run.

        Token budgets decide how many samples a step has. Of a run of samples it is what results if
        the steps to come have as many as those so far: infinity before the first one.
        """
        if self.steps is not None:
            return self.steps
        return step * self.total / seen if seen else math.inf
