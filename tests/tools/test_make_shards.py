"""Making shards: what goes in from every kind of source, and a user's mistakes."""

from __future__ import annotations

import io
import json
import sys

import pytest
from make_shards_cases import (
    coco,
    content,
    fields,
    make_images,
    records,
    refused,
    run,
    samples,
    table,
)
from shard_factory import HTML, encode, photo, png_of_size

from navit_clip.evaluation.captioned import open_captioned
from navit_clip.evaluation.labelled import open_labelled

# What goes in


def test_coco(tmp_path):
    names = make_images(tmp_path / "images", 7)
    captions = coco(tmp_path, names)
    out = tmp_path / "out"
    assert run("--coco", captions, "--images", tmp_path / "images", "--output", out,
               "--samples-per-shard", 3) == 0  # fmt: skip
    assert [path.name for path in sorted(out.glob("*.tar"))] == [
        "00000.tar", "00001.tar", "00002.tar"
    ]  # fmt: skip
    found = samples(out)
    assert [sorted(members) for members in found[:3]] == [
        ["jpg", "json", "txt"], ["json", "png", "txt"], ["json", "txt", "webp"]
    ]  # fmt: skip
    for i, (name, members) in enumerate(zip(names, found, strict=True)):
        image = members[name.partition(".")[2]]
        assert image == (tmp_path / "images" / name).read_bytes()
        assert members["txt"].decode() == f"caption 0 of {name}"
        assert json.loads(members["json"]) == {
            "captions": [f"caption 0 of {name}", f"caption 1 of {name}"],
            "width": 30 - i % 7,
            "height": 20 + i % 5,
            "file_name": name,
        }
    assert [record["samples"] for record in records(out)] == [3, 3, 1]

    # The evaluation reads the same from the shards as from the JSON.
    from_shards = open_captioned(str(out), None, None, ["json.captions"], None)
    from_json = open_captioned(None, str(tmp_path / "images"), str(captions), [], None)
    assert [(i.data, i.captions) for i in from_shards.read(0, 1)] == [
        (i.data, i.captions) for i in from_json.read(0, 1)
    ]


def test_karpathy_splits(tmp_path, capsys):
    names = make_images(tmp_path / "images" / "val2014", 4)
    images = [
        {
            "filename": name,
            "filepath": "val2014",
            "split": split,
            "sentences": [{"raw": f"{name} one"}, {"raw": f"{name} two "}],
        }
        for name, split in zip(names, ("train", "val", "restval", "train"), strict=True)
    ]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": images}))
    common = ("--coco", path, "--images", tmp_path / "images", "--output", tmp_path / "out")
    assert "has splits restval, train, val: name" in refused(capsys, *common)
    assert "no split 'test'" in refused(capsys, *common, "--split", "test")
    run(*common, "--split", "train", "restval")
    assert [f["captions"] for f in fields(tmp_path / "out")] == [
        [f"{names[i]} one", f"{names[i]} two"] for i in (0, 2, 3)
    ]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_table(tmp_path, suffix, delimiter):
    names = make_images(tmp_path, 3)
    lines = [
        ["title", "file", "alt"],
        ["A title", names[0], 'says "hello, world"'],
        ["", str(tmp_path / names[1]), "over\ntwo lines"],
        ["Another", names[2], "x" * 200_000],
        ["", f"./{names[0]}", "a second row"],
    ]
    path = table(tmp_path / f"t{suffix}", lines, delimiter)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    run("--table", path, "--image-column", "file", "--caption-column", "alt",
        "--caption-column", "title", "--output", tmp_path / "out")  # fmt: skip
    assert [f["captions"] for f in fields(tmp_path / "out")] == [
        ['says "hello, world"', "A title", "a second row"],  # one sample per image
        ["over\ntwo lines"],
        ["x" * 200_000, "Another"],
    ]


