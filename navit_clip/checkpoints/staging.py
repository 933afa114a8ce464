"""How a checkpoint's state is copied to the host's memory, from which it is written."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.staging import (
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)


def plain_stager() -> DefaultStager:
    """Plain copies, done when `stage` returns: the next step changes what is copied."""
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    return DefaultStager(options)


def pinned_stager(device: torch.device) -> BlockingAsyncStager | None:
    """On CUDA a stager to be kept, for copies into page-locked memory, several times faster.

    Its one copy is written to again by the next `stage`, by when it has been written to the disk.
    Not DefaultStager, which in torch 2.11 gives its memory back after each use.
    """
    if device.type != "cuda":
        return None
    return BlockingAsyncStager(cache_staged_state_dict=True)
