"""What the shards of a run look like from outside, so that others of the same names are noticed.

Every folder that img2dataset writes has the same names. A checkpoint therefore keeps the size of
each shard and hashes of its first and last bytes, which cost no more than to open it; of many
shards, and of those that come over a network, a few are looked at. Of shards of `make_shards` it
also keeps what their manifest says: how many samples they have, and the SHA-256 of the whole; of
image files that are read as shards a hash of what lists them, and of an image in some of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import urllib3

from navit_clip.data.command import CommandStream
from navit_clip.data.hub import web_file
from navit_clip.data.mixture import Mixture
from navit_clip.data.patterns import COMMAND, is_stored, is_url
from navit_clip.data.pieces import Piece
from navit_clip.data.shards import MANIFEST
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.stores import open_store, within

_HEAD, _TAIL = 4096, 32768  # a tar ends with up to 20 blocks of zeros, so many say nothing
_LOCAL, _REMOTE, _COMMANDS = 512, 16, 2
_THREADS = 16
_TIMEOUT_S = 10.0

# Size in bytes, and hashes of the first and the last bytes; None where it is not known. With a
# manifest also the number of samples and the hash of all bytes. Pieces of a table or a folder have,
# instead of bytes, hashes of their rows and of the first bytes of an image.
Fingerprint = Sequence[Any]
_UNKNOWN: Fingerprint = (None, None, None)
_PARTS = ("bytes", "first bytes", "last bytes", "samples", "content", "rows", "first image")


def look_at_shards(mixture: Mixture, before: Path | None, ranks: Ranks) -> dict[str, Fingerprint]:
    """How the shards look, on rank 0; others than those of a checkpoint are refused.

    As are different ones on different ranks, which would deal other shards to their readers, so
    that some samples came again and others never. Every rank calls it.

    Args:
        mixture: The shards that this rank has found.
        before: A checkpoint's file, to compare with.
        ranks: This process among all of them.

    Raises:
        UserError: If shards differ, or the file cannot be read.
    """
    digests = ranks.gather([mixture.digest])
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(
                f"rank {rank} finds other training shards ({digest}) than rank 0 ({digests[0]}): "
                "give every node the same files under the same names before the run begins"
            )
    found = dict[str, Fingerprint]()
    problem: UserError | None = None
    if ranks.is_first:
        found = fingerprints(mixture)
        try:
            if before is not None:
                found = compare(before, found)
        except UserError as error:
            problem = error
    ranks.raise_together(problem)
    return found


def fingerprints(mixture: Mixture) -> dict[str, Fingerprint]:
    """Fingerprints of a run's shards by short name, of those that can be read."""
    shards = dict(zip(mixture.names, mixture.shards, strict=True))
    pieces = [name for name, shard in shards.items() if isinstance(shard, Piece)]
    commands = [name for name, shard in shards.items() if shard.startswith(COMMAND)]
    urls = [name for name, shard in shards.items() if is_url(shard)]
    stored = [name for name, shard in shards.items() if is_stored(shard)]
    others = {*pieces, *commands, *urls, *stored}
    local = [name for name in shards if name not in others]
    close = set(_some(local, _LOCAL))
    tasks: list[tuple[str, Callable[[str], Fingerprint]]] = [
        *((name, _of_file if name in close else _size_of_file) for name in local),
        *((name, _of_url) for name in _some(urls, _REMOTE)),
        *((name, _of_object) for name in _some(stored, _REMOTE)),
        *((name, _of_command) for name in _some(commands, _COMMANDS)),
        *((name, _of_piece) for name in pieces),
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda task: task[1](shards[task[0]]), tasks)
        known = {name: one for (name, _), one in zip(tasks, found, strict=True) if any(one)}
    paths = {name: Path(shards[name]) for name in local if name in known}
    manifests = {folder: _read_manifest(folder) for folder in {p.parent for p in paths.values()}}
    for name, path in paths.items():
        size, *recorded = manifests[path.parent].get(path.name, (None,))
        if size == known[name][0]:
            known[name] = (*known[name], *recorded)
    return known


