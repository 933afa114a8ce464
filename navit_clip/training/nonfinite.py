"""What happens when a loss or a gradient is no longer a number.

`step` keeps the optimiser from spreading it to every weight, on the device, and asks here once the
host knows of it: the run stops, or the step was skipped, and either way the examples are named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from navit_clip.distributed import Ranks
from navit_clip.files import writing

NONFINITE_FILE = "nonfinite.jsonl"
_NAMED = 8


@dataclass(frozen=True)
class NonFinite:
    """A step that made no update.

    Attributes:
        step: Its number, from 1.
        loss: Over the examples of all ranks.
        grad_norm: Global norm of the gradient.
        suspects: Ids of examples whose own outputs are not finite; none if only the loss or the
            gradient overflowed.
        examples: Ids of all examples of all ranks and micro-batches.
    """

    step: int
    loss: float
    grad_norm: float
    suspects: tuple[str, ...]
    examples: tuple[str, ...]

    def __str__(self) -> str:
        named = self.suspects or self.examples
        more = len(named) - _NAMED
        return (
            f"loss {self.loss}, gradient norm {self.grad_norm} at step {self.step}, examples "
            f"{', '.join(named[:_NAMED])}{f' and {more} more' if more > 0 else ''}"
            f"{', which have non-finite outputs' if self.suspects else ''} "
            f"(all {len(self.examples)} examples in {NONFINITE_FILE})"
        )

    def record(self, run_dir: Path) -> None:
        """Appends everything as one line to nonfinite.jsonl.

        Raises:
            UserError: If the disk does not take it.
        """
        # JSON has no NaN.
        line = vars(self) | {"loss": str(self.loss), "grad_norm": str(self.grad_norm)}
        path = run_dir / NONFINITE_FILE
        with writing(path), path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class NonFiniteError(Exception):
    """The run cannot go on; no update was made.

    Args:
        found: The step.
        in_row: How many steps in a row were like it, if the run skips such steps.
    """

    def __init__(self, found: NonFinite, in_row: int | None = None) -> None:
        self.found = found
        super().__init__(str(found) + (f"; {in_row} steps in a row skipped" if in_row else ""))


def find_examples(
    ids: Sequence[str], outputs: Sequence[Any], ranks: Ranks
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids of the suspects of a failed step, and of all its examples; every rank calls it.

    `outputs` are the model's for all of this rank's examples, in order; one or several sequences.
    If their rows are no examples but patches, there are no suspects.
    """
    finite = [flag for output in outputs for flag in _finite_rows(output).tolist()]
    if len(finite) != len(ids):
        finite = [True] * len(ids)
    suspects = [name for name, is_finite in zip(ids, finite, strict=True) if not is_finite]
    return tuple(ranks.gather(suspects)), tuple(ranks.gather(list(ids)))


def _finite_rows(output: Sequence[object]) -> Tensor:
    """Bool [E]: whether all that the model computed for an example is finite."""
    rows = [value for value in output if isinstance(value, Tensor) and value.ndim]
    finite = [torch.isfinite(value[:, None]).flatten(1).all(1) for value in rows]
    return torch.stack(finite).all(0)


@dataclass
class NonFiniteGuard:
    """Decides whether a run goes on.

    Attributes:
        policy: ``stop`` at the first non-finite step, or ``skip`` it.
        max_in_row: Skipped steps in a row after which a run that skips stops as well.
        skipped_steps: Steps skipped so far in the whole run.
        in_row: How many of them were the latest steps.
    """

    policy: Literal["stop", "skip"]
    max_in_row: int
    skipped_steps: int = 0
    in_row: int = 0

    def failed(self, found: NonFinite) -> None:
        """Counts a non-finite step.

        Raises:
            NonFiniteError: If the run must stop.
        """
        if self.policy == "stop":
            raise NonFiniteError(found)
        self.skipped_steps += 1
        self.in_row += 1
        if self.in_row >= self.max_in_row:
            raise NonFiniteError(found, self.in_row)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped_steps": self.skipped_steps, "in_row": self.in_row}
