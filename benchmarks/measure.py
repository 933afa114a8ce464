"""Measuring: variants in turn, operations, memory, fresh processes."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.errors import UserError

K = TypeVar("K")
T = TypeVar("T")

_TIMEOUT_S = 7200


def in_turn(
    variants: Mapping[K, Callable[[], T]], rounds: int, *, warm_up: bool
) -> dict[K, list[T]]:
    """What each variant returned in each round, without a first round that warms up.

    Each round runs every variant once, so that a machine that slows down slows all of them.
    """
    found = [{name: run() for name, run in variants.items()} for _ in range(warm_up + rounds)]
    return {name: [one[name] for one in found[warm_up:]] for name in variants}


def alternate(variants: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, float]:
    """Median seconds of each variant, run in turn after a round that warms up."""
    timers = {name: partial(_seconds, variant) for name, variant in variants.items()}
    results = in_turn(timers, rounds, warm_up=True)
    return {name: statistics.median(seconds) for name, seconds in results.items()}


def _seconds(variant: Callable[[], object]) -> float:
    begin = time.perf_counter()
    variant()
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    """Waits for what runs on a GPU, where one is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def flop_counter() -> FlopCounterMode:
    """Counts matrix products and attention, those of the loss, which add in place, included."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})


def _addmm_flops(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def resident_mb(field: str, process: int | str = "self") -> float:
    """Resident memory of a process in MiB, from Linux's /proc.

    Args:
        field: ``VmRSS`` (now) or ``VmHWM`` (at most). Not `getrusage`'s ``ru_maxrss``, which in a
            new process begins with its parent's.
        process: Its id; by default this one.
    """
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, f"{process} has ended"
    return int(found[1]) / 1024


def peak_mb(device: str) -> float:
    """The most memory so far in MiB: the allocator's on CUDA, else this process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mb("VmHWM")


def in_processes(
    context: BaseContext, work: Callable[..., T], arguments: Sequence[Sequence[Any]], what: str
) -> list[T]:
    """What a function returned in new processes, all at once, one for each of the arguments.

    Raises:
        UserError: From the function; or if a process ended before, or took two hours.
    """
    ends, processes, results = [], [], []
    try:
        for values in arguments:
            end, theirs = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_send, args=(theirs, work, *values), daemon=True
            )
            process.start()
            theirs.close()
            ends.append(end)
            processes.append(process)
        for end in ends:
            if not end.poll(_TIMEOUT_S):
                raise UserError(f"{what} took more than {_TIMEOUT_S} s")
            result = end.recv()
            if isinstance(result, UserError):
                raise result
            results.append(result)
    except EOFError:
        raise UserError(f"the process of {what} ended, out of memory perhaps") from None
    finally:
        for process in processes:
            if len(results) < len(arguments):
                process.kill()
            process.join()
    return results


def _send(pipe: Connection, work: Callable[..., T], *values: Any) -> None:
    try:
        pipe.send(work(*values))
    except UserError as error:
        pipe.send(error)