def _read_manifest(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Bytes, samples and SHA-256 of each shard that `make_shards` recorded in a folder."""
    found = {}
    # A damaged one is for `make_shards --verify` to name.
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        for line in (folder / MANIFEST).read_text(encoding="utf-8").split("\n")[1:-1]:
            record = json.loads(line)
            found[record["shard"]] = record["bytes"], record["samples"], record["sha256"]
    return found


def compare(path: Path, now: dict[str, Fingerprint]) -> dict[str, Fingerprint]:
    """All that is known of the shards, of today and in a checkpoint's file.

    Raises:
        UserError: If a shard is another one than in the file, or the file cannot be read.
    """
    with reading(path, ValueError, TypeError, AttributeError, KeyError):
        before = json.loads(path.read_text())
        problem = difference(before, now)
        # What cannot be read today is still compared tomorrow.
        known = before | now
    if problem is not None:
        raise UserError(
            f"the checkpoint was taken with other training shards: {problem}; resume with the "
            "same ones, or use another run_dir"
        )
    return known


def difference(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> str | None:
    """The first shard that is another one than before, as "NAME has …", None if none is known."""
    for name in before.keys() & now.keys():
        # Either may have been taken without a manifest.
        for what, there, here in zip(_PARTS, before[name], now[name], strict=False):
            if there is not None and here is not None and there != here:
                counted = what in ("bytes", "samples")
                detail = f"{here:,} {what}, not {there:,}" if counted else f"other {what}"
                return f"{name} has {detail}"
    return None


def _some(names: Sequence[str], most: int) -> Sequence[str]:
    return names[:: -(-len(names) // most)] if names else names


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _size_of_file(shard: str) -> Fingerprint:
    # A shard that cannot be read is the reader's business, which counts it.
    with suppress(OSError):
        return Path(shard).stat().st_size, None, None
    return _UNKNOWN


def _of_file(shard: str) -> Fingerprint:
    if not os.path.isfile(shard):
        return _UNKNOWN  # a pipe would wait for its writer
    with suppress(OSError), open(shard, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD)
        file.seek(max(0, size - _TAIL))
        return size, _hash(head), _hash(file.read(_TAIL))
    return _UNKNOWN


def _of_piece(piece: str) -> Fingerprint:
    assert isinstance(piece, Piece)
    with suppress(OSError):
        head = piece.head(_HEAD)
        return *_UNKNOWN, piece.size, None, piece.digest(), _hash(head) if head else None
    return _UNKNOWN


def _of_object(address: str) -> Fingerprint:
    # Each store's library has errors of its own.
    with suppress(Exception):
        return within(_TIMEOUT_S, partial(_read_object, address))
    return _UNKNOWN


def _read_object(address: str) -> Fingerprint:
    store, path = open_store(address)
    size = store.info(path)["size"]
    head = store.cat_file(path, start=0, end=min(_HEAD, size))
    return size, _hash(head), _hash(store.cat_file(path, start=max(0, size - _TAIL), end=size))


def _of_url(address: str) -> Fingerprint:
    url, headers = web_file(address)
    with (
        suppress(urllib3.exceptions.HTTPError, ValueError),
        urllib3.PoolManager(headers=headers) as pool,
    ):
        size, head = _range_of(pool, url, f"bytes=0-{_HEAD - 1}", _HEAD)
        if size is None:
            return size, head, None
        start = max(0, size - _TAIL)
        _, tail = _range_of(pool, url, f"bytes={start}-", _TAIL, start)
        return size, head, tail
    return _UNKNOWN


def _range_of(
    pool: urllib3.PoolManager, url: str, wanted: str, most: int, start: int = 0
) -> tuple[int | None, str | None]:
    """Size of a file on a server and the hash of a range; None for what it does not send."""
    response = pool.request(
        "GET",
        url,
        headers={**pool.headers, "Range": wanted, "Accept-Encoding": "identity"},
        timeout=urllib3.Timeout(connect=_TIMEOUT_S / 2, read=_TIMEOUT_S),
        retries=urllib3.Retry(None, connect=0, read=0, status=0, other=0, redirect=5),
        preload_content=False,
        decode_content=False,
    )
    try:
        if response.status == 206:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
        elif response.status == 200 and not start:
            total = response.headers.get("Content-Length", "")
        else:
            return None, None
        data = response.read(most)
        size = int(total) if total.isdecimal() else None
        return size, _hash(data) if len(data) == min(most, size or most) else None
    finally:
        response.close()


def _of_command(shard: str) -> Fingerprint:
    with suppress(OSError), closing(CommandStream(shard.removeprefix(COMMAND))) as stream:
        return None, _hash(stream.read(_HEAD)), None
    return _UNKNOWN
