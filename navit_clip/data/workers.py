"""Worker processes: tasks for them, and what happens when they or their parent are killed.

`run_unordered` is for commands with independent tasks; the loaders of `navit_clip.data.loader` and
`navit_clip.evaluation.embed` have torch's workers and take `prepare_worker`, `batches_of`
and `explain_killed_workers`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from navit_clip.errors import OutageError, UserError
from navit_clip.socket_folder import make_socket_folder, remove_socket_folder

if TYPE_CHECKING:  # the tools need no torch
    from torch.utils.data import DataLoader

Batch = TypeVar("Batch")
Argument = TypeVar("Argument")
Result = TypeVar("Result")


def run_unordered(
    run: Callable[[Argument], Result], tasks: Sequence[Argument], workers: int
) -> Iterator[Result]:
    """Yields the result of every task as it is done.

    Args:
        run: A function of a module; runs in this process if there is one worker or one task.
        tasks: Its arguments, which travel to the workers.
        workers: Number of processes.

    Raises:
        UserError: If a worker was killed.
        Exception: Whatever `run` raises.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(run, tasks)
        return
    # Not fork, since the caller may have threads; nor spawn, since every worker would import torch
    # again, which takes longer than most folders of images.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__])
    with ProcessPoolExecutor(workers, context, initializer=prepare_worker) as executor:
        try:
            for future in as_completed([executor.submit(run, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory: give fewer --workers"
            ) from error
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def explain_killed_workers(fix: str) -> Iterator[None]:
    """Reports a killed worker of a torch DataLoader in one line.

    torch notices by a signal, so that its error may be raised anywhere, such as in a forward pass;
    a loader that waits for a batch notices itself.

    Args:
        fix: What to do about it.

    Raises:
        OutageError: Instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).split(". ")[0].strip(" .")
        if not first.startswith("DataLoader worker"):
            raise
        raise OutageError(f"{first}, perhaps for lack of memory: {fix}") from error
    except (ConnectionResetError, EOFError) as error:  # killed while it handed a batch over
        raise OutageError(f"DataLoader worker ended, perhaps for lack of memory: {fix}") from error


class _DoneEvent:
    """Stands for the event by which a DataLoader ends its workers, in the process that sets it.

    The event is multiprocessing's, and whoever looks at it or sets it holds its lock for a moment.
    A worker that is killed just then never gives the lock back, and the loader would wait forever.
    The other workers also end by the messages in their queues.
    """

    def __init__(self, event: Any, workers: Sequence[Any]) -> None:
        self._event, self._workers, self._is_set = event, workers, False

    def set(self) -> None:
        """Ends the workers, unless one of them was killed."""
        self._is_set = True
        if all(worker.exitcode is None for worker in self._workers):
            self._event.set()

    def is_set(self) -> bool:
        """Whether the workers were asked to end."""
        return self._is_set


def batches_of(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Iterates over a torch DataLoader that can end even if a worker was killed."""
    if loader.num_workers:
        make_socket_folder()
    with _garbage_left_to_parent():
        iterator = iter(loader)
    if loader.num_workers:
        inner: Any = iterator
        inner._workers_done_event = _DoneEvent(inner._workers_done_event, inner._workers)
    yield from iterator


@contextmanager
def _garbage_left_to_parent() -> Iterator[None]:
    """Forked workers never collect garbage that the parent has made.

    What ends with it is the parent's: an earlier loader's workers, which a child must not join, and
    CUDA's events, with which CUDA ended a worker on an H100 at the second run of a process.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def prepare_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends the worker if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        if parent is not None:
            parent.join()
            remove_socket_folder(parent.pid)
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
