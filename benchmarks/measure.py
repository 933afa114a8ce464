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


def in_turn(
    variants: Mapping[K, Callable[[], T]], rounds: int, *, warm_up: bool
) -> dict[K, list[T]]:
    """What each variant returned in each round.

    Each round runs every variant once, so that a machine that slows down slows all of them.

    Args:
        variants: What to run, by name.
        rounds: Rounds that count.
        warm_up: With one round before them that does not count.
    """
    results: dict[K, list[T]] = {name: [] for name in variants}
    for round_ in range(rounds + warm_up):
        for name, variant in variants.items():
            result = variant()
            if round_ >= warm_up:
                results[name].append(result)
    return results


def alternate(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant, run in turn after a round that warms up.

    Args:
        variants: What to run, by name.
        rounds: Measured rounds.
    """
    timers = {name: partial(_seconds, variant) for name, variant in variants.items()}
    results = in_turn(timers, rounds, warm_up=True)
    return {name: statistics.median(seconds) for name, seconds in results.items()}


def _seconds(variant: Callable[[], object]) -> float:
    begin = time.perf_counter()
    variant()
    return time.perf_counter() - begin


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


def in_processes(
    context: BaseContext,
    work: Callable[..., T],
    arguments: Sequence[Sequence[Any]],
    what: str,
    timeout_s: float = 3600,
) -> list[T]:
    """Runs a function in new processes, all at once, one for each of the arguments.

    Args:
        context: Of `multiprocessing`, how they are started.
        work: The function.
        arguments: Those of each process.
        what: It is called in errors.
        timeout_s: Seconds after which they are ended.

    Returns:
        What each of them returned.

    Raises:
        UserError: From the function; or if a process ended before, or took too long.
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
            if not end.poll(timeout_s):
                raise UserError(f"{what} took more than {timeout_s:.0f} s")
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
