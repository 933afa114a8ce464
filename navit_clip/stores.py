"""Object stores and other remote file systems, by fsspec: ``s3://bucket/key``, ``gs://…``.

`navit_clip.data.store` reads shards from them, and `navit_clip.checkpoints.mirror` copies runs to
them. Credentials are found as each store's own tools find them; none is read or kept here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from navit_clip import retries
from navit_clip.errors import UserError
from navit_clip.retries import RemoteError, Retries

Result = TypeVar("Result")

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# In a forked process those of its parent must not go: closing their connections, it would take the
# sockets out of the parent's event loop.
_KEPT: dict[int, Any] = {}
# What another attempt would not change, "no such bucket" and "access denied" among it.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
# Libraries have errors of their own for no credentials and for names that no bucket can have.
_FINAL_NAMES = re.compile("Credential|Uri|Validation")


def open_store(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there.

    It belongs to this process and thread: fsspec makes another one for a forked process, whose
    connections and event loop are its own. It holds no listings, which would hide changes.

    Raises:
        UserError: If nothing reads such addresses, or what does is not installed.
    """
    protocol = address.partition("://")[0].lower() if "://" in address else "file"
    options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
    try:
        store, path = url_to_fs(address, use_listings_cache=False, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'navit-clip[{extra}]'" if extra else f"{error}"
        raise UserError(f"{protocol}:// addresses need another package: {fix}") from error
    except Exception as error:  # each store's own
        raise UserError(f"{address}: {_reason(error)}") from error
    _KEPT[id(store)] = store
    return store, path


def ask(address: str, call: Callable[[], Result], seconds: float | None = None) -> Result:
    """What a call to a store returns, tried again while its failures may pass.

    Args:
        address: Of what is asked for.
        call: Makes the request.
        seconds: Until an attempt counts as failed; `READ_TIMEOUT_S` by default.

    Raises:
        RemoteError: If it fails for good.
    """
    attempts = Retries(address)
    while True:
        try:
            return within(seconds or retries.READ_TIMEOUT_S, call)
        except Exception as error:
            try_again(attempts, error)


def try_again(attempts: Retries, error: Exception) -> None:
    """Waits before the next attempt at what raised an error.

    Raises:
        RemoteError: If it would fail again, or has failed too often.
    """
    reason = _reason(error)
    if isinstance(error, FileNotFoundError):
        raise RemoteError(f"no such file or bucket ({reason})") from error
    # Google's knows two kinds of no.
    refused = reason.startswith("Forbidden") or getattr(error, "code", None) == 401
    if isinstance(error, _FINAL) or refused or _FINAL_NAMES.search(type(error).__name__):
        raise RemoteError(reason) from error
    attempts.failed(reason)


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What a call returns; not every store gives up on a connection over which nothing comes.

    Raises:
        TimeoutError: If it takes longer; the thread in which it runs is left to itself.
        Exception: Whatever the call raises.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    try:
        return done.result(seconds)
    except FutureTimeoutError as error:
        if done.done():
            raise
        raise TimeoutError(f"no answer for {seconds:g} s") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")
