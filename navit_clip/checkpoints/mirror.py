"""A copy of a run directory in an object store, from which the run goes on elsewhere.

Rank 0 uploads in the background whenever `checkpoint` has completed one. What belongs together
becomes whole with its last object, a checkpoint with its manifest, and that one is removed first
where the others change: whenever the writer is killed, no reader takes a part for the whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from navit_clip.checkpoints.folder import (
    MANIFEST,
    find_damage,
    partial_folder,
    remove,
    saved_steps,
    step_folder,
    step_of,
)
from navit_clip.checkpoints.lock import LOCK_FILE
from navit_clip.distributed import Ranks
from navit_clip.errors import OutageError, UserError, may_pass, printable
from navit_clip.files import atomic_write, replacing, writing
from navit_clip.retries import READ_TIMEOUT_S, RemoteError
from navit_clip.stores import ask, open_store

_CHECKPOINTS = "checkpoints"
_LAST = {"best": "best.json", "model": "config.json"}  # of other folders that are read as a whole
_PASSING = re.compile(rf"(^|/)\.|\.(partial|removed)(/|$)|^{re.escape(LOCK_FILE)}")
_OWNER = "mirror.json"  # which run it is a copy of, and which trainer writes it
_THREADS = 8
_SLOWEST_TRANSFER = 1 << 16  # bytes a second, below which one counts as stuck


class Mirror:
    """The copy of one run directory.

    Args:
        address: Of the copy, such as ``s3://bucket/run``.
        run_dir: What is copied.
        expendable: Which of the steps of all checkpoints are not kept.
        ranks: This process among all of them; rank 0 reads and writes.

    Attributes:
        uploading: The step whose checkpoint is being read, and must not be removed.

    Raises:
        UserError: If nothing writes to such addresses.
    """

    def __init__(
        self,
        address: str,
        run_dir: Path,
        expendable: Callable[[list[int]], list[int]],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._store, self._root = open_store(address)
        self._root = self._root.rstrip("/")
        self._address, self._run_dir, self._expendable = printable(address), run_dir, expendable
        self._report: Callable[[str], None] = print
        self._fetched: list[Path] = []  # for a command that may still be refused
        self._owner = b""  # this trainer's, once it is accepted
        self._sent: dict[Path, object] = {}  # files and folders, and what they looked like
        self._thread: threading.Thread | None = None
        self._queued, self._lost, self._ended, self._problem = False, False, False, ""
        self.uploading: int | None = None

    # Before the run begins

    def fetch(self) -> None:
        """Fetches the run if the mirror has a newer checkpoint, or what is damaged here.

        Every rank calls it.

        Raises:
            UserError: If the mirror cannot be read or is another run's, or the disk is full; the
                same on all ranks.
        """
        problem: UserError | None = None
        if self._ranks.is_first:
            try:
                self._fetch()
            except OSError as error:
                problem = _problem(f"cannot fetch the run from {self._address}", error)
            except UserError as error:
                problem = error
        self._ranks.raise_together(problem)

    def _fetch(self) -> None:
        folder = self._run_dir / _CHECKPOINTS
        here = saved_steps(folder)
        sizes, owner = self._sizes(), self._read(_OWNER)
        if here and owner and _run(owner) != self._own_run():
            raise UserError(
                f"{self._address} is the copy of another run than {self._run_dir}: give another "
                "checkpoint.mirror"
            )
        there = _whole(sizes)
        for step in sorted(there.union(here), reverse=True):
            if step in here:
                damage = find_damage(step_folder(folder, step))
                if damage is None:
                    return
                print(f"step {step} is damaged in {self._run_dir} ({damage})", flush=True)
            if step not in there:
                continue
            print(f"fetching step {step} from {self._address}", flush=True)
            damage = self._fetch_run(step_folder(folder, step), sizes)
            if damage is None:
                return
            print(f"step {step} is damaged there ({damage})", flush=True)

    def begin(self, report: Callable[[str], None], step: int) -> None:
        """Takes the mirror for this trainer, whose command is accepted.

        Args:
            report: Gets a line for whatever goes wrong from now on.
            step: The step that the run goes on from; what the mirror has of later ones is damaged,
                or of what is now trained again.

        Raises:
            UserError: If it cannot be written.
        """
        self._report, self._fetched = report, []
        trainer = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        owner = {"run": self._own_run() or uuid.uuid4().hex, "trainer": trainer}
        self._owner = json.dumps(owner).encode()
        with writing(self._run_dir / _OWNER):
            atomic_write(self._run_dir / _OWNER, self._owner)
        try:
            self._write(_OWNER, self._owner)
            for later in (found for found in _whole(self._sizes()) if found > step):
                folder = step_folder(self._run_dir / _CHECKPOINTS, later)
                self._remove(self._name(folder / MANIFEST))
        except RemoteError as error:
            raise _problem(f"cannot write {self._address}", error) from error

    # While it runs

    def update(self) -> None:
        """Brings the mirror up to date in the background."""
        if self._owner and not self._queued:
            self._queued = True
            # A daemon: a process that is interrupted again does not wait for a store's answer.
            self._thread = threading.Thread(
                target=self._update, args=(self._thread,), name="mirror", daemon=True
            )
            self._thread.start()

    def finish(self) -> None:
        """Waits until the mirror has everything.

        Raises:
            OutageError: If it has not.
            UserError: If another trainer has taken it.
        """
        self._ended = True
        self.update()
        if self._thread is not None:
            self._thread.join()
        if self._lost:
            raise UserError(f"another trainer has taken {self._address}: stop one of them")
        if self._problem:
            raise OutageError(
                f"{self._address} lacks the end of the run, which is in {self._run_dir}: "
                f"{self._problem}; the same command tries again"
            )

    def close(self) -> None:
        """Waits for what is on its way; removes what was fetched for a command that was refused."""
        if not self._ended:
            with suppress(UserError):
                self.finish()
        for path in self._fetched:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
                path.parent.rmdir()

    def _update(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        self._queued = False  # what changes from here on takes another update
        try:
            self._copy()
            self._problem = ""
        except OSError as error:
            self._problem = str(error)
            self._report(
                f"cannot copy the run to {self._address}: {error}; tried again with the next "
                "checkpoint"
            )
        self.uploading = None

    def _copy(self) -> None:
        """Copies what has changed."""
        owner = self._read(_OWNER)
        if owner is None:
            raise RemoteError(f"{_OWNER} is gone")
        if not self._lost and owner != self._owner:
            self._lost = True
            self._report(f"another trainer writes to {self._address}; this one no longer does")
        if self._lost:
            return
        steps = saved_steps(self._run_dir / _CHECKPOINTS)  # what is logged before them goes first
        for path, look in _looks(self._run_dir).items():
            parts = path.relative_to(self._run_dir).parts
            apart = parts[0] in (_CHECKPOINTS, *_LAST) or path.name == _OWNER
            if not apart and not _PASSING.search("/".join(parts)) and self._sent.get(path) != look:
                self._put(path)
                self._sent[path] = look
        for name, last in _LAST.items():
            self._copy_folder(self._run_dir / name, last)
        for step in reversed(steps):
            self.uploading = step
            self._copy_folder(step_folder(self._run_dir / _CHECKPOINTS, step), MANIFEST)
        self._remove_old()

    def _copy_folder(self, folder: Path, last: str) -> None:
        before = _looks(folder)
        if self._sent.get(folder) == before or folder / last not in before:
            return
        name, content = self._name(folder / last), (folder / last).read_bytes()
        there = self._read(name)
        if there != content or last != MANIFEST:  # which holds the hashes of all others
            self._remove(name)
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(self._put, before.keys() - {folder / last}))
            if _looks(folder) != before:
                return  # replaced meanwhile: the next update has it
            self._write(name, content)
        self._sent[folder] = before

    def _remove_old(self) -> None:
        sizes = self._sizes()
        whole = _whole(sizes)
        newest = max(whole, default=-1)
        # What a killed trainer left before the newest will never be whole.
        parts = {s for name in sizes if (s := _step(name)) is not None and s < newest} - whole
        for step in [*self._expendable(sorted(whole)), *parts]:
            folder = self._name(step_folder(self._run_dir / _CHECKPOINTS, step))
            self._remove(f"{folder}/{MANIFEST}")
            self._remove(folder, recursive=True)

    def _fetch_run(self, folder: Path, sizes: dict[str, int]) -> str | None:
        """Fetches a checkpoint; what is wrong with it, None if nothing.

        If it is not here at all, what is no checkpoint is fetched too.
        """
        unfinished, damaged = partial_folder(folder), folder.exists()
        shutil.rmtree(unfinished, ignore_errors=True)
        paths = {}
        for name in sizes:
            if _step(name) == step_of(folder.name):
                paths[name] = unfinished / Path(name).name
            elif not damaged and not name.startswith(f"{_CHECKPOINTS}/"):
                paths[name] = self._run_dir / name
        fresh = not saved_steps(folder.parent)
        self._fetched = [unfinished, folder, *(paths.values() if fresh else ())]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: self._get(name, paths[name], sizes[name]), paths))
        if damaged:
            remove(folder)
        unfinished.rename(folder)
        damage = find_damage(folder)
        if damage is not None:
            remove(folder)
        return damage

    def _own_run(self) -> str:
        with suppress(OSError):
            return _run((self._run_dir / _OWNER).read_bytes())
        return ""

    # One object

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _name(self, path: Path) -> str:
        return path.relative_to(self._run_dir).as_posix()

    def _sizes(self) -> dict[str, int]:
        """Names of all objects, and their sizes in bytes."""
        found = ask(self._address, partial(self._store.find, self._root, detail=True))
        files = {path: info["size"] for path, info in found.items() if info["type"] == "file"}
        sizes = {path.removeprefix(f"{self._root}/"): size for path, size in files.items()}
        return {name: size for name, size in sizes.items() if ".." not in Path(name).parts}

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(ask(self._address, partial(self._store.cat_file, self._at(name))))
        except RemoteError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def _write(self, name: str, content: bytes) -> None:
        ask(self._address, partial(self._store.pipe_file, self._at(name), content))

    def _remove(self, name: str, recursive: bool = False) -> None:
        try:
            ask(self._address, partial(self._store.rm, self._at(name), recursive=recursive))
        except RemoteError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    def _put(self, path: Path) -> None:
        try:
            put = partial(self._store.put_file, str(path), self._at(self._name(path)))
            ask(self._address, put, READ_TIMEOUT_S + path.stat().st_size / _SLOWEST_TRANSFER)
        except OSError:
            if path.exists():  # else it is being replaced
                raise

    def _get(self, name: str, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as whole:
            get = partial(self._store.get_file, self._at(name), str(whole))
            ask(self._address, get, READ_TIMEOUT_S + size / _SLOWEST_TRANSFER)


def _run(owner: bytes) -> str:
    """Which run it is of whose owner this is."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(owner)["run"])
    return ""


def _step(name: str) -> int | None:
    """The step of the checkpoint that an object belongs to."""
    parts = Path(name).parts
    return step_of(parts[1]) if len(parts) == 3 and parts[0] == _CHECKPOINTS else None


def _whole(names: Iterable[str]) -> set[int]:
    """Steps of all checkpoints that have their manifest."""
    found = {_step(name) for name in names if Path(name).name == MANIFEST}
    return {step for step in found if step is not None}


def _looks(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """All files below a folder, and what shows that one was written again."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(OSError):
            if path.is_file():
                status = path.stat()
                found[path] = status.st_size, status.st_mtime_ns, status.st_ino
    return found


def _problem(what: str, error: OSError) -> UserError:
    return (OutageError if may_pass(error) else UserError)(f"{what}: {error}")
