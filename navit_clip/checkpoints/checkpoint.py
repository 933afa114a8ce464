"""Checkpoints: the whole state of a run, written in the background, whole or not at all.

A checkpoint is a folder ``step-00001000``: `torch.distributed.checkpoint` files, and for each rank
the state of its data and random generators. The training thread only copies the state to the host;
another one writes the copy under a name of its own, and once the files of all ranks are complete
rank 0 names them in a manifest and renames the folder. A folder with the right name was
therefore complete, whenever the writer was killed, and `newest` compares it with its manifest,
since disks fail too.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from navit_clip.checkpoints.folder import (
    PARTIAL,
    REMOVED,
    Manifest,
    find_damage,
    partial_folder,
    remove,
    saved_steps,
    set_aside,
    shapes,
    step_folder,
)
from navit_clip.checkpoints.mirror import Mirror
from navit_clip.checkpoints.rank_state import (
    SavedDataStates,
    rank_file,
    rank_state,
    restore_generators,
)
from navit_clip.checkpoints.staging import pinned_stager, plain_stager
from navit_clip.checkpoints.tensor_files import dealt, read_tensors
from navit_clip.data.state import DataState
from navit_clip.distributed import Ranks
from navit_clip.errors import OutageError, UserError, may_pass
from navit_clip.files import flush_to_disk, sha256_of

# A slow disk is no failure: ranks wait for each other's writes without holding up the training.
_WRITE_TIMEOUT = timedelta(hours=4)
_LAST_WAIT_S = 60.0
_SHARED_S = 20.0  # a network file system may show a new file that much later on other hosts

_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
    dcp.CheckpointException,
)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is saved.

    Attributes:
        every_steps: Steps between checkpoints; one is also written at the end and on SIGTERM or
            SIGINT.
        keep: How many of the latest are kept.
        keep_every: Beside those, checkpoints whose step is a multiple of this are never removed;
            0 keeps none.
        asynchronous: Write while the training goes on, from a copy of the state in the host's
            memory; false writes from where the state is and lets the training wait.
        mirror: Where a copy of the run directory is kept, such as ``s3://bucket/run``; a command
            without a newer checkpoint in its own directory goes on from that.
    """

    every_steps: int = 1000
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    mirror: str | None = None

    def __post_init__(self) -> None:
        if self.keep_every < 0 or self.keep_every % max(1, self.every_steps):
            raise ValueError(
                f"keep_every={self.keep_every} must be 0 or a multiple of "
                f"every_steps={self.every_steps}"
            )
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def expendable(self, steps: list[int]) -> list[int]:
        """Which of all checkpoints are not kept, of steps in rising order."""
        return [s for s in steps[: -self.keep] if not self.keep_every or s % self.keep_every]


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        describe: Called by rank 0 with the folder of each: writes what belongs into it beside the
            state.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.directory, self.config, self.ranks = directory, config, ranks
        self.describe: Callable[[Path], None] = lambda folder: None
        self.mirror: Mirror | None = None
        if config.mirror:
            self.mirror = Mirror(config.mirror, directory.parent, config.expendable, ranks)
        self._damaged: list[tuple[Path, str]] = []
        # The writing threads talk among themselves: in the training's group their messages would
        # meet those of whatever step the other ranks have reached.
        self._group: dist.ProcessGroup | None = None
        if ranks.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)
            self._group = cast(dist.ProcessGroup, group)
        else:  # it says so on every save, and here it is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self._pinned = pinned_stager(ranks.device)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[str | None] | None = None
        self._newest: int | None = None

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without any."""
        return max(saved_steps(self.directory), default=None)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint taken after `step` steps."""
        return step_folder(self.directory, step)

    def newest(self) -> int | None:
        """Step of the newest checkpoint that is as it was written; every rank calls it.

        Changes nothing; see `tidy`.

        Raises:
            UserError: If there are checkpoints and all of them are damaged, or the ranks do not
                share the directory.
        """
        self._open()
        for step in self.ranks.broadcast(saved_steps(self.directory)[::-1]):
            problem = found = None
            try:  # each rank reads a part of its files
                found = find_damage(self.path(step), self.ranks.rank, self.ranks.world_size)
            except OutageError as error:
                problem = error
            self.ranks.raise_together(problem)
            damage = next(filter(None, self.ranks.gather([found])), None)
            if damage is None:
                return step
            self._damaged.append((self.path(step), damage))
        if self._damaged:
            # Starting over would throw the run away, which only its user may do.
            path, what = self._damaged[0]
            raise UserError(
                f"checkpoint {path} is damaged ({what}), and no other in {self.directory} is whole:"
                " restore one, or use another run_dir to start over"
            )
        return None

    def tidy(self, report: Callable[[str], None]) -> None:
        """Sets aside what `newest` found damaged, and removes what a killed run left half-written.

        For rank 0, once the state of `newest` is loaded.

        Args:
            report: Gets a line for each of those.
        """
        for leftover in sorted(self.directory.glob(f"step-*{PARTIAL}")):
            report(f"checkpoint {leftover.stem} was not written to its end; removed")
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.directory.glob(f"step-*{REMOVED}"):
            shutil.rmtree(leftover, ignore_errors=True)
        for path, what in self._damaged:
            report(f"{set_aside(path, what)}; going on from step {self._newest}")
        self._damaged = []
        if self.mirror is not None:
            self.mirror.begin(report, self._newest or 0)

    def save(self, step: int, state: dict[str, Any], data: DataState) -> None:
        """Takes a checkpoint of the state after `step` steps; every rank calls it.

        Returns once the state is copied, unless checkpoints are configured to be synchronous; waits
        first for the checkpoint before it.

        Args:
            step: Steps taken.
            state: Of the training, as `Stepper.state` returns it; may change afterwards.
            data: What this rank consumed; may change afterwards.

        Raises:
            UserError: If the disk did not take the checkpoint before it (or this one, if
                synchronous), the same on all ranks; earlier ones stay as they are.
        """
        self.wait()
        if step == self._newest:
            return
        self._newest = step
        where: dict[str, Any] = {
            # Copied ahead to the host already; the default would reach for the first device.
            "storage_writer": dcp.FileSystemWriter(
                partial_folder(self.path(step)), per_thread_copy_ahead=0
            ),
            "process_group": self._group,
            "no_dist": self._group is None,
        }
        finish = partial(
            self._finish, step, rank_state(data, self.ranks.device), shapes(state["model"])
        )
        state = dealt(state, self.ranks.rank, self.ranks.world_size)
        if self.config.asynchronous:
            stager = self._pinned or plain_stager()
            writing = cast("Future[Any]", dcp.async_save(state, async_stager=stager, **where))
            self._writing = self._thread.submit(finish, writing.result)
        else:
            self._raise(step, finish(partial(dcp.save, state, **where)))

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            UserError: If the disk did not take it, the same on all ranks.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            assert self._newest is not None
            self._raise(self._newest, writing.result())

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed; `wait` says why."""
        writing = self._writing
        if writing is None or not writing.done():
            return False
        return writing.exception() is not None or writing.result() is not None

    def close(self) -> None:
        """Waits a while for the last checkpoint, whatever becomes of it, and for the mirror.

        It may still be written, and the process group may not go away under a thread that uses it;
        but the ranks that it waits for may be the ones that failed.
        """
        if self._writing is not None:
            with suppress(Exception, dcp.CheckpointException):
                self._writing.result(_LAST_WAIT_S)
        self._thread.shutdown(wait=False)
        if self.mirror is not None:
            self.mirror.close()

    def load(self, step: int, state: dict[str, Any]) -> SavedDataStates:
        """Reads the state after `step` steps; every rank calls it.

        Each rank that there was before also gets its random generators back.

        Args:
            step: Steps taken.
            state: Of the training, as `Stepper.state` returns it; overwritten in place.

        Returns:
            How far each rank of the run that wrote it was in its data.

        Raises:
            UserError: If the checkpoint was taken with another model, or cannot be read.
        """
        path = self.path(step)
        try:
            manifest = Manifest.read(path)
            difference = manifest.difference(state["model"])
            if difference is not None:
                raise ValueError(f"it is of another model, {difference}")
            read_tensors(state, path, manifest.files, alone=self._group is None)
            if self.ranks.rank < manifest.world_size:
                restore_generators(path, self.ranks.rank, self.ranks.device)
        except _UNREADABLE as error:
            if isinstance(error, RuntimeError) and self._group is not None:
                raise  # the group's, of a rank that is gone; the disk's is a CheckpointException
            reason: BaseException = error
            if isinstance(error, dcp.CheckpointException):
                reason = next(iter(error.failures.values()))[0]
            problem = f"cannot resume from {path}: {str(reason).splitlines()[0]}"
            if may_pass(reason):
                raise OutageError(problem) from error
            problem += "; if the configuration changed use another run_dir"
            raise UserError(problem) from error
        self._newest = step
        return SavedDataStates(path, manifest.world_size)

    def _open(self) -> None:
        """Makes the directory, and makes sure that all ranks see the same one."""
        token, problem = f".{uuid.uuid4().hex}", None
        if self.ranks.is_first:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                (self.directory / token).touch()
            except OSError as error:
                problem = f"cannot write {self.directory}: {error.strerror}"
        token, problem = self.ranks.broadcast((token, problem))
        if problem is not None:
            raise UserError(problem)
        deadline = time.monotonic() + _SHARED_S
        while not (self.directory / token).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = self.ranks.any(not (self.directory / token).exists())
        if self.ranks.is_first:
            (self.directory / token).unlink(missing_ok=True)
        if blind:
            raise UserError(
                f"the hosts do not share {self.directory}: put run_dir on a file system that all of"
                " them see"
            )

    def _finish(
        self, step: int, own: str, weights: dict[str, list[int]], write: Callable[[], object]
    ) -> str | None:
        """Writes the rest of a checkpoint and makes it visible; on every rank, in its own thread.

        Returns:
            What the disk objected to, the same on all ranks.
        """
        rank, final, problem = self.ranks.rank, self.path(step), None
        folder, checksums = partial_folder(final), {}
        try:
            write()  # returns or raises on all ranks alike
            rank_file(folder, rank).write_text(own)
            files = [rank_file(folder, rank), *folder.glob(f"__{rank}_*.distcp")]
            if self.ranks.is_first:
                self.describe(folder)
                files.append(folder / ".metadata")
                # What has just been written; the rest are of ranks, each of which names its own.
                others = re.compile(r"\.|__|rank-")
                files += [path for path in folder.iterdir() if not others.match(path.name)]
            for file in files:
                flush_to_disk(file)  # else a power cut could leave fewer than older ones to go by
                checksums[file.name] = [file.stat().st_size, sha256_of(file)]
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            problem = _disk_error(error)
            if problem is None:
                raise
        parts = [(checksums, problem)]
        if self._group is not None:
            parts *= self.ranks.world_size
            dist.all_gather_object(parts, (checksums, problem), group=self._group)
        problem = next((theirs for _, theirs in parts if theirs), None)
        if self.ranks.is_first:
            every = {name: value for part, _ in parts for name, value in part.items()}
            manifest = Manifest(step, self.ranks.world_size, weights, every)
            problem = problem or self._publish(manifest, final)
            if problem is not None:
                shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room
        outcome = [problem]
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        return outcome[0]

    def _publish(self, manifest: Manifest, final: Path) -> str | None:
        folder = partial_folder(final)
        try:
            manifest.write(folder)
            flush_to_disk(folder)
            if final.exists():
                remove(final)
            folder.rename(final)
            flush_to_disk(final.parent)
        except OSError as error:
            return error.strerror or str(error)
        for step in self.config.expendable(saved_steps(self.directory)):
            if self.mirror is None or step != self.mirror.uploading:
                remove(self.path(step))
        if self.mirror is not None:
            self.mirror.update()
        return None

    def _raise(self, step: int, problem: str | None) -> None:
        if problem is not None:
            latest = self.latest()
            raise OutageError(
                f"cannot write checkpoint {self.path(step)}: {problem}; the latest complete one is "
                + ("none" if latest is None else f"of step {latest}")
            )


def _disk_error(error: BaseException) -> str | None:
    """The reason the disk gave, None if the error is none of the disk's."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    causes = [error.__cause__, error.__context__]
    if isinstance(error, dcp.CheckpointException):
        causes[:0] = [failure for failure, _ in error.failures.values()]
    return next(filter(None, (_disk_error(cause) for cause in causes if cause is not None)), None)
