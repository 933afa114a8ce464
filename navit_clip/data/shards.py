"""Webdataset shards to raw samples.

A shard is a tar whose neighbouring members ``key.jpg``, ``key.txt``, ``key.json`` form one sample,
as img2dataset writes them; it lies in a file, on a web server, in an object store, or comes out of
a command. Read member by member, so that samples before a resume point cost a header each and no
payload. What stands for one may also be a piece of a table or a folder (`navit_clip.data.pieces`).
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Container, Iterator
from contextlib import closing
from typing import IO

from navit_clip.data.command import CommandStream
from navit_clip.data.forward_stream import ForwardStream
from navit_clip.data.http import HttpStream
from navit_clip.data.hub import web_file
from navit_clip.data.patterns import COMMAND, is_stored, is_url, shard_names
from navit_clip.data.pieces import Piece
from navit_clip.data.raw_sample import MAX_SAMPLE_BYTES, RawSample
from navit_clip.data.store import StoreStream
from navit_clip.data.tar import TarReader, parse_header
from navit_clip.errors import OutageError, SkipSampleError, UserError, may_pass
from navit_clip.files import storable

# Directory names may have dots, so the key ends at the first dot of the last component.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


# Of a folder of shards that `navit_clip.tools.make_shards` made.
MANIFEST = "manifest.jsonl"


class ShardError(Exception):
    """A shard cannot be read, or not all of it; the samples that it gave are good."""

    @property
    def may_pass(self) -> bool:
        """Whether it is out of reach rather than damaged or gone."""
        return self.__cause__ is not None and may_pass(self.__cause__)

    def refusal(self, where: str = "") -> UserError:
        """What to raise where every shard is needed; an `OutageError` if it may pass."""
        return (OutageError if self.may_pass else UserError)(
            f"{where}{self}; fetch the shard again"
        )


def read_shard(
    path: str, wanted: Container[int] | None = None, name: str | None = None
) -> Iterator[RawSample]:
    """Yields the samples of one shard in order.

    A sample ends where the key changes, and where an extension comes again: two neighbours with
    the same key are two samples with the same id. Of a damaged shard all samples are read but
    those beside the damage, which may lack members.

    Args:
        path: A shard, as `expand_shards` gives it: a tar's path or address, ``pipe:COMMAND``, a
            piece.
        wanted: Indices to yield; the payload of all others is skipped, not read.
        name: What ids begin with; the file's name without ``.tar`` if not given.

    Raises:
        ShardError: If the tar cannot be opened or is damaged, after what could be read.
    """
    shard = shard_names([path])[0] if name is None else name
    try:
        if isinstance(path, Piece):
            yield from path.samples(shard, wanted)
            return
        with closing(_open(path)) as source:
            _check_start(source)
            tar = TarReader(source)
            yield from _samples(tar, shard, wanted)
            if isinstance(source, ForwardStream):
                source.finish()
            if tar.damage:
                more = len(tar.damage) - 1
                raise ShardError(
                    f"{_without_query(path)}: {tar.damage[0]}" + (f", and {more} more" * bool(more))
                )
    except OSError as error:
        raise ShardError(f"{_without_query(path)}: {error}") from error


class EveryNth:
    """Which samples one of `parts` readers of the same shards wants: every `parts`-th batch.

    `read_shard` asks for each sample once, in order; it counts on from shard to shard.

    Attributes:
        place: Of the sample that was asked for last.
    """

    def __init__(self, batch: int, part: int, parts: int) -> None:
        self.batch, self.part, self.parts = batch, part, parts
        self.place = -1

    def __contains__(self, index: object) -> bool:
        self.place += 1
        return self.place // self.batch % self.parts == self.part

    def passes(self, count: int) -> bool:
        """Passes over the next samples, so many of them, if it wants none of these."""
        first = (self.place + 1) // self.batch
        wanted = first + (self.part - first) % self.parts
        if wanted * self.batch <= self.place + count:
            return False
        self.place += count
        return True


def _samples(tar: TarReader, shard: str, wanted: Container[int] | None) -> Iterator[RawSample]:
    index = -1
    key: str | None = None
    extensions: set[str] = set()
    members: dict[str, bytes] | None = None  # of a sample that is wanted
    problem: SkipSampleError | None = None
    size, damaged = 0, False
    for member in tar:
        if member is None:
            key, members, damaged = None, None, True
            continue
        match = _MEMBER.fullmatch(member.name)
        if match is None:
            continue
        extension = match[2].lower()
        if match[1] != key or extension in extensions:
            if members is not None:
                yield RawSample(f"{shard}/{key}", index, members, problem)
            key, extensions, index, size, problem = match[1], set(), index + 1, 0, None
            members = {} if not damaged and (wanted is None or index in wanted) else None
            damaged = False
        extensions.add(extension)
        if members is None:
            continue
        size += member.size
        if member.problem:
            problem = SkipSampleError("unreadable_member", f"{extension} is {member.problem}")
        elif size > MAX_SAMPLE_BYTES:
            found = f"members of {size:,} bytes exceed {MAX_SAMPLE_BYTES:,}"
            problem = SkipSampleError("too_large", found)
        if problem is None:
            members[extension] = tar.read()
        else:
            members.clear()
    if members is not None:
        yield RawSample(f"{shard}/{key}", index, members, problem)


def _open(path: str) -> IO[bytes] | ForwardStream:
    if path.startswith(COMMAND):
        return CommandStream(path.removeprefix(COMMAND))
    if is_url(path):
        return HttpStream(*web_file(path))
    if is_stored(path):
        return StoreStream(path)
    return open(path, "rb")


def _check_start(source: IO[bytes] | ForwardStream) -> None:
    """Raises an `OSError` for what is no tar at all, which is not searched for members."""
    start = source.read(tarfile.BLOCKSIZE)
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise OSError(f"compressed with {method}; shards must be plain .tar files")
    short = len(start) < tarfile.BLOCKSIZE
    damaged = start.strip(b"\0") and start[257:262] != b"ustar"
    if short or (damaged and parse_header(start) is None):
        raise OSError("not a tar file" if start else "not a tar file: empty file")


def _without_query(path: str) -> str:
    """A shard for messages; a URL's query may hold a signature that opens it."""
    return storable(path.partition("?")[0] if is_url(path) else path)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a shard that is being written.

    Without time or owner: the same content gives the same bytes.
    """
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
