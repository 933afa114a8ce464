"""What belongs to a checkpoint, so that a damaged one is noticed before anything is loaded.

Written last into the folder of a checkpoint (`navit_clip.checkpoints.checkpoint`), as ``run.json``:
size and hash of every file, and the shapes of the weights, which tell another model from a broken
disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.files import atomic_write, sha256_of

FORMAT = 2  # of a checkpoint; read no other
_NAME = "run.json"


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message says what about it."""


def checksum(path: Path) -> list[Any]:
    """Size in bytes and SHA-256 of a file.

    Raises:
        OSError: If it cannot be read.
    """
    return [path.stat().st_size, sha256_of(path)]


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
        files: Checksum of every other file of the folder, see `checksum`.
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
        atomic_write(folder / _NAME, json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads run.json.

        Raises:
            DamagedError: If it is absent, or not what `write` wrote.
            UserError: If another version wrote it.
        """
        path = folder / _NAME
        try:
            values = json.loads(path.read_text())
            # The first format did not say so itself.
            found = values.get("format", 1 if "files" in values else None)
            if found is not None and found != FORMAT:
                raise UserError(
                    f"{path} has format {found}, this version reads {FORMAT}: finish the run with "
                    "the version that wrote it, or use another run_dir"
                )
            manifest = cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DamagedError(f"{_NAME} cannot be read: {error}") from error
        if not isinstance(manifest.files, dict) or not manifest.files:
            raise DamagedError(f"{_NAME} names no files")
        return manifest

    def check(self, folder: Path, names: Iterable[str]) -> None:
        """Compares files with what was written, byte for byte.

        Args:
            folder: Of the checkpoint.
            names: Which files; ranks share them out, since all are read whole.

        Raises:
            DamagedError: Names the first file that differs.
        """
        for name in names:
            size, digest = self.files[name]
            try:
                # The size first: a truncated file is the usual damage, and costs no reading.
                found = (folder / name).stat().st_size
                if found != size:
                    raise DamagedError(f"{name} has {found} bytes, not {size}")
                if sha256_of(folder / name) != digest:
                    raise DamagedError(f"{name} has other contents than were written")
            except OSError as error:
                raise DamagedError(f"{name} cannot be read: {error.strerror}") from error

    def difference(self, weights: Mapping[str, Tensor]) -> str | None:
        """The first weight in which a model differs from the checkpoint's, None without any."""
        mine = shapes(weights)
        for name in sorted(self.weights.keys() | mine.keys()):
            there, here = self.weights.get(name), mine.get(name)
            if there != here:
                return f"{name} has shape {there or 'none'} there and {here or 'none'} here"
        return None
