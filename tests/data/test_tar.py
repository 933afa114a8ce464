"""Tars byte by byte: whatever a shard holds, it gives samples that are true, or a counted error."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc

import pytest
from shard_factory import CAPTIONS, write_tar

from navit_clip.data import shards
from navit_clip.data.raw_sample import MAX_SAMPLE_BYTES
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.errors import SkipSampleError

RECORD = tarfile.RECORDSIZE


def members_of(samples, start=0):
    """Members of so many samples; sizes that end within a block, with one, and none at all."""
    rng = random.Random(start)
    for i in range(start, start + samples):
        yield f"{i:04d}.jpg", rng.randbytes(rng.choice((512, 1100, 3000)))
        yield f"{i:04d}.txt", CAPTIONS[i % len(CAPTIONS)].encode()
        yield f"{i:04d}.json", b"{}" * (i % 3)


def whole_tar(samples=12, start=0, **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, content in members_of(samples, start):
            shards.add_member(tar, name, content)
    return file.getvalue()


def header(name=b"0.jpg", size=b"%011o" % 3, kind=b"0", magic=b"ustar\00000", rest=b"") -> bytes:
    """A header with a right checksum, whatever else is in it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157], block[257:265], block[148:156] = kind, magic, b" " * 8
    block[345 : 345 + len(rest)] = rest
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def block(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def extension(kind: bytes, content: bytes) -> bytes:
    return header(b"x", b"%011o" % len(content), kind) + block(content)


def pax(**records) -> bytes:
    content = b""
    for key, value in records.items():
        body = b" %s=%s\n" % (key.replace("_", ".").encode(), value)
        length = len(body) + 1
        while length != len(b"%d" % length) + len(body):
            length += 1
        content += b"%d" % length + body
    return extension(b"x", content)


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a shard; returns its samples and the error, if any."""

    def read(data, wanted=None):
        (tmp_path / "0.tar").write_bytes(data)
        samples = []
        try:
            for sample in read_shard(str(tmp_path / "0.tar"), wanted):
                samples.append(sample)
        except ShardError as error:
            return samples, str(error)
        return samples, None

    return read


END = bytes(1024)
WHOLE = whole_tar()
with tarfile.open(fileobj=io.BytesIO(WHOLE)) as opened:
    MEMBERS = [(member.offset, member.offset_data) for member in opened]
    LAST = opened.getmembers()[-1]
CONTENT_ENDS = LAST.offset_data + -(-LAST.size // 512) * 512


def key_of(sample):
    return int(sample.id.partition("/")[2])


def contents(samples):
    """Samples without their places, which change where some are missing."""
    return {(sample.id, *sample.members.items()) for sample in samples}


# Where a shard ends


def test_every_cut_before_the_end_mark_is_an_error_and_gives_whole_samples_alone(read):
    everything, error = read(WHOLE)
    assert (len(everything), error) == (12, None)
    cuts = {at + more for member in MEMBERS for at in member for more in (-1, 0, 1, 100)}
    cuts |= {CONTENT_ENDS, CONTENT_ENDS + 100}
    for cut in sorted(cuts - {-1}):
        samples, error = read(WHOLE[:cut])
        assert error is not None
        assert samples == everything[: len(samples)]
        assert len(samples) >= sum(offset < cut for offset, _ in MEMBERS[:-1]) // 3 - 1


@pytest.mark.parametrize("zeros", [512, 700, 1024, RECORD + 512])
def test_a_tar_that_its_writer_ended_is_whole_however_long_its_end(zeros, read):
    samples, error = read(WHOLE[:CONTENT_ENDS] + bytes(zeros))
    assert (len(samples), error) == (12, None)


def test_a_hole_of_zeros_anywhere_is_an_error_and_what_is_behind_it_is_read(read):
    everything, _ = read(WHOLE)
    for first, last in itertools.combinations(range(0, len(MEMBERS), 2), 2):
        hole = bytearray(WHOLE)
        start, stop = MEMBERS[first][0], MEMBERS[last][0]
        hole[start:stop] = bytes(stop - start)
        samples, error = read(bytes(hole))
        assert error is not None
        # A hole that ends where a second tar would begin, and is no longer than an end, looks so.
        as_tars_end = stop % RECORD == 0 and stop - start <= RECORD + 512
        assert as_tars_end or contents(samples) <= contents(everything)
        lost = set(range(first // 3 - 1, last // 3 + 1))
        assert {key_of(sample) for sample in samples} >= set(range(12)) - lost


def test_a_hole_within_contents_loses_no_sample_but_those_beside_it(read):
    everything, _ = read(WHOLE)
    hole = bytearray(WHOLE)
    start, stop = MEMBERS[9][1] + 100, MEMBERS[15][1] + 100
    hole[start:stop] = bytes(stop - start)
    samples, error = read(bytes(hole))
    assert "damaged header" in error
    assert [key_of(sample) for sample in samples] == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert contents(samples) <= contents(everything)


@pytest.mark.parametrize("part", [1 / 3, 1 / 2, 2 / 3])
def test_a_file_that_was_allocated_and_not_filled_is_an_error(part, read):
    whole = whole_tar(30)
    everything, _ = read(whole)
    cut = int(part * len(whole))
    samples, error = read(whole[:cut] + bytes(len(whole) - cut))
    assert "zeros" in error
    assert samples == everything[: len(samples)]
    assert len(samples) > 30 * part - 3


def test_two_tars_in_one_file_are_read_and_reported(read):
    both = whole_tar(12) + whole_tar(12, start=12)
    samples, error = read(both)
    assert [key_of(sample) for sample in samples] == list(range(24))
    assert [sample.index for sample in samples] == list(range(24))
    assert "zeros and then more members" in error
    assert read(both, {15}) == ([samples[15]], error)


def test_bytes_behind_the_end_are_an_error(read):
    samples, error = read(WHOLE + b"<html>" * 200)
    assert len(samples) == 11  # nothing proves that the last one ended where zeros began
    assert f"damaged header at byte {len(WHOLE)}" in error


# What is a member


@pytest.mark.parametrize(
    "options",
    [
        {"format": tarfile.USTAR_FORMAT},
        {"format": tarfile.GNU_FORMAT},
        {"format": tarfile.PAX_FORMAT},
        {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "of git archive"}},
    ],
)
def test_long_and_foreign_names_in_every_format(options, tmp_path):
    path = tmp_path / "0.tar"
    names = ["a" * 90, "folder/" * 20 + "b", "caf\xe9/" * 10 + "\u732b", "c\nd"]
    with tarfile.open(path, "w", **options) as tar:
        for name in names:
            shards.add_member(tar, f"{name}.jpg", b"1")
            shards.add_member(tar, f"{name}.txt", b"2")
    samples = list(read_shard(str(path)))
    assert [sample.id for sample in samples] == [f"0/{name}" for name in names]
    assert all(sample.members == {"jpg": b"1", "txt": b"2"} for sample in samples)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_is_not_utf8_can_be_printed_and_stored(form, tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=form, encoding="latin-1") as tar:
        for length in (1, 120):
            name = "\udce9" * length if form == tarfile.PAX_FORMAT else "\xe9" * length
            name = "/".join((name[:80], name[80:])) if length > 80 else name
            shards.add_member(tar, f"{name}.jpg", b"1")
    samples = list(read_shard(str(path)))
    assert [sample.members for sample in samples] == [{"jpg": b"1"}] * 2
    assert samples[0].id == r"0/\xe9"
    samples[1].id.encode()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("form", ["gnu", "posix", "posix --sparse-version=0.1", "oldgnu"])
def test_a_sparse_file_and_a_link_are_named_and_their_neighbours_read(form, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"caption {i}")
    for i in (0, 3):
        (folder / f"{i}.bmp").write_bytes(b"BM" * 50)
    with open(folder / "1.bmp", "wb") as file:
        for place in range(40):  # more holes than a header has room for
            file.seek(place * 16384)
            file.write(b"x")
        file.truncate(1 << 20)
    (folder / "2.bmp").symlink_to("0.bmp")
    names = sorted(path.name for path in folder.iterdir())
    command = ["tar", "--sparse", *f"--format={form}".split(), "-cf", tmp_path / "0.tar"]
    subprocess.run([*command, "-C", folder, *names], check=True)
    samples = list(read_shard(str(tmp_path / "0.tar")))
    assert [sample.id for sample in samples] == ["0/0", "0/1", "0/2", "0/3"]
    for i, what in ((1, "bmp is a sparse file"), (2, "bmp is a link")):
        with pytest.raises(SkipSampleError, match=f"unreadable_member: {what}"):
            samples[i].check()
        assert samples[i].members == {}
    for i in (0, 3):
        samples[i].check()
        assert samples[i].members == {"bmp": b"BM" * 50, "txt": f"caption {i}".encode()}


# Hostile headers


CONTENT = block(b"abc")
HOSTILE = {
    "an endless size": header(size=b"\x80" + b"\xff" * 11),
    "a size past what can be sought": header(size=b"\x80" + (1 << 62).to_bytes(11, "big")),
    "the largest octal size": header(size=b"7" * 12),
    "a negative size": header(size=b"-0000000003\0"),
    "a negative binary size": header(size=b"\xff" * 12),
    "a size that is none": header(size=b"0x10"),
    "a size with an underscore": header(size=b"0000000_003"),
    "a size of eights": header(size=b"00000000888"),
    "an endless long name": header(kind=b"L", size=b"\x80" + b"\xff" * 11),
    "a long name of a terabyte": header(kind=b"L", size=b"\x80" + (1 << 40).to_bytes(11, "big")),
    "pax records of a gigabyte": header(kind=b"x", size=b"%011o" % (1 << 30)),
    "a chain of long names": extension(b"L", b"n.jpg\0") * 3000,
    "a chain of pax headers": pax(path=b"a.jpg") * 3000,
    "a chain of global headers": extension(b"g", b"12 comment=a\n") * 3000,
    "a pax size that is none": pax(size=b"-1") + header() + CONTENT,
    "a pax size of 5000 digits": pax(size=b"9" * 5000) + header() + CONTENT,
    "a pax size past what can be sought": pax(size=b"9" * 19) + header() + CONTENT,
    "a pax record of no length": extension(b"x", b"0 path=a\n") + header() + CONTENT,
    "a pax record of a long length": extension(b"x", b"9" * 600) + header() + CONTENT,
    "a pax record without a value": extension(b"x", b"8 path \n") + header() + CONTENT,
    "a sparse map without an end": header(kind=b"S", rest=b"1" * 155) + header(rest=b"1" * 155) * 9,
    "a sparse map that is none": pax(GNU_sparse_map=b"x,1,-1", GNU_sparse_major=b"1") + header(),
    "an extension of nothing": extension(b"L", b"n.jpg\0"),
    "an unknown kind": header(kind=b"Z") + CONTENT,
    "a size on a folder": header(kind=b"5", size=b"7" * 11),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_stop_nothing(name, read):
    tracemalloc.start()
    samples, error = read(whole_tar(3)[: -2 * RECORD] + HOSTILE[name] + WHOLE)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert samples or error
    read(HOSTILE[name] + END)


def test_what_follows_a_hostile_header_is_read(read):
    samples, error = read(header(b"0.jpg") + CONTENT + HOSTILE["a negative size"] + WHOLE)
    assert "damaged header" in error
    assert [key_of(sample) for sample in samples] == list(range(1, 12))


@pytest.mark.parametrize(
    "members",
    [
        [("0.jpg", 3 << 30), ("0.txt", 5)],
        [(f"0.{i}.txt", 60 << 20) for i in range(40)],
    ],
)
def test_a_sample_past_the_cap_is_skipped_and_not_read(members, tmp_path):
    path = tmp_path / "0.tar"
    with open(path, "wb") as file:  # its contents are holes that take no disk
        for name, size in [*members, ("1.jpg", 4)]:
            file.write(header(name.encode(), b"%011o" % size))
            file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(END)
    tracemalloc.start()
    samples = list(read_shard(str(path)))
    assert tracemalloc.get_traced_memory()[1] < 2 * MAX_SAMPLE_BYTES
    tracemalloc.stop()
    with pytest.raises(SkipSampleError, match=r"too_large: members of [\d,]+ bytes exceed"):
        samples[0].check()
    assert [sample.members for sample in samples] == [{}, {"jpg": bytes(4)}]


# Any bytes


SEEDS = [
    whole_tar(4, format=tarfile.USTAR_FORMAT),
    whole_tar(4, format=tarfile.GNU_FORMAT),
    pax(path=b"0.jpg", size=b"3") + header() + CONTENT + header(b"0.txt") + CONTENT + END,
]


def mutated(rng: random.Random) -> bytes:
    """A tar with a few bytes, blocks or numbers changed, removed, repeated or cut off."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) // 512) * 512
        kind = rng.randrange(7)
        if kind == 0:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:
            del data[at + rng.choice((0, 0, 100)) :]
        elif kind == 2:
            data[at : at + 512] = rng.choice((bytes(512), rng.randbytes(512), b""))
        elif kind == 3:
            data[at:at] = rng.choice([*HOSTILE.values(), *SEEDS, bytes(512)])[:20_000]
        elif kind == 4:
            data[at : at + 1024] = bytes(data[at : at + 1024]) * 2
        else:  # a field of a header, made valid again
            field, length = rng.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155)))
            head = bytearray(data[at : at + 512].ljust(512, b"\0"))
            filling = rng.choice((b"\xff", b"7", b"-", b"\0", b"9", b".", b"/"))
            head[field : field + length] = rng.choice((rng.randbytes(length), filling * length))
            head[148:156] = b" " * 8
            head[148:156] = b"%06o\0 " % sum(head)
            data[at : at + 512] = head
        if len(data) < 512:
            break
    return bytes(data)


