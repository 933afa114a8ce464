"""What one rank alone keeps in a checkpoint: the state of its data and its random generators.

A file of its own per rank beside the tensors, which all ranks write together
(`navit_clip.checkpoints.checkpoint`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from navit_clip.data.state import DataState
from navit_clip.data.state_json import data_from_json, data_to_json
from navit_clip.files import reading


def rank_file(folder: Path, rank: int) -> Path:
    """A rank's file in the folder of a checkpoint."""
    return folder / f"rank-{rank}.json"


def rank_state(data: DataState, device: torch.device) -> str:
    """Contents of this rank's file, as things are now."""
    states = generator_states(device).items()
    generators = {name: state.numpy().tobytes().hex() for name, state in states}
    return json.dumps({"data": data_to_json(data), "generators": generators})


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
    set_generators(states, device)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Where torch's default generators stand: ``cpu``, and ``cuda`` if that is the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets the default generators as `generator_states` found them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class SavedDataStates(Sequence[DataState]):
    """How far each rank was in its data; read when asked for, since most ranks need their own only.

    Args:
        path: Folder of the checkpoint.
        world_size: Ranks of the run that wrote it.
    """

    def __init__(self, path: Path, world_size: int) -> None:
        self.path, self.world_size = path, world_size

    def __len__(self) -> int:
        return self.world_size

    def __getitem__(self, rank: Any) -> Any:
        rank = range(self.world_size)[rank]
        with reading(rank_file(self.path, rank), ValueError, TypeError, KeyError, AttributeError):
            return data_from_json(_read(self.path, rank)["data"])


def _read(folder: Path, rank: int) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(rank_file(folder, rank).read_text())
    return saved
