"""Between host and device without waiting: scalars of a step one step late, batches ahead of it.

A host that reads what a step has computed waits for the device, and the device then waits for the
host to prepare the next step. `step` hands loss, norms and metrics to `LateScalars`, and `trainer`
reads them once the next step is under way, for which `Uploads` has brought the batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from navit_clip.packed.batch import Batch


def reads_late(device: torch.device) -> bool:
    """Whether a step's scalars are read after the next step has begun; on a CPU reading is free."""
    return device.type == "cuda"


class LateScalars:
    """Scalars on their way from their device to the host.

    Args:
        values: Tensors of one element by name, on one device, of any floating-point dtype.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._names = list(values)
        # float64 holds whatever any of them holds.
        self._host = torch.stack([v.detach().reshape(()) for v in values.values()]).double()
        self._arrived: torch.cuda.Event | None = None
        if self._host.is_cuda:
            on_device, self._host = (
                self._host,
                torch.empty_like(self._host, device="cpu", pin_memory=True),
            )
            self._host.copy_(on_device, non_blocking=True)
            # Blocking: a thread that spins takes a core from the data workers.
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """The values; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._host.tolist(), strict=True))


class Uploads:
    """Copies batches to the device while it works on the step before.

    On CUDA in a stream of its own: in the steps' stream a copy would begin when those are done.

    Args:
        device: Where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batches: Sequence[Batch[Any]]) -> list[Batch[Any]]:
        """The batches on the device, for what is queued there from now on.

        Args:
            batches: On the host, page-locked for CUDA.

        Returns:
            To be kept until the device has read them: the next copies may be put in their place.
        """
        if self._stream is None:
            return [batch.to(self._device) for batch in batches]
        with torch.cuda.stream(self._stream):
            copied = [batch.to(self._device, non_blocking=True) for batch in batches]
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return copied
