"""The folders of a run and its checkpoints: their names, what belongs to one, whether it is whole.

The last file that is written into the folder of a checkpoint is its manifest, ``run.json``: size
and hash of every file, so that a damaged one is noticed before anything is loaded, the shapes of
the weights, which tell another model from a broken disk, and a hash of all this. A checkpoint also
holds what it takes to read it and to go on from it: ``model.json``, the tokenizer, the resolved
configuration, and what the shards looked like.

Below `checkpoint`, which the trainer writes and reads with, and `load_run`, which reads one
without a trainer.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from navit_clip.errors import OutageError, UserError, may_pass
from navit_clip.files import atomic_write, flush_to_disk, sha256_of

RUN_MODEL = "model.json"  # in a checkpoint: architecture and preprocessing
RUN_CONFIG = "config.yaml"  # in a checkpoint: of the command that wrote it
RUN_SHARDS = "shards.json"  # in a checkpoint: see `navit_clip.data.fingerprint`
PARTIAL, REMOVED, _DAMAGED = ".partial", ".removed", ".damaged"
FORMAT = 4  # of a checkpoint; read no other. 4: readers that share shards deal them otherwise
MANIFEST, _CHECKSUM = "run.json", "checksum"
_NAME = re.compile(r"^step-(\d{8})$")


def step_folder(directory: Path, step: int) -> Path:
    """Folder of the checkpoint taken after `step` steps."""
    return directory / f"step-{step:08d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps of all complete checkpoints, in rising order."""
    if not directory.is_dir():
        return []
    steps = (step_of(path.name) for path in directory.iterdir())
    return sorted(step for step in steps if step is not None)


def step_of(name: str) -> int | None:
    """The step of a complete checkpoint by its folder's name, None if that is none."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(folder.name + PARTIAL)


def shapes(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shape of each weight by its name, of the whole one where ranks hold shards."""
    return {name: list(weight.shape) for name, weight in weights.items()}


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds.

    Attributes:
        step: Steps taken before it.
        world_size: Ranks of the run that wrote it.
        weights: Shapes of the model's weights, see `shapes`.
        files: Size in bytes and SHA-256 of every other file of the folder.
        format: Of the checkpoint.
    """

    step: int
    world_size: int
    weights: dict[str, list[int]]
    files: dict[str, list[Any]]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes run.json.

        Raises:
            OSError: If the disk does not take it.
        """
        values = asdict(self)
        content = json.dumps({**values, _CHECKSUM: _checksum(values)})
        atomic_write(folder / MANIFEST, content)
        flush_to_disk(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads run.json.

        Raises:
            ValueError: If it is absent, or not what `write` wrote.
            UserError: If another version wrote it.
            OutageError: If the disk is out of reach.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            checksum = values.pop(_CHECKSUM, None)
            # Before the format, which a flipped bit changes as well; earlier ones had no checksum.
            if checksum is not None and checksum != _checksum(values):
                raise ValueError("it has other contents than were written")
            found = values.get("format", 1 if "files" in values else None)
            known = type(found) is int and (checksum is not None or found in (1, 2))
            if known and found != FORMAT:
                raise UserError(
                    f"{path} has format {found}, this version reads {FORMAT}: finish the run with "
                    "the version that wrote it, or use another run_dir"
                )
            if checksum is None:
                raise ValueError("it has no checksum")
            manifest = cls(**values)
            manifest._check_types()
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            _refuse_outage(path, error)
            raise ValueError(f"{MANIFEST} cannot be read: {error}") from error
        return manifest

    def _check_types(self) -> None:
        """Refuses what only a program other than `write` can have given a checksum."""
        numbers = (self.step, self.world_size)
        plain = all(type(number) is int and 0 <= number < 10**8 for number in numbers)
        files = isinstance(self.files, dict) and all(
            Path(name).name == name
            and isinstance(entry, list)
            and list(map(type, entry)) == [int, str]
            for name, entry in self.files.items()
        )
        if not (plain and self.world_size and files and self.files):
            raise ValueError("it names no step, ranks or files")
        if not isinstance(self.weights, dict):
            raise ValueError("it names no weights")

    def difference(self, weights: Mapping[str, Tensor]) -> str | None:
        """The first weight in which a model differs from the checkpoint's, None without any."""
        mine = shapes(weights)
        for name in sorted(self.weights.keys() | mine.keys()):
            there, here = self.weights.get(name), mine.get(name)
            if there != here:
                return f"{name} has shape {there or 'none'} there and {here or 'none'} here"
        return None


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find_damage(
    folder: Path, rank: int = 0, world_size: int = 1, *, only: Collection[str] = ()
) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was written, byte for byte.

    Args:
        folder: Of the checkpoint.
        rank: Files are read in full, so ranks share them out: this one reads every
            `world_size`-th.
        world_size: Number of ranks that share them.
        only: Files to compare; all of them by default.

    Raises:
        OutageError: If the disk is out of reach, which says nothing of the files.
    """
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        return str(error)
    if missing := sorted(set(only) - manifest.files.keys()):
        return f"{missing[0]} is missing"
    for name in sorted(only or manifest.files)[rank::world_size]:
        size, digest = manifest.files[name]
        try:
            # The size first: a truncated file is the usual damage, and costs no reading.
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if sha256_of(folder / name) != digest:
                return f"{name} has other contents than were written"
        except OSError as error:
            _refuse_outage(folder / name, error)
            return f"{name} cannot be read: {error.strerror}"
    if folder != step_folder(folder.parent, manifest.step):
        return f"it is of step {manifest.step}"
    return None


def _refuse_outage(path: Path, error: Exception) -> None:
    if may_pass(error):
        raise OutageError(f"{path} cannot be read: {error}") from error


def check_room(folder: Path) -> None:
    """Refuses a disk that has no room for another checkpoint like this one.

    A run that fails at its next checkpoint is started again, trains as far and fails there again.

    Raises:
        UserError: If there is less room than the checkpoint takes.
    """
    needed = sum(size for size, _ in Manifest.read(folder).files.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free / 1e6:,.0f} MB of room, and a checkpoint takes "
            f"{needed / 1e6:,.0f} MB: make room, older checkpoints may go"
        )


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
