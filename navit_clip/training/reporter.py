"""What a run tells of itself, put together: of its begin, its steps and its evaluations.

`trainer` calls it on every rank; what it writes is rank 0's (`loggers`, `metrics.Progress`).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from navit_clip import __version__
from navit_clip.distributed import Ranks
from navit_clip.packed.batch import Batch
from navit_clip.tasks.base import Task
from navit_clip.tasks.media import Media
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.training.loggers import LogConfig, Loggers
from navit_clip.training.metrics import Progress
from navit_clip.training.nonfinite import NonFinite
from navit_clip.training.step import PendingStep, StepResult


class Reporter:
    """Reports one run.

    Attributes:
        loggers: On rank 0, once the run is open.
    """

    def __init__(
        self,
        config: LogConfig,
        run_dir: Path,
        task: Task,
        tokenizer: Tokenizer | None,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self.config, self.run_dir, self.ranks = config, run_dir, ranks
        self.task, self.tokenizer, self.progress = task, tokenizer, progress
        self.loggers: Loggers | None = None

    def open(self, resolved: dict[str, Any], facts: Mapping[str, Any], step: int) -> None:
        """Opens what is written; `facts` are what the trainer knows of the run."""
        if self.ranks.is_first:
            device = self.ranks.device
            is_cuda = device.type == "cuda"
            known = {
                **facts,
                "ranks": self.ranks.world_size,
                "device": torch.cuda.get_device_name(device) if is_cuda else "CPU",
                "navit_clip": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
            self.loggers = Loggers(
                self.run_dir, self.config, resolved, known, step, self.progress.log
            )

    def resumed(self) -> set[str]:
        """Keys already logged for the step the run goes on from; every rank calls it."""
        return self.ranks.broadcast(self.loggers.resumed if self.loggers else set())

    def begin(self, batch: Batch[Any]) -> None:
        """Draws the first batch, still on the host."""
        if self.loggers and self.config.media_every_steps:
            drawing = self.task.drawing(batch, self.tokenizer)
            if drawing is not None:
                self.loggers.show("first_batch", drawing, 0)

    def step(self, step: PendingStep, result: StepResult, rates: Mapping[str, float]) -> None:
        """Reports a logged step."""
        values = {
            "step": step.number,
            "loss": result.loss,
            "lr": result.lr,
            **result.metrics,
            "grad_norm": result.grad_norm,
            **result.measured,
            **rates,
        }
        if self.loggers:
            self.loggers.write(values)
        self.progress.show(values)

    def examples(self, step: PendingStep) -> None:
        """Shows what is to be seen of a step, if it is one of those."""
        every = self.config.media_every_steps
        if self.loggers and every and step.number % every == 0:
            inputs, outputs = step.batches[0].inputs, step.outputs[0]
            shown = self.task.examples(inputs, outputs, self.tokenizer)
            for name, one in shown.items():
                self.loggers.show(name, one, step.number)

    def evaluation(
        self, values: Mapping[str, float], line: str, shown: Mapping[str, Media]
    ) -> None:
        """Reports an evaluation, see `Evaluations.run`."""
        if self.loggers:
            self.loggers.write(values)
            for name, one in shown.items():
                self.loggers.show(name, one, int(values["step"]))
        self.progress.log(line)

    def exported(self, directory: Path) -> None:
        """Reports the exported model."""
        self.progress.log(f"model written to {directory}")
        if self.loggers:
            self.loggers.save_model(directory)

    def nonfinite(self, found: NonFinite) -> None:
        """Records a step that was not finite, and notifies."""
        if self.loggers:
            found.record(self.run_dir)
            self.loggers.alert("a step that is not finite", str(found))

    def stalled(self, line: str) -> None:
        """Notifies that this rank has stalled."""
        if self.loggers:
            self.loggers.alert("stalled", line)

    def close(self) -> None:
        """Closes what is open."""
        self.progress.close()
        if self.loggers:
            self.loggers.close()
