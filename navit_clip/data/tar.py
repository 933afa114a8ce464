"""The members of a tar, read once from front to back: ustar, GNU's long names and pax.

The standard library's reader takes zeros for the end and believes sizes. Here any bytes are members
or damage that is named; reading goes on behind it, and only headers are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from tarfile import BLOCKSIZE, RECORDSIZE
from typing import IO, NamedTuple

from navit_clip.data.forward_stream import ForwardStream

# Writers end a tar with two blocks of zeros, then fill up a record.
_LONGEST_END = RECORDSIZE + BLOCKSIZE
_MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records
_MAX_SIZE = 1 << 60  # no file is larger, and offsets stay within what can be sought
_ZEROS = bytes(BLOCKSIZE)

_REGULAR, _LINKS, _SPARSE = (b"0", b"\0", b"7"), (b"1", b"2"), b"S"
_WITHOUT_CONTENT = (*_LINKS, b"3", b"4", b"5", b"6")  # whatever size they state
_LONG_NAME, _GLOBAL = b"L", b"g"
_EXTENSIONS = (_LONG_NAME, b"K", b"x", b"X", _GLOBAL)


class Member(NamedTuple):
    r"""One file or link.

    Attributes:
        name: Its path; bytes that are not UTF-8 as ``\xe9``, so that it can be stored and printed.
        size: Bytes of its content.
        problem: Why its content cannot be read, empty if it can.
    """

    name: str
    size: int
    problem: str = ""


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


class TarReader:
    """Iterates over the members of a tar.

    Args:
        source: A file or a stream, at its first byte.

    Attributes:
        damage: What is wrong with the tar, as far as it has been read.
    """

    def __init__(self, source: IO[bytes] | ForwardStream) -> None:
        self.damage: list[str] = []
        self._source = source
        # Offsets of the member's content and of the next header.
        self._content = self._size = self._next = 0

    def __iter__(self) -> Iterator[Member | None]:
        """Yields members, and None wherever some may be missing.

        Raises:
            OSError: If the source fails.
        """
        everywhere: dict[bytes, bytes] = {}  # pax records about all members from here on
        records: dict[bytes, bytes] = {}  # about the next one
        zeros, extended, lost = 0, False, False  # lost: behind damage, looking for a header
        while len(block := self._read_next(BLOCKSIZE)) == BLOCKSIZE:
            start = self._next - BLOCKSIZE
            # An extension belongs to a member, which zeros then stand for.
            if block == _ZEROS and not extended:
                zeros += BLOCKSIZE
                continue
            header = parse_header(block)
            found: dict[bytes, bytes] | None = {}
            if header is not None and header.kind in _EXTENSIONS:
                found = _parse_records(header.kind, self._read_next(header.size))
            if header is None or found is None:
                if not lost:
                    self.damage.append(f"damaged header at byte {start}")
                    yield None
                zeros, extended, lost, records = 0, False, True, {}
                continue
            if zeros and not lost:
                self.damage.append(f"zeros and then more members at byte {start}")
                # Where tars end and records begin it is a second tar, and nothing is missing.
                if start % RECORDSIZE or zeros > _LONGEST_END:
                    yield None
            zeros, lost = 0, False
            if header.kind == _GLOBAL:
                everywhere |= found
            elif header.kind in _EXTENSIONS:
                records, extended = records | found, True
            else:
                member = self._member(header, block, everywhere | records)
                records, extended = {}, False
                if member is not None:
                    yield member
        if block.strip(b"\0") or not zeros:
            self.damage.append(f"cut off: it has no end mark at byte {self._next - BLOCKSIZE}")
            yield None
        elif zeros > _LONGEST_END:
            self.damage.append(f"ends with {zeros:,} zeros, more than the end of a tar has")
            yield None

    def read(self) -> bytes:
        """The content of the member that was yielded last; less if the tar ends within it."""
        self._source.seek(self._content)
        return self._source.read(self._size)

    def _read_next(self, size: int) -> bytes:
        self._source.seek(self._next)
        self._next += -(-size // BLOCKSIZE) * BLOCKSIZE
        return self._source.read(size)

    def _member(self, header: _Header, block: bytes, records: dict[bytes, bytes]) -> Member | None:
        """The member of a header, None if it is a folder or a device; moves behind its content."""
        if header.kind == _SPARSE:
            # Its map may go on in blocks of its own, with a flag at another place.
            more = block[482]
            while more and len(block := self._read_next(BLOCKSIZE)) == BLOCKSIZE:
                more = block[504]
        self._content, self._size = self._next, int(records.get(b"size", header.size))
        if header.kind not in _WITHOUT_CONTENT:
            self._next += -(-self._size // BLOCKSIZE) * BLOCKSIZE
        raw = records.get(b"GNU.sparse.name") or records.get(b"path") or header.name
        if header.kind in _LINKS:
            problem = "a link, not a file"
        elif header.kind == _SPARSE or b"GNU.sparse" in records:
            problem = "a sparse file, of which tar stores parts"
        elif header.kind in _REGULAR and not (header.kind == b"\0" and raw.endswith(b"/")):
            problem = ""
        else:
            return None
        return Member(raw.decode("utf-8", "backslashreplace"), self._size, problem)


def parse_header(block: bytes) -> _Header | None:
    """A block of 512 bytes as a header, None if it is none."""
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if checksum is None or size is None:
        return None
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != unsigned and checksum != unsigned - 256 * _negative(block):
        return None
    kind = block[156:157]
    if size > (_MAX_EXTENSION if kind in _EXTENSIONS else _MAX_SIZE):
        return None
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(name, size, kind)


def _negative(block: bytes) -> int:
    """How many bytes of a header, without its checksum, old writers took for negative numbers."""
    return sum(byte > 127 for byte in block[:148] + block[156:])


def _number(field: bytes) -> int | None:
    """A number of a header: octal digits, or binary behind a first byte of 128."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    try:
        return int(digits, 8) if digits.isdigit() else None if digits else 0
    except ValueError:  # 8 or 9
        return None


def _parse_records(kind: bytes, content: bytes) -> dict[bytes, bytes] | None:
    """What an extension says of a member's path and size, None if it is malformed."""
    if kind in (_LONG_NAME, b"K"):
        return {b"path": content.partition(b"\0")[0]} if kind == _LONG_NAME else {}
    found, at = {}, 0
    while at < len(content):
        # "LENGTH KEY=VALUE\n", the length that of all of it.
        length = content[at : at + 20].partition(b" ")[0]
        end = at + int(length) if length.isdigit() else 0
        key, equals, value = content[at + len(length) + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(content):
            return None
        if key in (b"path", b"GNU.sparse.name"):
            found[key] = value[:-1]
        elif key == b"size":
            if not value[:-1].isdigit() or len(value) > 20 or int(value) > _MAX_SIZE:
                return None
            found[key] = value
        elif key.startswith(b"GNU.sparse"):
            found[b"GNU.sparse"] = b""
        at = end
    return found