def test_parquet(tmp_path, capsys):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = make_images(tmp_path, 3)
    columns = {"alt": [["a", None, "b"], ["c"], None], "path": names, "title": ["t", None, "u"]}
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    common = ("--table", tmp_path / "t.parquet", "--output", tmp_path / "out")
    assert "it has 'alt', 'path', 'title'" in refused(capsys, *common)
    run(*common, "--caption-column", "title", "--caption-column", "alt")
    assert [f["captions"] for f in fields(tmp_path / "out")] == [["t", "a", "b"], ["c"], ["u"]]


def test_parquet_without_pyarrow_names_the_fix(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    line = refused(capsys, "--table", tmp_path / "t.parquet", "--output", tmp_path / "out")
    assert "pip install 'navit-clip[parquet]'" in line


def test_class_folders(tmp_path, capsys):
    make_images(tmp_path / "in" / "sea_lion", 2)
    make_images(tmp_path / "in" / "ant", 3)
    (tmp_path / "in" / "zebra").mkdir()
    (tmp_path / "in" / "ant" / "notes.txt").write_text("no image")
    common = ("--classes", tmp_path / "in", "--output", tmp_path / "out")
    run(*common)
    found = samples(tmp_path / "out")
    assert [(m["cls"], m["txt"]) for m in found] == [(b"0", b"ant")] * 3 + [(b"1", b"sea lion")] * 2
    names = (tmp_path / "out" / "classnames.txt").read_text().splitlines()
    assert names == ["ant", "sea lion", "zebra"]

    from_shards = open_labelled(str(tmp_path / "out")).dataset
    from_folders = open_labelled(str(tmp_path / "in")).dataset
    assert [(i.data, i.classes) for i in from_shards.read(0, 1)] == [
        (i.data, i.classes) for i in from_folders.read(0, 1)
    ]

    (tmp_path / "names.txt").write_text("Ant\nSea lion\n")
    line = refused(capsys, *common, "--classnames", tmp_path / "names.txt")
    assert "2 names" in line
    assert "3 class folders" in line


def test_a_class_without_an_image_keeps_its_place_and_is_named(tmp_path, capsys):
    for name in ("boat", "dog"):
        make_images(tmp_path / "in" / name, 2)
    (tmp_path / "in" / "cat").mkdir()
    assert run("--classes", tmp_path / "in", "--output", tmp_path / "out") == 0
    assert "no image of 1 of 3 classes: cat" in capsys.readouterr().out
    assert (tmp_path / "out/classnames.txt").read_text() == "boat\ncat\ndog\n"
    assert [int(sample["cls"]) for sample in samples(tmp_path / "out")] == [0, 0, 2, 2]


def test_bad_rows_are_skipped_counted_and_named(tmp_path, capsys):
    folder = tmp_path / "images"
    good = make_images(folder, 2)
    (folder / "page.jpg").write_bytes(HTML)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(encode(photo(0, 300, 300), "JPEG")[:2000])
    (folder / "huge.png").write_bytes(png_of_size(30_000, 30_000))
    (folder / "misnamed.gif").write_bytes(encode(photo(1, 20, 20), "JPEG"))
    (folder / "mute.png").write_bytes(encode(photo(1, 20, 20)))
    names = [good[0], "page.jpg", "empty.jpg", "cut.jpg", "huge.png", "nowhere.jpg",
             "misnamed.gif", "", "mute.png", good[1]]  # fmt: skip
    lines = [
        ["path", "caption"],
        *([name, " " if name == "mute.png" else "text"] for name in names),
    ]
    run("--table", table(tmp_path / "t.csv", lines), "--images", folder, "--output",
        tmp_path / "out")  # fmt: skip
    assert [f["file_name"] for f in fields(tmp_path / "out")] == [good[0], "misnamed.gif", good[1]]
    # The extension tells what a file is, whatever its name says.
    assert "jpg" in samples(tmp_path / "out")[1]
    (record,) = records(tmp_path / "out")
    assert record["skipped"] == {
        "missing_image": 1, "no_caption": 1, "no_path": 1, "too_large": 1, "unreadable_image": 3
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "3 samples in 1 shard" in printed
    assert "skipped 7 of 10 images" in printed
    assert "page.jpg: unreadable_image" in printed


def test_shards_that_would_be_empty_are_left_out(tmp_path):
    names = make_images(tmp_path / "images", 2)
    captions = coco(tmp_path, [names[0], "gone1.jpg", "gone2.jpg", names[1]])
    words = ("--coco", captions, "--images", tmp_path / "images", "--output", tmp_path / "out",
             "--samples-per-shard", 1)  # fmt: skip
    run(*words)
    before = content(tmp_path / "out")
    assert list(before) == ["00000.tar", "00003.tar", "manifest.jsonl"]
    run(*words)
    assert content(tmp_path / "out") == before
    assert run("--verify", tmp_path / "out") == 0


def test_same_name_in_two_folders(tmp_path):
    for folder in ("a", "b"):
        make_images(tmp_path / "images" / folder, 1)
    captions = coco(tmp_path, ["a/000.jpg", "b/000.jpg"])
    run("--coco", captions, "--images", tmp_path / "images", "--output", tmp_path / "out")
    assert [f["file_name"] for f in fields(tmp_path / "out")] == ["a/000.jpg", "b/000.jpg"]


# A user's mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,text\na.jpg,b\n", "no column 'caption' in"),
        ("", "is empty"),
        ("path,caption\n", "has no row"),
        ("path,caption\na.jpg,one, two\n", "line 2 has 3 fields, its header 2"),
        ('path,caption\na.jpg,"open\n', "check its quotes"),
        ("path,caption\na.jpg,caf\udce9\n", "is not UTF-8"),
        ("path,caption\na.jpg,b\n", "none of the first 1 images exists"),
    ],
)
def test_unusable_tables(tmp_path, capsys, text, message):
    (tmp_path / "t.csv").write_text(text, errors="surrogateescape")
    line = refused(capsys, "--table", tmp_path / "t.csv", "--output", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table", "t.txt"], "ends in .csv, .tsv, .jsonl or .parquet"),
        (["--table", "none.csv"], "No such file"),
        (["--coco", "none.json", "--images", "."], "cannot read none.json"),
        (["--coco", "none.json"], "--images is missing"),
        (["--classes", "none"], "no folder at none"),
        (["--classes", ".", "--split", "train"], "--split goes with --coco, not with --classes"),
        (
            ["--classes", ".", "--samples-per-shard", "0"],
            "--samples-per-shard: expected a number from 1",
        ),
    ],
)
def test_mistakes_give_one_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words, "--output", "out")


