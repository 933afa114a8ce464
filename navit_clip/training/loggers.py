"""Where a run's metrics and examples go: metrics.jsonl and media/ always, dashboards if asked.

Rank 0 has one `Loggers`. What it writes to the run directory is part of the run, and a disk that
does not take it ends it; a dashboard that fails is left out from then on, in one line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from navit_clip.files import write_output
from navit_clip.tasks.media import Drawing, Histogram, Media, data_uri
from navit_clip.training.metrics import StepLog

_BINS = 30
_WAIT = 0.1  # fraction of the time that data is waited for, from which on
_WAITS = 3  # logged lines in a row there is an alert


@dataclass(frozen=True)
class LogConfig:
    """What the run reports.

    Attributes:
        every_steps: Steps between lines of metrics.jsonl and points on dashboards.
        media_every_steps: Steps between histograms and examples, in media/ and on dashboards; the
            first batch is drawn, and evaluations have examples of their own. 0: none of them.
        tensorboard: Also write files for TensorBoard, to tensorboard/.
        wandb: ``online``, ``offline`` (files for `wandb sync`), or ``disabled``.
        wandb_project: Project on the dashboard.
        wandb_name: Name of the run there; null takes the run directory's.
        wandb_entity: User or team of the project; null takes the user's own.
        wandb_group: Groups runs.
        wandb_job_type: Tells kinds of runs in a group apart.
        wandb_tags: Of the run.
        wandb_notes: What is to be known of the run.
        wandb_model: Upload the exported model as an artifact.
        samples: Also write the ids of every step's samples, to samples-RANK.jsonl.
    """

    every_steps: int = 10
    media_every_steps: int = 500
    tensorboard: bool = False
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    wandb_project: str = "navit-clip"
    wandb_name: str | None = None
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_job_type: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    wandb_notes: str | None = None
    wandb_model: bool = False
    samples: bool = False

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {self.every_steps}")
        if self.media_every_steps < 0:
            raise ValueError(f"media_every_steps must not be negative: {self.media_every_steps}")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError(
                "tensorboard needs the package of this name: pip install 'navit-clip[tensorboard]'"
            )


class Logger(Protocol):
    """A dashboard. Whatever it raises, the run goes on without it."""

    def log(self, values: Mapping[str, float]) -> None:
        """Takes a line of metrics.jsonl, by its plain keys; values may be NaN."""

    def show(self, name: str, shown: Media, step: int) -> None:
        """Takes a histogram, a picture or examples."""

    def alert(self, title: str, text: str) -> None:
        """Notifies whoever follows the run."""

    def save_model(self, directory: Path) -> None:
        """Takes the exported model."""

    def finish(self) -> None:
        """Takes what is still on its way, and closes."""


class Loggers:
    """All that rank 0 of a run reports to, see the module.

    Args:
        run_dir: Of the run.
        config: What is reported, and where.
        resolved: The run's configuration as plain values.
        facts: What else is to be known of the run: parameters, ranks, versions, data.
        step: The step the run goes on from, see `StepLog`.
        report: Takes a line for the user.

    Attributes:
        resumed: Keys already logged for that step.

    Raises:
        UserError: If a dashboard that was asked for cannot be opened by a run that begins, or the
            disk does not take the files.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        resolved: dict[str, Any],
        facts: dict[str, Any],
        step: int,
        report: Callable[[str], None],
    ) -> None:
        self._run_dir, self._config, self._report = run_dir, config, report
        self._waits = 0
        self._file = StepLog(run_dir / "metrics.jsonl", step)
        self.resumed = self._file.resumed
        write_output(run_dir / "facts.json", json.dumps(facts, indent=2) + "\n")
        self._dashboards: dict[str, Logger] = {}
        for name, is_asked in (
            ("tensorboard", config.tensorboard),
            ("wandb", config.wandb != "disabled"),
        ):
            if is_asked:
                self._open(name, resolved, facts, step)

    def _open(self, name: str, resolved: dict[str, Any], facts: dict[str, Any], step: int) -> None:
        # Imported on demand: each of them takes seconds.
        try:
            if name == "tensorboard":
                from navit_clip.training.tensorboard_logger import TensorBoard

                self._dashboards[name] = TensorBoard(self._run_dir / name, step)
            else:
                from navit_clip.training.wandb_logger import Wandb

                self._dashboards[name] = Wandb(self._run_dir, self._config, resolved, facts)
        except Exception as error:
            if not step:
                raise
            self._leave_out(name, error)

    def write(self, values: Mapping[str, float]) -> None:
        """Takes metrics; every line has a ``step``."""
        # A skipped step's loss may be NaN, which is not JSON.
        self._file.write({k: v if math.isfinite(v) else None for k, v in values.items()})
        self._each(lambda dashboard: dashboard.log(values))
        if "data_wait" in values:
            self._waits = self._waits + 1 if values["data_wait"] > _WAIT else 0
            if self._waits == _WAITS:
                self.alert(
                    "waiting for data",
                    f"step {values['step']}: {values['data_wait']:.0%} of the time is spent on it",
                )

    def show(self, name: str, shown: Media, step: int) -> None:
        """Takes a histogram, a picture or examples; media/ keeps the newest of each name."""
        content = json.dumps({"step": step, **_to_json(shown)}) + "\n"
        write_output(self._run_dir / "media" / f"{name}.json", content)
        self._each(lambda dashboard: dashboard.show(name, shown, step))

    def alert(self, title: str, text: str) -> None:
        """Notifies those who follow the run on a dashboard."""
        self._each(lambda dashboard: dashboard.alert(title, text))

    def save_model(self, directory: Path) -> None:
        """Uploads the exported model, if that was asked for."""
        if self._config.wandb_model:
            self._each(lambda dashboard: dashboard.save_model(directory))

    def close(self) -> None:
        """Closes all of them."""
        self._file.close()
        self._each(lambda dashboard: dashboard.finish())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, dashboard in list(self._dashboards.items()):
            try:
                call(dashboard)
            except Exception as error:  # of their libraries, which raise from many families
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self._dashboards.pop(name, None)
        reason = " ".join(str(error).split()) or type(error).__name__
        self._report(f"{name}: {reason}; the run goes on without it, metrics.jsonl has everything")


def _to_json(shown: Media) -> dict[str, Any]:
    """As run reports read it."""
    if isinstance(shown, Histogram):
        counts, edges = np.histogram(shown.values, _BINS)
        return {"counts": counts.tolist(), "edges": edges.tolist()}
    if isinstance(shown, Drawing):
        return {"picture": data_uri(shown.picture)}
    rows = [{"picture": data_uri(row.picture), "texts": row.texts} for row in shown.rows]
    return {"rows": rows}
