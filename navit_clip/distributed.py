"""The processes of a run or an evaluation: who this one is, and what all of them agree on.

Started alone there is one rank and nothing to set up; under torchrun the process group comes from
its environment.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from operator import itemgetter
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist

from navit_clip.errors import OutageError, StopAskedError, UserError, report_error
from navit_clip.socket_folder import remove_socket_folder

T = TypeVar("T")

# Long enough for one rank to compile while the others wait; `navit_clip.training.watchdog` reports
# a hang earlier.
_TIMEOUT = timedelta(minutes=30)
_MISTAKE = "mistake"  # key of the store
_LOOK_S = 0.5  # at most, between two looks at whether rank 0 is done
_OWN_FILES = 2048  # shards, data workers, connections to stores, NCCL


@dataclass(frozen=True)
class Announcement:
    """Numbers of every rank, on their way while the ranks do something else.

    Args:
        gathered_RN: Where those of each rank arrive, on the host.
        work: What brings them; None if they are there.
    """

    gathered_RN: torch.Tensor
    work: dist.Work | None

    def wait(self) -> list[list[float]]:
        """The numbers, rank by rank; may be asked for again."""
        if self.work is not None:
            self.work.wait()
        return self.gathered_RN.tolist()


@dataclass(frozen=True)
class Ranks:
    """This process among all of them.

    Attributes:
        rank: This process.
        world_size: How many there are.
        device: Where this one computes.
        store: Of the process group, for what must reach ranks that no longer take part in it.
    """

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store | None = None
    _alone: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks, on the host so that no device is waited for."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def announce(self, values: Sequence[float]) -> Announcement:
        """Begins to tell every rank this one's numbers; every rank calls it with as many."""
        own = torch.tensor([values], dtype=torch.float64)
        if self.world_size == 1:
            return Announcement(own, None)
        gathered = own.new_empty(self.world_size, len(values))
        return Announcement(gathered, dist.all_gather_into_tensor(gathered, own, async_op=True))

    def gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, rank after rank, on every rank."""
        if self.world_size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def gather_first(self, items: list[T]) -> list[T]:
        """The items of all ranks, rank after rank, on rank 0; none elsewhere."""
        if self.world_size == 1:
            return items
        parts: list[list[T]] | None = [[]] * self.world_size if self.is_first else None
        dist.gather_object(items, parts)
        return [item for part in parts or [] for item in part]

    def broadcast(self, item: T) -> T:
        """The item of rank 0, on every rank."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]

    def scatter(self, items: Sequence[T]) -> T:
        """Of the items of rank 0, one for each rank in their order, this rank's."""
        if self.world_size == 1:
            return items[0]
        own: list[Any] = [None]
        dist.scatter_object_list(own, list(items) if self.is_first else None, src=0)
        item: T = own[0]
        return item

    def of_first(self, look: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank, as is a mistake that it comes upon; all call it.

        Raises:
            UserError: If `look` does.
        """
        found: list[T] = []
        problem: UserError | None = None
        if self.is_first:
            try:
                found = [look()]
            except UserError as error:
                problem = error
        self.raise_together(problem)
        return self.broadcast(found)[0]

    def first_alone(self, work: Callable[[], T], beat: Callable[[], object]) -> T | None:
        """What `work` gives on rank 0, None elsewhere, however long it takes; all call it.

        In a collective call the others would give up after half an hour.

        Args:
            work: On rank 0.
            beat: Called again and again on the ranks that wait.

        Raises:
            Exception: What `work` does, on rank 0, and what `beat` does, where it is called.
        """
        key, pause_s = f"alone/{next(self._alone)}", 0.001
        if self.is_first:
            try:
                return work()
            finally:
                if self.store is not None:
                    self.store.set(key, "")
        while self.store is not None and not self.store.check([key]):
            beat()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S)
        return None

    def raise_together(self, problem: UserError | None) -> None:
        """Raises on all ranks what one raises, which the others would wait for; all call it.

        Raises:
            UserError: One of theirs, if any has one; an `OutageError` if others are, and a
                `StopAskedError` if all are.
        """
        kinds = UserError, OutageError, StopAskedError
        own = []
        if problem is not None:
            own = [(kinds.index(type(problem)) if type(problem) in kinds else 0, str(problem))]
        if found := self.gather(own):
            kind, text = min(found, key=itemgetter(0))
            raise kinds[kind](text)

    def tell_mistake(self, mistake: str) -> None:
        """Leaves word of what ends the run, for ranks that only notice that this one is gone."""
        if self.store is not None:
            with suppress(RuntimeError):  # its host has ended
                self.store.set(_MISTAKE, mistake)

    def told_mistake(self) -> str | None:
        """What another rank said before it ended the run, if any did."""
        if self.store is not None:
            with suppress(RuntimeError):
                if self.store.check([_MISTAKE]):
                    return self.store.get(_MISTAKE).decode()
        return None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, the same answer on all."""
        return self.sum([float(flag)])[0] > 0


@contextmanager
def join_ranks(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Ranks]:
    """Joins the process group that torchrun announces, and leaves it at the end.

    The device ``auto`` is CUDA if there is one.

    Raises:
        UserError: If CUDA is asked for and absent, or the host has fewer GPUs than ranks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch finds no CUDA device: use --device cpu")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = torch.device("cpu")
    if device == "cuda":
        number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= there:
            raise UserError(
                f"PyTorch finds {there} CUDA device(s), and torchrun started more ranks here: give "
                "it --nproc-per-node gpu, or use --device cpu"
            )
        local = torch.device("cuda", number)
        torch.cuda.set_device(local)
    store = None
    if world_size > 1:
        _allow_open_files(world_size)
        store = _clean_store(rank, world_size)
        dist.init_process_group(
            # gloo as well on CUDA: counts, stop flags and checkpoints travel between hosts.
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
    try:
        yield Ranks(rank, world_size, local, store)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


@contextmanager
def failing_at_once(ranks: Ranks, command: str) -> Iterator[None]:
    """Ends one of several ranks as soon as anything is raised inside, a mistake with its line.

    Python ends only when its threads have, and leaves the process group before. A thread that
    writes a checkpoint may wait for ranks that in turn wait for this one: a data worker killed
    while a checkpoint began once left two ranks waiting for each other, and torchrun for both. So
    may NCCL, which leaves when all that was begun is done.

    Args:
        ranks: This process among all of them; alone nobody waits, and what is raised passes.
        command: Named in the line.
    """
    try:
        yield
    except SystemExit:  # by all ranks together
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            if ranks.is_first:
                print("interrupted", file=sys.stderr)
            end_process(128 + signal.SIGINT)  # data workers may wait for a server
        if ranks.world_size == 1:
            raise
        if isinstance(error, UserError):
            mistake = error
            if not isinstance(error, OutageError):
                ranks.tell_mistake(str(error))
        elif (told := ranks.told_mistake()) is not None:
            mistake = UserError(told)
        else:
            traceback.print_exc()
            end_process(1)
        report_error(command, mistake)
        end_process(2)


def end_process(code: int) -> NoReturn:
    """Ends this process and its data workers at once, whatever its threads wait for."""
    for child in multiprocessing.active_children():
        child.kill()  # data workers; those that hang would outlive this process
    remove_socket_folder(os.getpid())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _allow_open_files(world_size: int) -> None:
    """Raises the limit of open files: gloo keeps three for each rank, and aborts where it cannot.

    Raises:
        UserError: If even the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = math.inf if hard == resource.RLIM_INFINITY else hard
    wanted = int(min(most, 4 * world_size + _OWN_FILES))
    if wanted < 3 * world_size + 100:
        raise UserError(
            f"{world_size} ranks need {3 * world_size + 100} open files each, the limit is {hard}: "
            "raise it (ulimit -Hn, LimitNOFILE of systemd)"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _clean_store(rank: int, world_size: int) -> dist.Store:
    """The store of torchrun or of rank 0, without what earlier attempts left in it.

    torchrun hands the same store to restarted ranks. In it they would find the addresses of dead
    ones before their successors overwrite them, and fail with "connection refused" or wait for
    ever. So all ranks first agree on a prefix that is new: each says hello under a name of its own,
    which the first one answers with its own; answers to the dead do not matter.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=_TIMEOUT))
    name = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", name)
        first = store.get(f"answer/{name}").decode()
        store.set(f"heard/{first}/{rank}", "")
        return dist.PrefixStore(first, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + _TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not join in {_TIMEOUT}")
        for other in sorted(missing):
            if store.check([f"heard/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)
