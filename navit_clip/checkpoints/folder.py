"""The folders of a run and its checkpoints: their names, which are whole, how they come and go.

Below `checkpoint`, which the trainer writes and reads with, and `load_run`, which reads one
without a trainer.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from navit_clip.checkpoints.manifest import DamagedError, Manifest

RUN_MODEL = "model.json"  # in a run directory: the architecture that its checkpoints are of
TOKENIZER_DIR = "tokenizer"  # in a run directory: the tokenizer that the run uses
PARTIAL, REMOVED, _DAMAGED = ".partial", ".removed", ".damaged"
_NAME = re.compile(r"^step-(\d{8})$")


def step_folder(directory: Path, step: int) -> Path:
    """Folder of the checkpoint taken after `step` steps."""
    return directory / f"step-{step:08d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps of all complete checkpoints, in rising order."""
    if not directory.is_dir():
        return []
    matches = (_NAME.match(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(folder.name + PARTIAL)


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> Collection[str]:
    """What is wrong with a checkpoint, nothing if it is as it was written.

    Args:
        folder: Of the checkpoint.
        rank: Files are read in full, so ranks share them out: this one reads every
            `world_size`-th.
        world_size: Number of ranks that share them.
    """
    try:
        manifest = Manifest.read(folder)
        manifest.check(folder, sorted(manifest.files)[rank::world_size])
    except DamagedError as error:
        return [str(error)]
    match = _NAME.match(folder.name)
    if match is not None and manifest.step != int(match[1]):
        return [f"it is of step {manifest.step}"]
    return []


def remove(folder: Path) -> None:
    """Removes a checkpoint; a kill halfway must not leave a part of it under its name."""
    doomed = folder.with_name(folder.name + REMOVED)
    with suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path, damage: str) -> str:
    """Keeps a damaged checkpoint under another name.

    Returns:
        A line that says so.
    """
    aside = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        folder.rename(aside)
    return f"checkpoint {folder.name} is damaged ({damage}), kept as {aside.name}"
