"""How a data worker hands a batch to the training process: all of it in one block of shared memory.

For each tensor that is sent PyTorch shares a file of its own, and the training process asks the
worker for each over a connection of its own, which a worker that is busy decoding answers late.
What remains to be sent of a `SharedBatch` is the name of one file, however much the batch holds.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from navit_clip.errors import UserError

_ALIGNMENT = 64  # bytes, as PyTorch aligns tensors of its own


class SharedBatch:
    """A batch to be sent to another process, where it arrives as it was before it was shared.

    Args:
        content: What can be pickled; its tensors lie on the CPU, are of types that NumPy has and
            need no gradient. Each arrives with bytes of its own, all in one block of memory, which
            lives as long as any of them.

    Raises:
        UserError: If there is not enough shared memory.
    """

    # Packs here, in the thread that makes batches, and not in `__reduce__`, in the one that sends
    # them: there an error is only printed, and the training process waits for the batch forever.
    def __init__(self, content: object) -> None:
        file, arrays = io.BytesIO(), list[pickle.PickleBuffer]()
        _Pickler(file, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append).dump(content)
        buffers = [file.getbuffer(), *(array.raw() for array in arrays)]
        ranges, end = [], 0
        for buffer in buffers:
            ranges.append((end, end + buffer.nbytes))
            end += -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
        try:
            shared = torch.empty(end, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"no shared memory for a batch of {end / 2**20:.1f} MB ({error}): give /dev/shm "
                "more room, in Docker by --shm-size, or lower data.workers or data.prefetch"
            ) from error
        memory = shared.numpy().data
        for (begin, stop), buffer in zip(ranges, buffers, strict=True):
            memory[begin:stop] = buffer
        self._packed = shared, ranges

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Tensor, list[tuple[int, int]]]]:
        return _unpack, self._packed


class _Pickler(pickle.Pickler):
    """Tensors as arrays, whose bytes pickle leaves to its caller (protocol 5, PEP 574)."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.numpy(),)
        return NotImplemented


def _unpack(shared: Tensor, ranges: list[tuple[int, int]]) -> object:
    memory = shared.numpy().data
    body, *arrays = (memory[begin:end] for begin, end in ranges)
    return pickle.loads(body, buffers=arrays)
