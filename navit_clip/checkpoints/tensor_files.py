"""The tensors of a checkpoint: which rank writes which, and reading without running what is there.

`torch.distributed.checkpoint` unpickles its index, and whatever is no tensor, without any check: a
run directory from elsewhere could so execute code. Here the index is made of a few classes of
torch's, and the rest goes through torch's own restricted unpickler.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

_Leaf = tuple[tuple[str, ...], Any]
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # Where the checkpoint was written.
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


def dealt(state: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """The part of a state that this rank copies and writes; with those of all ranks, all of it.

    Every n-th of what n ranks have, in order of size, which all of them have in common. Of what
    all proposed torch's planner would keep one, too, but each rank would have copied all of it to
    the host, and rank 0 would read all proposals, 0.1 s of Python beside the training for each rank
    of a B/16: a minute at 512.

    Args:
        state: Tensors and plain values in nested dicts, of the same names on every rank.
        rank: This process.
        world_size: How many write.
    """
    part: dict[str, Any] = {}
    seen = Counter[int]()
    for path, value in sorted(_leaves(state), key=lambda leaf: (-_size(leaf[1]), leaf[0])):
        number, copies = _place(value, rank, world_size)
        if seen[copies] % copies == number:
            inner = part
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = value
        seen[copies] += 1
    return part


def _leaves(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[_Leaf]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _size(value: Any) -> int:
    """Bytes of a tensor, of the whole one where ranks hold shards; 0 for a plain value."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _place(value: Any, rank: int, world_size: int) -> tuple[int, int]:
    """This rank's number among those that have the same part of a value, and how many do."""
    if not isinstance(value, DTensor):
        return rank, world_size
    number, copies = 0, 1
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # a mesh is of all ranks
    for dimension, placement in enumerate(value.placements):
        if placement.is_replicate():  # under HSDP among the groups that have all shards each
            size = mesh.size(dimension)
            number, copies = number * size + coordinate[dimension], copies * size
    return number, copies


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, files: Collection[str]) -> None:
        super().__init__(str(folder))
        self._folder, self._files = folder, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(self._folder, self._files)


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, map_location="cpu", weights_only=True)
        # Torch's planner knows where the value goes, but would read it without the restriction.
        checked = io.BytesIO()
        torch.save(plain, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def read_index(folder: Path, files: Collection[str]) -> Metadata:
    """Which tensors a checkpoint holds, and where.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no such index, or names other files.
    """
    with (folder / ".metadata").open("rb") as file:
        try:
            index = _IndexUnpickler(file).load()
            foreign = {info.relative_path for info in index.storage_data.values()} - set(files)
        # A pickle that is none, or hostile, may raise anything.
        except Exception as error:
            raise ValueError(f".metadata cannot be read: {error}") from error
    if not isinstance(index, Metadata) or foreign:
        raise ValueError(f".metadata names other files: {', '.join(map(str, foreign))}")
    return index


def read_tensors(
    state: dict[str, Any], folder: Path, files: Collection[str], *, alone: bool
) -> None:
    """Reads a state in place; every rank calls it.

    Args:
        state: What is wanted, tensors and plain values, by name.
        folder: Of the checkpoint.
        files: Names of those that belong to it.
        alone: One process reads all of it.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If the index is damaged; likewise KeyError and RuntimeError.
        dcp.CheckpointException: For the errors of other ranks.
    """
    dcp.load(state, storage_reader=_Reader(folder, files), planner=_Planner(), no_dist=alone)
