"""How a data worker hands a batch to the training process: with few tensors in shared memory.

For each tensor in shared memory PyTorch asks the worker for its file, over a connection of its own,
and a worker that is busy decoding answers late. So small tensors travel by value, with the rest of
the batch, and only large ones in shared memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHARED_BYTES = 1 << 20
"""Tensors from this size on are shared: their copies would take longer than the answer."""


class Parcel:
    """Something to be sent from a process to another, where it arrives without its wrapping.

    Args:
        content: What holds tensors, all on the CPU and of types that NumPy has; it must be possible
            to pickle the rest.
    """

    def __init__(self, content: object) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Callable[..., object], tuple[bytes, list[Tensor]]]:
        file, shared = io.BytesIO(), list[Tensor]()
        _Packer(file, shared).dump(self.content)
        return _unpack, (file.getvalue(), shared)


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: list[Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.shared = shared

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, Tensor) or obj.nbytes < SHARED_BYTES:
            return None
        self.shared.append(obj)
        return len(self.shared) - 1

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.numpy(),)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: list[Tensor]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_load(self, pid: int) -> Tensor:
        return self.shared[pid]


def _unpack(data: bytes, shared: list[Tensor]) -> object:
    return _Unpacker(io.BytesIO(data), shared).load()
