"""Shards found by path, folder, glob, braces, list or URL, and their short names."""

from __future__ import annotations

import os

import pytest
from shard_factory import make_shards

from navit_clip.data import known_files
from navit_clip.data.patterns import expand_shards, shard_names
from navit_clip.data.shards import read_shard
from navit_clip.errors import UserError


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
