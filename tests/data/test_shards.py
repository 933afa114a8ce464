"""Shards: found by path, folder, glob, braces, list or URL, and read to whatever end they have."""

from __future__ import annotations

import gzip
import os
import tarfile

import pytest
from shard_factory import ids_of, make_shards, write_shard, write_tar

from navit_clip.data import known_files
from navit_clip.data.patterns import expand_shards, shard_names
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.errors import UserError


def read(path, wanted=None):
    """The readable samples, and the error after them, if any."""
    samples = []
    try:
        for sample in read_shard(str(path), wanted):
            samples.append(sample)
    except ShardError as error:
        return samples, str(error)
    return samples, None


@pytest.fixture
def root(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "a/10.tar", "b/x.tar", "b/notes.txt", "x/y/z.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["a/1.tar"], ["a/1.tar"]),
        (["a"], ["a/0.tar", "a/1.tar", "a/10.tar"]),
        (["a/"], ["a/0.tar", "a/1.tar", "a/10.tar"]),
        (["b"], ["b/x.tar"]),
        (["a/*.tar"], ["a/0.tar", "a/1.tar", "a/10.tar"]),
        (["a/?.tar"], ["a/0.tar", "a/1.tar"]),
        (["a/{0..1}.tar"], ["a/0.tar", "a/1.tar"]),
        (["{a,b}/*.tar"], ["a/0.tar", "a/1.tar", "a/10.tar", "b/x.tar"]),
        (["**/*.tar", "a"], ["a/0.tar", "a/1.tar", "a/10.tar", "b/x.tar", "x/y/z.tar"]),
        (["{a,b}"], ["a/0.tar", "a/1.tar", "a/10.tar", "b/x.tar"]),
        (["b", "a/0.tar"], ["b/x.tar", "a/0.tar"]),
        (
            ["a", "a/1.tar", "{a,a}", "b/../a//0.tar"],
            ["a/0.tar", "a/1.tar", "a/10.tar"],
        ),  # each once
    ],
)
def test_patterns(patterns, found, root):
    expanded = expand_shards([f"{root}/{pattern}" for pattern in patterns])
    assert [path.removeprefix(f"{root}/").replace("//", "/") for path in expanded] == found


@pytest.mark.parametrize("pattern", ["none.tar", "a/{0..2}.tar", "c", "a/z*.tar", "a/{0.tar"])
def test_what_matches_nothing_is_named(pattern, root):
    with pytest.raises(UserError, match=str(root)):
        expand_shards([f"{root}/a", f"{root}/{pattern}"])


def test_a_folder_without_shards_and_an_empty_list(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar file in .*, and no image below it"):
        expand_shards([str(tmp_path)])
    with pytest.raises(UserError, match="no shards given"):
        expand_shards([])


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("https://host/a/{0..1}.tar", ["https://host/a/0.tar", "https://host/a/1.tar"]),
        ("http://host/0.tar?sig=a*b", ["http://host/0.tar?sig=a*b"]),
        ("HTTPS://host:8080/get", ["HTTPS://host:8080/get"]),
        ("pipe:aws s3 cp s3://b/{0..1}.tar -", [f"pipe:aws s3 cp s3://b/{i}.tar -" for i in "01"]),
        (r"pipe:tr '\n' x | awk '{print $1}' ${X}", [r"pipe:tr '\n' x | awk '{print $1}' ${X}"]),
    ],
)
def test_urls_and_commands_expand_braces_alone(pattern, found):
    assert expand_shards([pattern, pattern], allow_commands=True) == found


