"""Runs a function in several real gloo processes on this machine and collects what it returns.

The function must be at module level of an importable file: each process imports that by itself.
"""

import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from forks import forked

T = TypeVar("T")


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


def run_ranks(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    initialise: bool = True,
) -> list[T]:
    """Calls `fn(*args)` in `world_size` processes that form one gloo process group.

    Each process runs one thread of torch's and has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT set as torchrun would. It may start processes of its own (data loader workers).

    Args:
        fn: Module-level function; learns its rank from `dist.get_rank()` (or RANK).
        world_size: Number of processes.
        *args: Picklable arguments, the same for all ranks.
        timeout: Seconds for everything, start included; also the process group's timeout.
        initialise: False leaves `dist.init_process_group` to `fn` (env:// works).

    Returns:
        The return value of each rank, in order of rank.

    Raises:
        RankError: Some rank failed. The others are ended; only processes started here are.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        environment = {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        processes = [
            forked(_run_rank, fn, rank, args, directory, environment, timeout, initialise)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(directory), time.monotonic() + timeout)
        finally:
            for process in processes:
                _end(process)
        return [pickle.loads(_result(Path(directory), r).read_bytes()) for r in range(world_size)]


def _result(directory: Path, rank: int) -> Path:
    return directory / f"result-{rank}"


def _error(directory: Path, rank: int) -> Path:
    return directory / f"error-{rank}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_rank(
    fn: Callable[..., Any],
    rank: int,
    args: tuple[Any, ...],
    directory: str,
    environment: dict[str, str],
    timeout: float,
    initialise: bool,
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        if initialise:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{directory}/store",
                rank=rank,
                world_size=int(environment["WORLD_SIZE"]),
                timeout=timedelta(seconds=timeout),
            )
        try:
            result = pickle.dumps(fn(*args))
            if dist.is_initialized():
                # gloo cannot tell a rank that is done from one that died.
                dist.barrier()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        _result(Path(directory), rank).write_bytes(result)
    except BaseException:
        _error(Path(directory), rank).write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _wait(processes: Sequence[BaseProcess], directory: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            # Its peers usually fail with it, and theirs may be the more telling traceback.
            deadline = min(deadline, time.monotonic() + 1.0)
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            break
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    failures = []
    for rank, process in enumerate(processes):
        if _error(directory, rank).exists():
            failures.append(f"rank {rank} raised:\n{_error(directory, rank).read_text()}")
        elif process.exitcode is None:
            failures.append(f"rank {rank} did not finish in time")
        elif not _result(directory, rank).exists():
            failures.append(f"rank {rank} ended with exit code {process.exitcode}")
    if failures:
        raise RankError("\n".join(failures))


def _end(process: BaseProcess) -> None:
    if process.pid is None:  # never started
        return
    if process.exitcode is None:
        process.terminate()
        process.join(5)
    if process.exitcode is None:
        process.kill()
    process.join()
