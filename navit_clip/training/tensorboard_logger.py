"""TensorBoard as a `navit_clip.training.loggers.Logger`."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from navit_clip.tasks.media import Drawing, Histogram, Media
from navit_clip.training.sections import dashboard_key, media_key


class TensorBoard:
    """Files for ``tensorboard --logdir``.

    Args:
        folder: Where they go.
        step: The step the run goes on from; points past it, of before a restart, are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._step = step

    def log(self, values: Mapping[str, float]) -> None:
        """A point of each metric that is a number."""
        self._step = int(values["step"])
        for key, value in values.items():
            if key != "step" and math.isfinite(value):
                self._writer.add_scalar(dashboard_key(key), value, self._step)

    def show(self, name: str, shown: Media, step: int) -> None:
        """A histogram, a picture, or the examples as a table with pictures beside."""
        key = media_key(name)
        if isinstance(shown, Histogram):
            self._writer.add_histogram(key, shown.values, step)
        elif isinstance(shown, Drawing):
            self._writer.add_image(key, _pixels(shown.picture), step, dataformats="HWC")
        else:
            labels = list(shown.rows[0].texts)
            table = [["", *labels], ["-"] * (len(labels) + 1)]
            table += [[str(i), *row.texts.values()] for i, row in enumerate(shown.rows, 1)]
            cells = ([cell.replace("|", "\\|") for cell in row] for row in table)
            text = "\n".join(f"| {' | '.join(row)} |" for row in cells)
            self._writer.add_text(key, text, step)
            for number, row in enumerate(shown.rows, 1):
                if row.picture is not None:
                    pixels = _pixels(row.picture)
                    self._writer.add_image(f"{key}/{number}", pixels, step, dataformats="HWC")

    def alert(self, title: str, text: str) -> None:
        """A text, since nobody can be notified."""
        self._writer.add_text("alerts", f"{title}: {text}", self._step)

    def save_model(self, directory: Path) -> None:
        """Nothing: there is no place for it."""

    def finish(self) -> None:
        """Writes what is left."""
        self._writer.close()


def _pixels(webp: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"))