def test_a_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    make_shards(tmp_path / "laion:v1", [1, 1])
    (tmp_path / "list.txt").write_text("laion:v1/00000.tar\nlaion:v1/*1.tar\n")
    monkeypatch.chdir(tmp_path)
    for pattern in ("laion:v1", "laion:v1/*.tar", "laion:v1/{00000..00001}.tar",
                    f"{tmp_path}/list.txt", "list.txt"):  # fmt: skip
        shards = expand_shards([pattern])
        assert shard_names(shards) == ["00000", "00001"]
        assert [sample.id for path in shards for sample in read_shard(path)] == [
            "00000/0",
            "00001/0",
        ]


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("pipe:cat 0.tar", "--data.allow_commands true"),
        ("s3:/0.tar", "expected such as s3://bucket/0.tar"),
        ("http:/0.tar", "without a host"),
        ("https://[::1/0.tar", "without a host"),
        ("https://host/*.tar", "brace range"),
        ("https://host/shards.txt", "download it first"),
        ("https://host/t.parquet?signature=1", "a table must be a local file"),
        ("s3://bucket/t.CSV", "a table must be a local file"),
        ("https://host/{0.tar", "unbalanced braces"),
    ],
)
def test_what_is_not_read_says_what_to_do(pattern, advice):
    with pytest.raises(UserError, match=advice) as raised:
        expand_shards([pattern])
    assert str(raised.value).startswith(pattern)


def test_a_list_file(root):
    names = root / "b" / "train [1].list"
    lines = [
        "# two folders",
        "",
        "../a/{0..1}.tar",
        "  x.tar  ",
        f"{root}/a/*.tar",
        "../b",
        "*.tar",
    ]
    names.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = [os.path.relpath(shard, root) for shard in expand_shards([str(names)])]
    assert found == ["a/0.tar", "a/1.tar", "b/x.tar", "a/10.tar"]  # each once


def test_a_list_file_of_urls_and_commands(tmp_path):
    names = tmp_path / "all.txt"
    names.write_text("https://host/{0..1}.tar\npipe:cat 0.tar\n")
    with pytest.raises(
        UserError, match=r"all\.txt, line 2: pipe:cat .*--data\.allow_commands true"
    ):
        expand_shards([str(names)])
    assert expand_shards([str(names)], allow_commands=True) == [
        "https://host/0.tar",
        "https://host/1.tar",
        "pipe:cat 0.tar",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "list is empty"),
        (b"# nothing\n\n", "list is empty"),
        (b"\nnone.tar\n", "line 2: no shard found at .*none.tar"),
        (b"other.txt\n", "line 1: .*other.txt: a list file cannot name another"),
        (b"\xff\xfe0.tar", "cannot be read as a list"),
    ],
)
def test_a_list_file_with_a_mistake(text, message, tmp_path):
    (tmp_path / "other.txt").write_text("0.tar")
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UserError, match=message) as raised:
        expand_shards([str(tmp_path / "list.txt")])
    assert str(raised.value).startswith(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        ([], []),
        (["/d/a/0.tar"], ["0"]),
        (["/d/a/0.tar", "/d/a/1.tar"], ["0", "1"]),
        (["/d/a/0.tar", "/d/b/0.tar", "/d/b/1.tar"], ["a/0", "b/0", "1"]),
        (["/x/a/0.tar", "/y/a/0.tar", "/y/b/0.tar"], ["x/a/0", "y/a/0", "b/0"]),
        (["/0.tar", "/a/0.tar"], ["0", "a/0"]),
        (["/v1.0.tar", "/d/v1.0"], ["v1.0", "d/v1.0"]),
        (["https://h/a/0.tar?sig=1", "https://h/a/1.tar?sig=2"], ["0", "1"]),
        (["https://u:p@h/a/0.tar", "https://i/a/0.tar", "/a/0.tar"], ["h/a/0", "i/a/0", "a/0"]),
        (["https://h/a%20b.tar", "http://h"], ["a b", "h"]),
        (["s3://b/x%2F0.tar", "s3://b/y%2f0.tar", "s3://b/0.tar/"], ["x/0", "y/0", "b/0"]),
        (["/d/a/../0.tar", "/e/./0.tar", "/d/b/.."], ["d/0", "e/0", "d"]),
        (
            ["pipe:aws s3 cp s3://b/a/0.tar -", "pipe:curl -sL 'https://h/1.tar?x=1&y=2'"],
            ["0", "1"],
        ),
        (["pipe:cat a/0.tar | cat", "pipe:gunzip -c </b/0.tar.gz"], ["a/0", "b/0"]),
    ],
)
def test_names_of_shards(shards, names):
    assert shard_names(shards) == names
    assert shard_names(shards[::-1]) == names[::-1]


