"""The best model so far: exported whenever its metric beats those before it.

`navit_clip.training.evaluation` offers it every new value of the chosen metric; the folder beside
``model/`` has the same form, and ``best.json`` in it says which value and step it is of.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from navit_clip.files import reading, writing

MARK = "best.json"


class BestModel:
    """``best/`` of a run directory, written by rank 0.

    Args:
        run_dir: Where it lies.
        metric: What is compared; the folder of another metric is replaced by the first offer.
        lower: Whether a smaller value is better.

    Attributes:
        value: The best so far, None without any.
        step: The step it belongs to.

    Raises:
        UserError: If the folder there cannot be read.
    """

    def __init__(self, run_dir: Path, metric: str, *, lower: bool) -> None:
        self.path, self.metric, self.lower = run_dir / "best", metric, lower
        self.value: float | None = None
        self.step: int | None = None
        self._partial = run_dir / "best.partial"
        self._removed = run_dir / "best.removed"
        if not self.path.exists() and (self._partial / MARK).is_file():
            self._partial.rename(self.path)  # killed between the two renames of `offer`
        mark = self.path / MARK
        if mark.is_file():
            with reading(mark, ValueError, KeyError, TypeError, hint=f"; remove {self.path}"):
                found = json.loads(mark.read_text())
                if found["metric"] == metric:
                    self.value, self.step = float(found["value"]), int(found["step"])

    def offer(self, value: float, step: int, save: Callable[[Path], None]) -> bool:
        """Keeps a model if it is better than all before it, and returns whether it is.

        NaN and infinity are never better. `save` writes the model to a folder.

        Raises:
            UserError: If the disk does not take it; the one before stays.
        """
        if not math.isfinite(value):
            return False
        if self.value is not None and (value >= self.value if self.lower else value <= self.value):
            return False
        with writing(self.path):
            for leftover in (self._partial, self._removed):
                shutil.rmtree(leftover, ignore_errors=True)
            save(self._partial)
            mark = {"metric": self.metric, "value": value, "step": step}
            (self._partial / MARK).write_text(json.dumps(mark) + "\n")
            if self.path.exists():
                self.path.rename(self._removed)
            self._partial.rename(self.path)
        shutil.rmtree(self._removed, ignore_errors=True)
        self.value, self.step = value, step
        return True