@pytest.mark.parametrize("seed", range(8))
def test_any_bytes_are_samples_or_an_error(seed, read):
    rng = random.Random(seed)
    for _ in range(120):
        data = mutated(rng)
        samples, error = read(data)
        assert samples or error or not data.strip(b"\0") or len(data) < 5000
        assert [sample.index for sample in samples] == sorted({s.index for s in samples})
        for sample in samples:
            f"{sample.id}{list(sample.members)}".encode()
        chosen = {sample.index for sample in samples if rng.random() < 0.5}
        some, same_error = read(data, chosen)
        assert same_error == error
        assert list(map(str, some)) == [str(s) for s in samples if s.index in chosen]


@pytest.mark.parametrize("seed", range(4))
def test_one_flipped_bit_loses_no_sample_unreported(seed, read):
    everything, _ = read(WHOLE)
    rng = random.Random(seed)
    for _ in range(100):
        data = bytearray(WHOLE)
        offset = rng.choice(MEMBERS)[0]
        # In the first header's magic it makes the file no tar at all.
        data[offset + rng.choice((*range(257), *range(263, 512)))] ^= 1 << rng.randrange(8)
        samples, error = read(bytes(data))
        # The fill of a checksum's field means nothing.
        assert error is not None or samples == everything
        assert contents(samples) <= contents(everything)
        assert len(samples) >= 9


def test_fast_enough_for_a_shard_that_is_damaged_throughout(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.jpg", bytes(3))])
    with open(tmp_path / "0.tar", "ab") as file:
        file.write(b"\x55" * (8 << 20))
    with pytest.raises(ShardError, match="damaged header"):
        list(read_shard(str(tmp_path / "0.tar")))


def test_files_whose_names_are_not_utf8(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.tar")
    with open(path, "wb") as file:
        file.write(WHOLE[:CONTENT_ENDS])
    next(read_shard(os.fsdecode(path))).id.encode()
    with pytest.raises(ShardError, match=r"udce9\.tar: cut off") as caught:
        list(read_shard(os.fsdecode(path)))
    str(caught.value).encode()