def test_names_of_shards_that_nothing_but_a_query_or_a_command_tells_apart():
    shards = ["https://h/get?i=1", "https://h/get?i=2", "pipe:get 1", "pipe:get 2", "/d/0.tar"]
    names = shard_names(shards)
    assert len(set(names)) == 5
    assert names == [shard_names(shards[::-1])[4 - i] for i in range(5)]
    assert [name.partition("~")[0] for name in names] == ["get", "get", "command", "command", "0"]


def test_ids_begin_with_the_name_given(tmp_path):
    (shard,) = make_shards(tmp_path, [2])
    assert [sample.id for sample in read_shard(str(shard), name="coco/0")] == [
        "coco/0/0",
        "coco/0/1",
    ]


def test_a_name_with_the_characters_of_a_pattern_is_still_a_name(tmp_path):
    folder = tmp_path / "run [1]*"
    folder.mkdir()
    (folder / "0.tar").write_bytes(b"")
    assert expand_shards([str(folder / "0.tar")]) == [str(folder / "0.tar")]
    assert expand_shards([str(folder)]) == [str(folder / "0.tar")]


@pytest.mark.parametrize("few", [0, 3, 1000])
def test_of_many_names_in_a_folder_the_same_is_found(few, root, monkeypatch):
    """Links, folders called like shards and tables, however it is told what they are."""
    monkeypatch.setattr(known_files, "_FEW", few)
    monkeypatch.chdir(root)
    (root / "a/2.tar").symlink_to(root / "b/x.tar")
    (root / "a/3.tar").symlink_to(root / "b", target_is_directory=True)
    (root / "a/4.tar").mkdir()
    (root / "a/4.tar/inside.tar").touch()
    (root / "a/list.txt").write_text("0.tar\n2.tar\n../b/x.tar\n4.tar\n/none.tar\n")
    found = ["a/0.tar", "a/1.tar", "a/2.tar", "a/3.tar/x.tar", "a/4.tar/inside.tar"]
    assert expand_shards(["a/{0..4}.tar"]) == found
    assert expand_shards([f"{root}/a/{{0..4}}.tar"]) == [f"{root}/{path}" for path in found]
    assert expand_shards(["a/[0-4].tar"]) == found
    with pytest.raises(UserError, match=r"^no shard found at a/5.tar: check the path"):
        expand_shards(["a/{0..5}.tar"])
    with pytest.raises(UserError, match=r"^a/list.txt, line 5: no shard found at /none.tar"):
        expand_shards(["a/list.txt"])
    with pytest.raises(UserError, match=r"^no shard found at a/0.tar/0.tar"):
        expand_shards(["a/{0..1}.tar/0.tar"])


def test_a_folder_is_listed_in_place_of_a_request_for_each_shard(tmp_path, monkeypatch):
    for number in range(200):
        (tmp_path / f"{number:03}.tar").touch()
    (tmp_path / "list.txt").write_text("\n".join(f"{number:03}.tar" for number in range(200)))
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(path) or stat(path, **more))
    for pattern in ("{000..199}.tar", "*.tar", "list.txt"):
        assert len(expand_shards([f"{tmp_path}/{pattern}"])) == 200
        assert len(asked) < 80
        asked.clear()


def test_a_folder_that_may_be_entered_and_not_listed(tmp_path, monkeypatch):
    (tmp_path / "0.tar").touch()
    monkeypatch.setattr(known_files, "_FEW", 0)

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert expand_shards([f"{tmp_path}/0.tar"]) == [f"{tmp_path}/0.tar"]


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
