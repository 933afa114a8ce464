"""What one rank alone keeps in a checkpoint: its place in the data and its random generators.

A file of its own per rank beside the tensors, which all ranks write together
(`navit_clip.checkpoints.checkpoint`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch

from navit_clip.data.state import LoaderPosition


def rank_file(folder: Path, rank: int) -> Path:
    """A rank's file in the folder of a checkpoint."""
    return folder / f"rank-{rank}.json"


def rank_state(position: LoaderPosition, device: torch.device) -> str:
    """Contents of this rank's file, as things are now."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    generators = {name: state.numpy().tobytes().hex() for name, state in states.items()}
    return json.dumps({"position": position.to_json(), "generators": generators})


def restore_generators(folder: Path, rank: int, device: torch.device) -> None:
    """Sets the default generators as they were on a rank.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged.
    """
    saved = _read(folder, rank)["generators"]
    states = {
        name: torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
        for name, state in saved.items()
    }
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class SavedPositions(Sequence[LoaderPosition]):
    """How far each rank was in its data; read when asked for, since most ranks need their own only.

    Args:
        path: Folder of the checkpoint.
        world_size: Ranks of the run that wrote it.
    """

    def __init__(self, path: Path, world_size: int) -> None:
        self.path, self.world_size = path, world_size

    def __len__(self) -> int:
        return self.world_size

    @overload
    def __getitem__(self, rank: int) -> LoaderPosition: ...

    @overload
    def __getitem__(self, rank: slice) -> list[LoaderPosition]: ...

    def __getitem__(self, rank: int | slice) -> LoaderPosition | list[LoaderPosition]:
        if isinstance(rank, slice):
            return [self[i] for i in range(*rank.indices(len(self)))]
        if not 0 <= rank < len(self):
            raise IndexError(rank)
        return LoaderPosition(**_read(self.path, rank)["position"])


def _read(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads(rank_file(folder, rank).read_text())