@pytest.mark.parametrize("text", ["[1", "[]", '"text"', "{}", '{"images": [{"id": 1}]}', "7"])
def test_other_json_is_refused(tmp_path, capsys, text):
    (tmp_path / "captions.json").write_text(text)
    line = refused(capsys, "--coco", tmp_path / "captions.json", "--images", tmp_path, "--output",
                   tmp_path / "out")  # fmt: skip
    assert "captions.json" in line


def test_no_usable_image_is_an_error(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(HTML)
    path = table(tmp_path / "t.csv", [["path", "caption"], ["a.jpg", "text"]])
    for _ in range(2):
        line = refused(capsys, "--table", path, "--output", tmp_path / "out")
        assert "no usable image among 1, the first: a.jpg: unreadable_image" in line


def test_captions_with_half_a_character_are_skipped(tmp_path):
    names = make_images(tmp_path / "images", 2)
    captions = coco(tmp_path, names, captions=1)
    captions.write_text(captions.read_text().replace("0 of 000", "\\ud800"))
    run("--coco", captions, "--images", tmp_path / "images", "--output", tmp_path / "out")
    assert records(tmp_path / "out")[0]["skipped"] == {"bad_caption": 1}


def test_shards_are_plain_tars_without_times_or_owners(tmp_path):
    import tarfile

    captions = coco(tmp_path, make_images(tmp_path / "images", 1))
    run("--coco", captions, "--images", tmp_path / "images", "--output", tmp_path / "out")
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "out" / "00000.tar").read_bytes())) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
