"""Which samples each step saw, for audits of the data order; off unless configured.

Beside metrics.jsonl in the run directory, one file per rank, cut at a restart in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from navit_clip.packed.batch import Batch
from navit_clip.training.metrics import truncate_log


class SampleLog:
    """Appends ``{"step", "reader", "ids"}`` for each batch to ``samples-RANK.jsonl``.

    Args:
        run_dir: Where the file lies.
        rank: Whose batches.
        step: The step the run goes on from; lines past it, from before a restart, are removed.
    """

    def __init__(self, run_dir: Path, rank: int, step: int) -> None:
        path = run_dir / f"samples-{rank}.jsonl"
        truncate_log(path, step)
        self._file = path.open("a")

    def write(self, step: int, batches: Sequence[Batch[Any]]) -> None:
        """Logs the batches of a step, counted from 1; on disk before the step's checkpoint is."""
        for batch in batches:
            reader = next(iter(batch.state))
            line = {"step": step, "reader": reader, "ids": batch.ids}
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
