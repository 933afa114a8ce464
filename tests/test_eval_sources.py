"""Evaluation data: class folders, shards, COCO's and Karpathy's files, and what is wrong there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from shard_factory import encode, ids_of, make_shards, photo, sample, write_shard

from eval.sources import open_captioned, open_labelled
from navit_clip.data.decode import SkipSampleError
from navit_clip.errors import UserError


def read(source):
    return list(source.read(0, 1))


def in_parts(source, parts):
    """All parts' items in the order of their keys."""
    items = [item for part in range(parts) for item in source.read(part, parts)]
    return sorted(items, key=lambda item: item.key)


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(photo(seed, 16, 16)))
    return path


def described(root, content, split=None, images="images"):
    """Opens a JSON of captions."""
    (root / "captions.json").write_text(json.dumps(content))
    return open_captioned(None, str(root / images), str(root / "captions.json"), ["txt"], split)


# Labelled


def test_class_folders(tmp_path):
    files = [image(tmp_path / name, i) for i, name in enumerate(("b/1.png", "a/2.JPG", "a/1.webp"))]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no class")
    source, names = open_labelled(str(tmp_path))
    assert names == ["a", "b", "empty"]  # an empty class still has its name and index
    items = read(source)
    assert [(item.name, item.label) for item in items] == [
        (str(files[2]), 0),
        (str(files[1]), 0),
        (str(files[0]), 1),
    ]
    assert items[0].data == files[2].read_bytes()


def test_labelled_shards(tmp_path):
    shard = write_shard(
        tmp_path / "0.tar",
        {
            "a": {**sample(0), "cls": b"3"},
            "b": {**sample(1), "cls": b" 0\n"},
            "c": {**sample(2), "cls": b"dog"},
            "d": {"cls": b"1"},
        },
    )
    for path in (shard, tmp_path):
        source, names = open_labelled(str(path))
        assert names is None
        items = read(source)
        assert [(item.name, item.label) for item in items[:2]] == [("0/a", 3), ("0/b", 0)]
        assert [item.data.reason for item in items[2:]] == ["bad_label", "no_image"]


def test_shards_without_labels_are_refused(tmp_path):
    (shard,) = make_shards(tmp_path, [1])
    source, _ = open_labelled(str(shard))
    with pytest.raises(UserError, match=r"00000/0 has no \.cls member"):
        read(source)


@pytest.mark.parametrize("content", ["nothing", "class folders without images", "no such path"])
def test_nothing_to_classify(content, tmp_path):
    root = tmp_path / "data"
    if content != "no such path":
        (root / "a").mkdir(parents=True)
    if content == "class folders without images":
        (root / "a" / "x.txt").write_text("")
    with pytest.raises(UserError, match=str(root)):
        open_labelled(str(root))


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
    assert items[0].captions == (sample(0)["txt"].decode(), "one", "two")
    assert [item.data.reason for item in items[1:]] == ["no_caption", "bad_caption"]


def test_a_truncated_shard_stops_an_evaluation(tmp_path):
    (shard,) = make_shards(tmp_path, [3])
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"00000\.tar.*fetch the shard again"):
        read(open_captioned(str(shard), None, None, ["txt"], None))


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
    items = read(described(tmp_path, content))
    # Every caption is a query, a repeated one as well; an image without captions is none.
    assert {Path(item.name).name: item.captions for item in items} == {
        "a.png": ("first", "third", "first"),
        "b.png": ("second",),
    }
    assert all(isinstance(item.data, bytes) and item.label == -1 for item in items)


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
    [(None, ["val/a.png", "val/e.png"]), ("val", ["val/b.png"]), ("train", ["train/c.png"])],
)
def test_karpathy_splits(split, names, tmp_path):
    for folder, name in (("val", "a"), ("val", "b"), ("train", "c"), ("val", "e")):
        image(tmp_path / "images" / folder / f"{name}.png")
    items = read(described(tmp_path, SPLITS, split))
    assert [item.name for item in items] == [str(tmp_path / "images" / name) for name in names]
    assert all(isinstance(item.data, bytes) for item in items)
    if split is None:
        assert items[0].captions == ("a1", "a2")


def test_a_karpathy_file_without_splits_is_read_whole(tmp_path):
    content = {"images": [{"filename": "a.png", "sentences": [{"raw": "a"}]}]}
    image(tmp_path / "images" / "a.png")
    assert [item.captions for item in read(described(tmp_path, content))] == [("a",)]


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="no split 'dev': the file has test, train, val"):
        described(tmp_path, SPLITS, "dev")


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


# Parts


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 20])
def test_parts_together_are_the_whole(parts, tmp_path):
    counts = [5, 1, 3]
    make_shards(tmp_path / "shards", counts)
    shards = open_captioned(str(tmp_path / "shards"), None, None, ["txt"], None)
    assert [item.name for item in in_parts(shards, parts)] == ids_of(counts)
    assert in_parts(shards, parts) == read(shards)
    for i in range(7):
        image(tmp_path / "classes" / "abc"[i % 3] / f"{i}.png", i)
    folders, _ = open_labelled(str(tmp_path / "classes"))
    assert in_parts(folders, parts) == read(folders)
    assert Counter(item.label for item in read(folders)) == {0: 3, 1: 2, 2: 2}
