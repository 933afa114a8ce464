"""Webdataset shards to raw samples: the first step of the data pipeline.

A shard is a tar whose neighbouring members ``key.jpg``, ``key.txt``, ``key.json`` form one sample,
as img2dataset writes them. Read with the standard library, member by member, so that samples
before a resume point cost a header each and no payload.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from braceexpand import braceexpand

from navit_clip.errors import UserError

# Directory names may have dots, so the key ends at the first dot of the last component.
_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")


@dataclass(frozen=True)
class RawSample:
    """One sample as the shard has it.

    Attributes:
        id: ``shard/key``, stable across runs and machines.
        index: How many samples of the shard stand before it.
        members: Content by lower-case extension.
    """

    id: str
    index: int
    members: dict[str, bytes]


class ShardError(Exception):
    """A shard cannot be read, or not to its end; what came before remains good."""


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Resolves paths, globs, brace ranges and folders to a sorted list of shards.

    Args:
        patterns: For example ``data/{00000..00009}.tar``, ``data/*.tar``, or ``data``.

    Raises:
        UserError: If a pattern matches no shard.
    """
    shards: list[str] = []
    for pattern in patterns:
        if re.match(r"^[a-z][a-z0-9+]*:", pattern):
            raise UserError(f"{pattern}: only local paths are supported, copy the shards first")
        try:
            paths = list(braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"{pattern}: unbalanced braces, expected such as {{0..9}}") from error
        for path in paths:
            if os.path.isdir(path):
                found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            elif os.path.isfile(path):
                found = [path]
            else:
                found = sorted(glob.glob(path))
            if not found:
                raise UserError(f"no shard found at {path}: check the path (expected .tar files)")
            shards += found
    if not shards:
        raise UserError("no shards given: name at least one .tar file, folder or pattern")
    return list(dict.fromkeys(shards))


def read_shard(path: str, wanted: Container[int] | None = None) -> Iterator[RawSample]:
    """Yields the samples of one shard in order.

    Args:
        path: A tar file.
        wanted: Indices to yield; the payload of all others is skipped, not read.

    Raises:
        ShardError: If the tar cannot be opened or ends early, after what could be read.
    """
    shard = os.path.basename(path).removesuffix(".tar")
    index = -1
    key: str | None = None
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = _MEMBER.match(member.name)
                if not member.isreg() or match is None:
                    continue
                if match[1] != key:
                    if members:
                        yield RawSample(f"{shard}/{key}", index, members)
                    key, members, index = match[1], {}, index + 1
                if wanted is None or index in wanted:
                    payload = tar.extractfile(member)
                    assert payload is not None  # a regular member has content
                    content = payload.read()
                    if len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    members[match[2].lower()] = content
                # tarfile keeps every header it has seen; a long shard would grow without bound.
                tar.members = []  # type: ignore[attr-defined]
            # tarfile takes a damaged header for the archive's end, which is a block of zeros.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(f"{path}: {error}") from error
    if members:
        yield RawSample(f"{shard}/{key}", index, members)
