"""Webdataset shards to raw samples.

A shard is a tar whose neighbouring members ``key.jpg``, ``key.txt``, ``key.json`` form one sample,
as img2dataset writes them; it lies in a file, on a web server, or comes out of a command. Read with
the standard library, member by member, so that samples before a resume point cost a header each
and no payload.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Container, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import IO, cast

from navit_clip.data.command import CommandStream
from navit_clip.data.forward_stream import ForwardStream
from navit_clip.data.http import HttpStream
from navit_clip.data.patterns import COMMAND, is_url, shard_names

# Directory names may have dots, so the key ends at the first dot of the last component.
_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


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


def read_shard(
    path: str, wanted: Container[int] | None = None, name: str | None = None
) -> Iterator[RawSample]:
    """Yields the samples of one shard in order.

    A sample ends where the key changes, and where an extension comes again: two neighbours with
    the same key are two samples with the same id.

    Args:
        path: A tar file, as `expand_shards` gives it: a path, a URL or ``pipe:COMMAND``.
        wanted: Indices to yield; the payload of all others is skipped, not read.
        name: What ids begin with; the file's name without ``.tar`` if not given.

    Raises:
        ShardError: If the tar cannot be opened or ends early, after what could be read.
    """
    shard = shard_names([path])[0] if name is None else name
    index = -1
    key: str | None = None
    extensions: set[str] = set()
    members: dict[str, bytes] = {}
    try:
        with closing(_open(path)) as source, _open_tar(source) as tar:
            for member in tar:
                match = _MEMBER.match(member.name)
                if not member.isreg() or match is None:
                    continue
                extension = match[2].lower()
                if match[1] != key or extension in extensions:
                    if members:
                        yield RawSample(f"{shard}/{key}", index, members)
                    key, extensions, members, index = match[1], set(), {}, index + 1
                extensions.add(extension)
                if wanted is None or index in wanted:
                    source.seek(member.offset_data)
                    content = source.read(member.size)
                    if len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    members[extension] = content
                # tarfile keeps every header it has seen; a long shard would grow without bound.
                tar.members = []  # type: ignore[attr-defined]
            # tarfile takes a damaged header for the archive's end, which is a block of zeros.
            source.seek(tar.offset)
            if source.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
            if members:
                yield RawSample(f"{shard}/{key}", index, members)
            if isinstance(source, ForwardStream):
                source.finish()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(f"{_without_query(path)}: {error}") from error


class _QuickHeader(tarfile.TarInfo):
    """Reads the headers of ordinary files in a fifth of the time; tarfile reads all others."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _QuickHeader:
        """A header of 512 bytes, as `tarfile.TarInfo.frombuf`."""
        try:
            ordinary = buf[156:157] == tarfile.REGTYPE and not buf[345]
            size, checksum = int(buf[124:135], 8), int(buf[148:154], 8)
        except (IndexError, ValueError):
            ordinary = False
        if not ordinary or sum(buf) - sum(buf[148:156]) + 8 * ord(" ") != checksum:
            return super().frombuf(buf, encoding, errors)
        header = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        header.size = size
        return header


def _open(path: str) -> IO[bytes] | ForwardStream:
    if path.startswith(COMMAND):
        return CommandStream(path.removeprefix(COMMAND))
    if is_url(path):
        return HttpStream(path)
    return open(path, "rb")


def _open_tar(source: IO[bytes] | ForwardStream) -> tarfile.TarFile:
    start = source.read(tarfile.BLOCKSIZE)
    source.seek(0)
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise tarfile.ReadError(f"compressed with {method}; shards must be plain .tar files")
    try:
        return tarfile.open(fileobj=cast(IO[bytes], source), mode="r:", tarinfo=_QuickHeader)
    except tarfile.ReadError as error:
        raise tarfile.ReadError(f"not a tar file: {error}") from error


def _without_query(path: str) -> str:
    """A shard for messages; a URL's query may hold a signature that opens it."""
    return path.partition("?")[0] if is_url(path) else path


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a shard that is being written.

    Without time or owner: the same content gives the same bytes.
    """
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
