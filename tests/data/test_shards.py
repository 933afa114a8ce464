"""Shards are read to whatever end they have."""

from __future__ import annotations

import gzip
import tarfile

import pytest
from shard_factory import ids_of, make_shards, write_shard, write_tar

from navit_clip.data.shards import ShardError, read_shard


def read(path, wanted=None):
    """The readable samples, and the error after them, if any."""
    samples = []
    try:
        for sample in read_shard(str(path), wanted):
            samples.append(sample)
    except ShardError as error:
        return samples, str(error)
    return samples, None


def test_ids_begin_with_the_name_given(tmp_path):
    (shard,) = make_shards(tmp_path, [2])
    assert [sample.id for sample in read_shard(str(shard), name="coco/0")] == [
        "coco/0/0",
        "coco/0/1",
    ]


def test_samples_in_order_with_their_members(tmp_path):
    (shard,) = make_shards(tmp_path, [3])
    samples, error = read(shard)
    assert error is None
    assert [sample.id for sample in samples] == ids_of([3])
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert all(set(sample.members) == {"png", "txt"} for sample in samples)
    assert samples[0].members["txt"] != samples[1].members["txt"]


def test_only_wanted_samples_are_read(tmp_path):
    (shard,) = make_shards(tmp_path, [6])
    everything, _ = read(shard)
    samples, error = read(shard, {1, 4})
    assert error is None
    assert samples == [everything[1], everything[4]]


def test_names(tmp_path):
    shard = write_tar(
        tmp_path / "v1.0.tar",
        [
            ("./data.v2/000.jpg", b"a"),
            ("./data.v2/000.txt", b"b"),
            ("./data.v2/001.seg.PNG", b"c"),
            ("./data.v2/001.TXT", b"d"),
            ("deep/er/002.jpg", b"e"),
            ("README", b"no extension"),
            ("._002.jpg", b"a hidden file of another system's"),
            ("longer/" + "x" * 150 + ".jpg", b"f"),
            ("name with spaces é.txt", b"g"),
        ],
    )
    samples, error = read(shard)
    assert error is None
    assert [(sample.id, sample.members) for sample in samples] == [
        ("v1.0/./data.v2/000", {"jpg": b"a", "txt": b"b"}),
        ("v1.0/./data.v2/001", {"seg.png": b"c", "txt": b"d"}),
        ("v1.0/deep/er/002", {"jpg": b"e"}),
        ("v1.0/longer/" + "x" * 150, {"jpg": b"f"}),
        ("v1.0/name with spaces é", {"txt": b"g"}),
    ]
    assert [sample.index for sample in samples] == list(range(5))


def test_neighbours_that_share_a_key_are_not_merged(tmp_path):
    shard = write_tar(
        tmp_path / "0.tar",
        [
            ("a.jpg", b"1"),
            ("a.txt", b"2"),
            ("a.JPG", b"3"),
            ("a.txt", b"4"),
            ("a.txt", b"5"),
            ("b.jpg", b"6"),
        ],
    )
    everything, error = read(shard)
    assert error is None
    assert [(sample.id, sample.index, sample.members) for sample in everything] == [
        ("0/a", 0, {"jpg": b"1", "txt": b"2"}),
        ("0/a", 1, {"jpg": b"3", "txt": b"4"}),
        ("0/a", 2, {"txt": b"5"}),
        ("0/b", 3, {"jpg": b"6"}),
    ]
    for index in range(4):  # counted in the same way where nothing is read
        assert read(shard, {index}) == ([everything[index]], None)


def test_several_captions_are_several_members(tmp_path):
    shard = write_tar(
        tmp_path / "0.tar",
        [("k.jpg", b""), ("k.0.txt", b"a"), ("k.alt.txt", b"b"), ("k.txt", b"c")],
    )
    (sample,), error = read(shard)
    assert error is None
    assert sample.members == {"jpg": b"", "0.txt": b"a", "alt.txt": b"b", "txt": b"c"}


def test_folders_and_devices_are_no_members(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d.0", tarfile.DIRTYPE), ("1.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert read(path) == ([], None)


@pytest.mark.parametrize(
    ("member", "into", "readable"),
    [
        ("3.png", 512 + 10, 3),  # within an image
        ("3.txt", 512 + 3, 3),  # within a caption
        ("3.txt", 100, 3),  # within the header of the same sample's next member
        ("3.png", 100, 2),  # within the next sample's header: 2 might have gone on
    ],
)
@pytest.mark.parametrize("wanted", [range(5), {1, 3}, set()])
def test_a_truncated_tar_keeps_what_was_readable(member, into, readable, wanted, tmp_path):
    (shard,) = make_shards(tmp_path, [5])
    everything, _ = read(shard)
    data = shard.read_bytes()
    shard.write_bytes(data[: data.index(f"{member}\0".encode()) + into])
    samples, error = read(shard, wanted)
    assert str(shard) in error
    assert samples == [everything[i] for i in range(readable) if i in wanted]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    (shard,) = make_shards(tmp_path, [4])
    everything, _ = read(shard)
    data = bytearray(shard.read_bytes())
    header = data.index(b"2.png")
    data[header : header + 512] = b"\x55" * 512
    shard.write_bytes(data)
    samples, error = read(shard)
    # The second one may have gone on behind the damage, the third lacks a member.
    assert samples == [everything[0], everything[3]]
    assert "damaged header" in error


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" + b"x" * 2000])
def test_what_is_no_tar_is_an_error(content, tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    samples, error = read(path)
    assert samples == []
    assert str(path) in error


def test_a_compressed_tar_is_named_as_such(tmp_path):
    (shard,) = make_shards(tmp_path, [2])
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(shard.read_bytes()))
    assert read(path) == ([], f"{path}: compressed with gzip; shards must be plain .tar files")


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path / "0.tar", tmp_path):
        samples, error = read(path)
        assert samples == []
        assert str(path) in error


def test_an_empty_tar_has_no_samples(tmp_path):
    assert read(write_shard(tmp_path / "0.tar", {})) == ([], None)
