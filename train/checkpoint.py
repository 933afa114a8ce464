"""Checkpoints: weights, optimiser and data position, written whole or not at all.

A checkpoint is a folder ``step-00001000`` of `torch.distributed.checkpoint` files plus each rank's
data position. It is written under another name and renamed once complete, so a folder with the
right name can be trusted whenever the writer was killed.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from navit_clip.data.loader import LoaderPosition
from navit_clip.errors import UserError
from navit_clip.ranks import Ranks

_NAME = re.compile(r"^step-(\d{8})$")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: Where they are kept.
        keep: How many of the latest stay.
        ranks: This process among all of them.
        readers: Data readers of the whole run; a checkpoint resumes under the same number.
    """

    def __init__(self, directory: Path, keep: int, ranks: Ranks, readers: int) -> None:
        self.directory, self.keep, self.ranks = directory, keep, ranks
        self.readers = readers

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without any."""
        return max(self._steps(), default=None)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint taken after `step` steps."""
        return self.directory / f"step-{step:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, position: LoaderPosition
    ) -> Path:
        """Writes the state after `step` steps; every rank calls it.

        Raises:
            UserError: If the disk does not take it; earlier checkpoints stay as they are.
        """
        final = self.path(step)
        if final.exists():
            return final
        partial = final.with_name(final.name + ".partial")
        try:
            if self.ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.ranks.barrier()
            (partial / f"position-{self.ranks.rank}.json").write_text(json.dumps(asdict(position)))
            with _quiet():
                dcp.save(_state(model, optimizer), checkpoint_id=str(partial))
            if self.ranks.is_first:
                (partial / "run.json").write_text(
                    json.dumps(
                        {
                            "step": step,
                            "world_size": self.ranks.world_size,
                            "readers": self.readers,
                        }
                    )
                )
                partial.rename(final)
                self._prune()
        except OSError as error:
            raise UserError(
                f"cannot write checkpoint {final}: {error.strerror or error}; the latest complete "
                f"one is step {self.latest()}"
            ) from error
        self.ranks.barrier()
        return final

    def load(self, step: int, model: nn.Module, optimizer: Optimizer) -> LoaderPosition:
        """Restores the state after `step` steps into model and optimiser.

        Returns:
            Where this rank's loader goes on.

        Raises:
            UserError: If the checkpoint is damaged, or was taken with another model, number of
                ranks or number of workers.
        """
        path = self.path(step)
        try:
            run = json.loads((path / "run.json").read_text())
            world_size, readers = run["world_size"], run["readers"]
            if (world_size, readers) != (self.ranks.world_size, self.readers):
                raise UserError(
                    f"{path} was taken with {world_size} rank(s) of "
                    f"{readers // world_size} reader(s), this run has {self.ranks.world_size} of "
                    f"{self.readers // self.ranks.world_size}: resume with the same numbers"
                )
            state = _state(model, optimizer)
            with _quiet():
                dcp.load(state, checkpoint_id=str(path))
            position = json.loads((path / f"position-{self.ranks.rank}.json").read_text())
        except (OSError, ValueError, KeyError, RuntimeError, dcp.CheckpointException) as error:
            raise UserError(
                f"cannot resume from {path}: {str(error).splitlines()[0]}; if the configuration "
                "changed use another run_dir, if the checkpoint is damaged delete it"
            ) from error
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return LoaderPosition(**position)

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        matches = (_NAME.match(path.name) for path in self.directory.iterdir())
        return [int(match[1]) for match in matches if match]

    def _prune(self) -> None:
        for step in sorted(self._steps())[: -self.keep]:
            shutil.rmtree(self.path(step), ignore_errors=True)


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warning that a single process saves without a process group; it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        yield
