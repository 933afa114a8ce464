"""Captioned data: shards, COCO's and Karpathy's files, tables, and what is wrong there."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path

import pytest
from shard_factory import ids_of, make_shards, sample, write_shard
from source_cases import image, in_parts, read, write

from navit_clip.data import shards
from navit_clip.errors import OutageError, SkipSampleError, UserError
from navit_clip.evaluation import datasets
from navit_clip.evaluation.captioned import open_captioned
from navit_clip.retries import GaveUpError, RemoteError


def described(root, content, split=None, images="images"):
    """Opens a JSON of captions."""
    (root / "captions.json").write_text(json.dumps(content))
    return open_captioned(None, str(root / images), str(root / "captions.json"), ["txt"], split)


# Captioned shards


def test_captioned_shards(tmp_path):
    fields = json.dumps({"captions": ["one", "two", "one"]}).encode()
    shard = write_shard(
        tmp_path / "0.tar",
        {
            "a": {**sample(0), "json": fields},
            "b": {"png": sample(1)["png"], "json": b"{}"},
            "c": {"png": sample(1)["png"], "txt": b"\xff"},
        },
    )
    items = read(open_captioned(str(shard), None, None, ["txt", "json.captions"], None))
    # As in a JSON of captions, a repeated one is two queries; one in two fields is one.
    assert items[0].captions == (sample(0)["txt"].decode(), "one", "two", "one")
    fields = ["json.captions", "json.first", "json.captions"]
    content = json.dumps({"captions": ["one", "two", "one"], "first": "one"}).encode()
    shard = write_shard(tmp_path / "1.tar", {"a": {**sample(0), "json": content}})
    (item,) = read(open_captioned(str(shard), None, None, fields, None))
    assert item.captions == ("one", "two", "one")
    assert [item.data.reason for item in items[1:]] == ["no_caption", "bad_caption"]


def test_a_truncated_shard_stops_an_evaluation(tmp_path):
    (shard,) = make_shards(tmp_path, [3])
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"00000\.tar.*fetch the shard again"):
        read(open_captioned(str(shard), None, None, ["txt"], None))


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (GaveUpError("Service Unavailable, after 10 attempts"), True),
        (RemoteError("Access Denied"), False),
    ],
)
def test_an_outage_may_be_over_when_the_ranks_start_again(error, outage, tmp_path, monkeypatch):
    (shard,) = make_shards(tmp_path, [3])
    dataset = open_captioned(str(shard), None, None, ["txt"], None)

    def fail(path):
        raise error

    monkeypatch.setattr(shards, "_open", fail)
    with pytest.raises(UserError, match=r"00000\.tar.*fetch the shard again") as caught:
        read(dataset)
    assert isinstance(caught.value, OutageError) == outage


# COCO


def coco(*images, annotations):
    return {
        "images": [{"id": i, "file_name": name} for i, name in images],
        "annotations": [{"image_id": i, "caption": caption} for i, caption in annotations],
    }


def test_coco_captions(tmp_path):
    for name in ("b.png", "a.png"):
        image(tmp_path / "images" / name)
    content = coco(
        (7, "b.png"),
        (3, "a.png"),
        (5, "silent.png"),
        annotations=[(3, "first "), (7, "second"), (3, "third"), (3, "first")],
    )
    dataset = described(tmp_path, content)
    items = read(dataset)
    # Every caption is a query, a repeated one as well.
    assert {Path(item.name).name: item.captions for item in items} == {
        "a.png": ("first", "third", "first"),
        "b.png": ("second",),
        "silent.png": (),
    }
    assert all(isinstance(item.data, bytes) and item.classes == () for item in items[:2])
    assert items[2].data.reason == "no_caption"
    assert (dataset.count, dataset.skipped) == (3, Counter())


def test_captions_that_say_nothing_are_counted(tmp_path):
    image(tmp_path / "images" / "a.png")
    content = coco(
        (0, "a.png"), (1, "b.png"), annotations=[(0, " "), (0, "x"), (0, "\ud800"), (1, "")]
    )
    dataset = described(tmp_path, content)
    assert [item.captions for item in read(dataset)] == [("x",), ()]
    assert dataset.skipped == {"empty_caption": 2, "bad_caption": 1}


def test_an_image_listed_twice_is_one_with_all_its_captions(tmp_path):
    image(tmp_path / "images" / "a.png")
    content = coco((0, "a.png"), (1, "./a.png"), annotations=[(1, "one"), (0, "two")])
    assert [item.captions for item in read(described(tmp_path, content))] == [("two", "one")]
    content = karpathy(
        ("", "a.png", "test", ["one"]),
        ("", "b.png", "test", []),
        ("", "a.png", "test", ["two"]),
        ("", "a.png", "val", ["three"]),
    )
    items = read(described(tmp_path, content))
    assert [item.captions for item in items] == [("one", "two"), ()]


def test_a_missing_image_is_an_item_with_a_reason(tmp_path):
    image(tmp_path / "images" / "a.png")
    content = coco((0, "a.png"), (1, "gone.png"), annotations=[(0, "here"), (1, "gone")])
    items = read(described(tmp_path, content))
    assert isinstance(items[1].data, SkipSampleError)
    assert items[1].data.reason == "missing_image"


def test_a_caption_for_an_unknown_image_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    content = coco((0, "a.png"), annotations=[(0, "here"), (9, "whose?")])
    with pytest.raises(UserError, match="a caption names image 9, which is not listed"):
        described(tmp_path, content)


# Karpathy


def karpathy(*images):
    return {
        "dataset": "coco",
        "images": [
            {
                "filepath": folder,
                "filename": name,
                "split": split,
                "sentences": [{"raw": caption} for caption in captions],
            }
            for folder, name, split, captions in images
        ],
    }


SPLITS = karpathy(
    ("val", "a.png", "test", ["a1 ", "a2"]),
    ("val", "b.png", "val", ["b1"]),
    ("train", "c.png", "train", ["c1"]),
    ("val", "d.png", "test", []),
    ("val", "e.png", "test", ["e1"]),
)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (None, ["val/a.png", "val/d.png", "val/e.png"]),
        ("val", ["val/b.png"]),
        ("train", ["train/c.png"]),
    ],
)
def test_karpathy_splits(split, names, tmp_path):
    for folder, name in (("val", "a"), ("val", "b"), ("train", "c"), ("val", "e")):
        image(tmp_path / "images" / folder / f"{name}.png")
    items = read(described(tmp_path, SPLITS, split))
    assert [item.name for item in items] == [str(tmp_path / "images" / name) for name in names]
    assert all(isinstance(item.data, bytes) for item in items if item.captions)
    if split is None:
        assert items[0].captions == ("a1", "a2")
        assert items[1].data.reason == "no_caption"


def test_a_karpathy_file_without_splits_is_read_whole(tmp_path):
    content = {"images": [{"filename": "a.png", "sentences": [{"raw": "a"}]}]}
    image(tmp_path / "images" / "a.png")
    assert [item.captions for item in read(described(tmp_path, content))] == [("a",)]


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path):
    image(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r"no split 'dev' in .*: the file has test, train, val"):
        described(tmp_path, SPLITS, "dev")
    with pytest.raises(UserError, match=r"no split 'dev' in .*: leave --split out"):
        described(tmp_path, coco((0, "a.png"), annotations=[(0, "x")]), "dev")


# Tables


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("t.csv", 'path,caption\na.png,"one, two"\nb.png,three\n./a.png,four\n', {}),
        ("t.tsv", "n\ttext\na.png\tone, two\nb.png\tthree\na.png\tfour\n", ("n", ["text"])),
        ("t.csv", 'a,b,n\n"one, two",four,a.png\nthree,,b.png\n', ("n", ["a", "b"])),
        (
            "t.jsonl",
            '{"n": "a.png", "text": ["one, two", "four"]}\n{"n": "b.png", "text": "three"}\n',
            ("n", ["text"]),
        ),
    ],
)
def test_tables_of_captions(name, content, columns, tmp_path):
    for file in ("a.png", "b.png"):
        image(tmp_path / file)
    table = write(tmp_path / name, content)
    for images in (None, str(tmp_path)):  # a table's own folder if none is named
        dataset = open_captioned(None, images, table, [], None, *columns)
        assert [(item.name, item.captions) for item in read(dataset)] == [
            (str(tmp_path / "a.png"), ("one, two", "four")),
            (str(tmp_path / "b.png"), ("three",)),
        ]
    as_shards = read(open_captioned(table, None, None, ["all"], None, *columns))
    assert {item.captions for item in as_shards} == {("one, two", "four"), ("three",)}


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        ("", None, "t.csv is empty"),
        ("path,caption\n", None, "t.csv has no row"),
        ("image,caption\na.png,x\n", None, "no column 'path' in .*'image', 'caption'"),
        ("path,caption\na.png,\n", None, "no captioned image in"),
        ("path,caption\na.png,x\n", "test", "has no splits: leave --split out"),
        ("path,caption\nb.png,x\nc.png,y\n", None, "none of the 2 images that .* names is in"),
    ],
)
def test_unusable_tables_are_named(content, split, message, tmp_path):
    image(tmp_path / "a.png")
    table = write(tmp_path / "t.csv", content)
    with pytest.raises(UserError, match=message):
        open_captioned(None, str(tmp_path), table, [], split)


# Wrong files


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        None,
        "captions",
        {"images": [{"id": 1}], "annotations": []},
        {"images": ["a.png"], "annotations": []},
        coco((0, "a.png"), annotations=[(0, None)]),
        {"images": ["a.png"]},
        {"images": [{"filename": "a.png"}]},
        coco((0, "a.png"), annotations=[]),
        karpathy(("", "a.png", "test", [])),
    ],
)
def test_other_json_is_refused_by_name(content, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"captions\.json"):
        described(tmp_path, content)


def test_missing_files_are_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for images, captions, message in (
        (tmp_path / "nowhere", tmp_path / "bad.json", "nowhere"),
        (tmp_path, tmp_path / "no.json", r"cannot read .*no\.json"),
        (tmp_path, tmp_path / "bad.json", r"cannot read .*bad\.json"),
    ):
        with pytest.raises(UserError, match=message):
            open_captioned(None, str(images), str(captions), ["txt"], None)
    for images, captions in ((None, None), (str(tmp_path), None), (None, "x.json")):
        with pytest.raises(UserError, match="--data SHARDS, or both --images"):
            open_captioned(None, images, captions, ["txt"], None)
    with pytest.raises(UserError, match="not both"):
        open_captioned("x.tar", None, "x.json", ["txt"], None)
    with pytest.raises(UserError, match="--split goes with a Karpathy file"):
        open_captioned("x.tar", None, None, ["txt"], "test")
    for content in ("", " \n"):
        (tmp_path / "empty.json").write_text(content)
        with pytest.raises(UserError, match=r"empty\.json is empty"):
            open_captioned(None, str(tmp_path), str(tmp_path / "empty.json"), ["txt"], None)
    described_elsewhere = coco((0, "a.png"), annotations=[(0, "x")])
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"none of the 1 images that .* names is in"):
        described(tmp_path, described_elsewhere)


# Parts


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("block", [1, 2, 64])
def test_parts_together_are_the_whole(parts, block, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "BLOCK", block)
    counts = [5, 1, 3]
    make_shards(tmp_path / "shards", counts)
    shards = open_captioned(str(tmp_path / "shards"), None, None, ["txt"], None)
    assert [item.name for item in in_parts(shards, parts)] == ids_of(counts)
    assert in_parts(shards, parts) == read(shards)
