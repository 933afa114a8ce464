"""Files written atomically, hashed, and errors of reading and writing them in one line."""

from __future__ import annotations

import fcntl
import hashlib
import os
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from navit_clip.errors import OutageError, UserError, may_pass


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes beside the file and renames: readers see the old content or all of the new one.

    Text is written as UTF-8, halves of characters as `storable` does; the folder must exist.

    Raises:
        OSError: If the disk does not take it; `path` is then as it was.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, whose file takes its place at the end, or goes if that fails."""
    # A name of its own, or two writers of one file would write into each other's.
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_output(path: Path, content: str | bytes, what: object = None) -> None:
    """Writes a file that a user asked for, see `atomic_write`; folders are made.

    Raises:
        UserError: If it cannot be written; names `what`, by default the path.
    """
    with writing(what or path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)


def storable(path: object) -> str:
    r"""A path as text that can be printed and stored; bytes that are not UTF-8 as ``\udce9``."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Makes a folder and locks it against other processes; the lock goes with the process.

    Args:
        folder: On a file system without locks, as some of networks are, nothing is locked.
        wait: Until the process that has it locked ends or unlocks it.

    Yields:
        Whether it is free for this process; always true after waiting.

    Raises:
        OSError: If the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        free = True
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                free = False
        yield free
    finally:
        os.close(handle)


def flush_to_disk(path: Path) -> None:
    """Returns once a file, or what a folder lists, would be there after a power cut.

    Raises:
        OSError: If the disk does not take a file; not every file system can flush folders.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(*([OSError] if path.is_dir() else [])):
            os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; takes a core about a second per gigabyte.

    Raises:
        OSError: If it cannot be read.
    """
    # Not `hashlib.file_digest`, which Python 3.10 lacks.
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def writing(
    what: object, *also: type[BaseException], hint: str = ""
) -> AbstractContextManager[None]:
    """A context that turns errors into a `UserError` "cannot write WHAT: REASON".

    Args:
        what: The path, perhaps after the flag that named it.
        also: Exceptions other than `OSError` that mean the same.
        hint: Put behind the reason: what to do about it.
    """
    return _user_errors(f"cannot write {what}", (OSError, *also), hint)


def reading(
    what: object, *also: type[BaseException], hint: str = ""
) -> AbstractContextManager[None]:
    """Like `writing`, for "cannot read WHAT: REASON"; `also` are those of a parser, for example."""
    # RecursionError: a parser's, of brackets within brackets.
    return _user_errors(f"cannot read {what}", (OSError, RecursionError, *also), hint)


def one_line(problem: str, *, hint: str = "") -> AbstractContextManager[None]:
    """A context that turns every error into a `UserError` "PROBLEM: REASON".

    For downloads: huggingface_hub, open_clip and HTTP clients raise from a dozen families.
    """
    return _user_errors(problem, (Exception,), hint)


@contextmanager
def _user_errors(
    problem: str, errors: tuple[type[BaseException], ...], hint: str
) -> Iterator[None]:
    try:
        yield
    except errors as error:
        if isinstance(error, KeyError):
            reason = f"{error} is missing"
        elif isinstance(error, FileExistsError):  # of a folder to be made; "File exists" misleads
            reason = f"{error.filename} is a file"
        else:
            # Errors of PIL and of table parsers have no `strerror`.
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # Weights of another model would list every tensor.
        kind = OutageError if may_pass(error) else UserError
        raise kind(f"{problem}: {textwrap.shorten(reason, 300)}{hint}") from error
