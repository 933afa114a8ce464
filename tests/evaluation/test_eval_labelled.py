"""Labelled data: class folders, label files, class maps, shards, and what is wrong there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from shard_factory import sample, write_shard
from source_cases import image, in_parts, read, write

from navit_clip.data.annotations.labels import load_class_map
from navit_clip.errors import UserError
from navit_clip.evaluation import datasets
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.evaluation.zeroshot import ZeroShot, ZeroShotSpec, load_classnames

IMAGENET = Path(__file__).resolve().parents[3] / "shared/data/imagenet-sample/val"

# Class folders


def test_class_folders(tmp_path):
    files = [image(tmp_path / name, i) for i, name in enumerate(("b/1.png", "a/2.JPG", "a/1.webp"))]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no class")
    labelled = open_labelled(str(tmp_path))
    assert labelled.folders == ["a", "b", "empty"]  # an empty class still has its name and index
    items = read(labelled.dataset)
    assert [(item.name, item.classes) for item in items] == [
        (str(files[2]), (0,)),
        (str(files[1]), (0,)),
        (str(files[0]), (1,)),
    ]
    assert items[0].data == files[2].read_bytes()
    assert labelled.dataset.count == 3
    assert labelled.present([]) == [0, 1]


def test_labelled_shards(tmp_path):
    shard = write_shard(
        tmp_path / "0.tar",
        {
            "a": {**sample(0), "cls": b"3"},
            "b": {**sample(1), "cls": b" 0\n"},
            "c": {**sample(2), "cls": b"dog"},
            "d": {"cls": b"1"},
            "e": {**sample(2), "cls": b"-1"},
        },
    )
    for path in (shard, tmp_path):
        labelled = open_labelled(str(path))
        assert labelled.folders is None
        assert labelled.dataset.count is None
        assert labelled.present([(3,), (0,), (3,)]) == [0, 3]
        items = read(labelled.dataset)
        assert [(item.name, item.classes) for item in items[:2]] == [("0/a", (3,)), ("0/b", (0,))]
        assert [item.data.reason for item in items[2:]] == ["bad_label", "no_image", "bad_label"]


def test_samples_without_a_label_are_counted(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a": {**sample(0), "cls": b"3"}, "b": sample(1)})
    items = read(open_labelled(str(shard)).dataset)
    assert items[0].classes == (3,)
    assert items[1].data.reason == "no_label"
    assert "members: png, txt" in items[1].data.detail
    shard = write_shard(tmp_path / "1.tar", {"b": sample(1)})
    names = write(tmp_path / "names.txt", "a\nb\n")
    evaluator = ZeroShot(ZeroShotSpec(str(shard), classnames=names, templates="plain"))
    with pytest.raises(UserError, match=r"no image can be read: no_label: no \.cls member"):
        evaluator.check(SimpleNamespace(reads_texts=True))


@pytest.mark.parametrize("content", ["nothing", "class folders without images", "no such path"])
def test_nothing_to_classify(content, tmp_path):
    root = tmp_path / "data"
    if content != "no such path":
        (root / "a").mkdir(parents=True)
    if content == "class folders without images":
        (root / "a" / "x.txt").write_text("")
    with pytest.raises(UserError, match=str(root)):
        open_labelled(str(root))
    with pytest.raises(UserError, match=str(root)):
        open_labelled(str(root), class_map="imagenet")


def test_a_flat_folder_asks_for_labels(tmp_path):
    image(tmp_path / "a.png")
    with pytest.raises(UserError, match="no class folders: give --labels FILE"):
        open_labelled(str(tmp_path))


# Class maps


SYNSETS = ["n01440764", "n01443537", "n02106662"]  # by index


@pytest.mark.parametrize(
    "content",
    [
        {"n01440764": 0, "n01443537": [1], "n02106662": 2},
        {"0": ["n01440764", "tench"], "2": ["n02106662", "shepherd"], "1": ["n01443537", "fish"]},
        SYNSETS,
        "n01440764 tench, Tinca tinca\nn01443537 goldfish 2\nn02106662\n\n",
        "n02106662 2\nn01440764 0\nn01443537 1\n",
        "n02106662,2\nn01440764,0\nn01443537,1\n",
    ],
)
def test_every_form_of_a_class_map_says_the_same(content, tmp_path):
    class_map = load_class_map(write(tmp_path / "map", content))
    assert [class_map.find(name) for name in SYNSETS] == [(0,), (1,), (2,)]
    assert class_map.find("n09999999") is None
    # A number that no name is means the class itself.
    assert class_map.find("2") == (2,)
    assert class_map.find("3") is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"chair": [423, 559, 423], "mug": 504, "out": []}, {"chair": (423, 559), "out": ()}),
        ("bath towel 434\nmug\t504, 505\nchair,423;559", {"bath towel": (434,), "mug": (504, 505)}),
        ("7 1\n8 2", {"7": (1,), "8": (2,), "1": None}),
    ],
)
def test_several_classes_may_be_right(content, expected, tmp_path):
    class_map = load_class_map(write(tmp_path / "map", content))
    assert {name: class_map.find(name) for name in expected} == expected


def test_the_map_of_imagenet():
    class_map = load_class_map("imagenet")
    assert [class_map.find(name) for name in ("n01440764", "n15075141", "0", "999")] == [
        (0,),
        (999,),
        (0,),
        (999,),
    ]
    assert [class_map.find(name) for name in ("1000", "tench", "n00000000", "-1", "²")] == [
        None
    ] * 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read class map"),
        ("", "is empty"),
        ("{}", "is empty"),
        ("{", "not JSON"),
        ({"a": -1}, "'a' is neither"),
        ({"a": "dog"}, "'a' is neither"),
        ({"a": {"b": 1}}, "'a' is neither"),
        ({"a": True}, "'a' is neither"),
        ("3", "line 1 is '3'"),
        ([1, 2], "it is neither"),
        (["a", "b", "a"], "lists 'a' twice"),
        ("a 1\nb\n", "line 2 is 'b'"),
    ],
)
def test_unusable_class_maps_are_named(content, message, tmp_path):
    path = str(tmp_path / "map") if content is None else write(tmp_path / "map", content)
    with pytest.raises(UserError, match=f"class map .*map.*{message}|{message}.*map"):
        load_class_map(path)


def test_class_folders_through_a_map(tmp_path):
    for i, name in enumerate(("chair", "mug", "mug", "out", "towel")):
        image(tmp_path / "data" / name / f"{i}.png", i)
    (tmp_path / "data" / "cache").mkdir()  # unknown, but without an image
    content = {"mug": 2, "chair": [1, 7], "towel": 2, "out": [], "absent": 5}
    labelled = open_labelled(str(tmp_path / "data"), class_map=write(tmp_path / "map", content))
    items = read(labelled.dataset)
    assert [(Path(item.name).parent.name, item.classes) for item in items] == [
        ("chair", (1, 7)),
        ("mug", (2,)),
        ("mug", (2,)),
        ("towel", (2,)),
    ]
    assert labelled.folders is None
    assert labelled.present([(2,)]) == [1, 2, 7]
    labelled.check_names(["name"] * 8)
    with pytest.raises(UserError, match="label 7 has no name: there are 7 class names"):
        labelled.check_names(["name"] * 7)
    content = write(tmp_path / "map", {"mug": 2, "towel": 2, "out": []})
    with pytest.raises(UserError, match=r"class folder 'chair' is not in class map .*map"):
        open_labelled(str(tmp_path / "data"), class_map=content)
    content = write(tmp_path / "map", {key: [] for key in ("mug", "chair", "towel", "out")})
    with pytest.raises(UserError, match="leaves out every class folder"):
        open_labelled(str(tmp_path / "data"), class_map=content)


def test_sets_of_right_classes_may_overlap(tmp_path):
    for i, name in enumerate("abc"):
        image(tmp_path / "data" / name / "x.png", i)
    content = write(tmp_path / "map", {"a": 1, "b": 2, "c": [2, 1]})
    items = read(open_labelled(str(tmp_path / "data"), class_map=content).dataset)
    assert [item.classes for item in items] == [(1,), (2,), (1, 2)]


def test_folders_that_are_numbers_are_class_indices_of_imagenet(tmp_path):
    for i in (10, 2, 999):
        image(tmp_path / str(i) / "x.png", i)
    for class_map in ("imagenet", "index"):
        items = read(open_labelled(str(tmp_path), class_map=class_map).dataset)
        assert {Path(item.name).parent.name: item.classes for item in items} == {
            "10": (10,),
            "2": (2,),
            "999": (999,),
        }


@pytest.mark.skipif(not IMAGENET.is_dir(), reason=f"no real photos at {IMAGENET}")
def test_a_hundred_folders_of_imagenet_are_named_among_its_thousand_classes():
    labelled = open_labelled(str(IMAGENET), class_map="imagenet")
    names = load_classnames("imagenet", labelled.folders)
    labelled.check_names(names)
    assert len(labelled.present([])) == labelled.dataset.count == 100
    found = {Path(item.name).parent.name: names[item.classes[0]] for item in read(labelled.dataset)}
    assert found["n01440764"] == "tench"
    assert found["n01601694"] == "American dipper"
    with pytest.raises(UserError, match=r"1000 class names for 100 class folders.*--class-map"):
        load_classnames("imagenet", open_labelled(str(IMAGENET)).folders)


def test_labelled_shards_through_a_map(tmp_path):
    labels = (b"chair", b"mug\n", b"out", b"4", b"\xff", b"dog")
    members = {str(i): {**sample(i), "cls": label} for i, label in enumerate(labels)}
    shard = write_shard(tmp_path / "0.tar", members)
    content = write(tmp_path / "map", {"chair": [1, 7], "mug": 2, "out": []})
    labelled = open_labelled(str(shard), class_map=content)
    items = read(labelled.dataset)
    assert [item.classes for item in items] == [(1, 7), (2,), (), (4,), (), ()]
    assert [item.data.reason for item in items if not item.classes] == [
        "class_left_out",
        "bad_label",
        "bad_label",
    ]
    assert labelled.present([(1, 7), (4,)]) == [1, 4, 7]


# Label files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "b c.png dog\n\na.png\tred cat\nd.jpg,dog\n"),
        ("labels.txt", "b c.png  dog\r\na.png red cat\r\nd.jpg dog"),
        ("labels.csv", 'image,label\n"b c.png",dog\na.png,red cat,more\nd.jpg,dog\n'),
        ("labels.csv", "b c,dog\na,red cat\nd,dog\n"),
        ("labels.tsv", "file\tclass\nb c\tdog\na.png\tred cat\nd.jpg\tdog\nd.jpg\tdog\n"),
    ],
)
def test_a_flat_folder_with_a_label_file(name, content, tmp_path):
    files = [image(tmp_path / "data" / f, i) for i, f in enumerate(("b c.png", "a.png", "d.jpg"))]
    image(tmp_path / "data" / "unlisted.png")
    labelled = open_labelled(str(tmp_path / "data"), labels=write(tmp_path / name, content))
    assert labelled.folders == ["dog", "red cat"]
    items = read(labelled.dataset)
    assert [(item.name, item.classes) for item in items] == [
        (str(files[0]), (0,)),
        (str(files[1]), (1,)),
        (str(files[2]), (0,)),
    ]
    assert all(isinstance(item.data, bytes) for item in items)


@pytest.mark.parametrize(
    ("content", "class_map"),
    [
        ("x.png 65\ny.png 0\ngone.png 3\n", None),
        ("x.png 65\ny.png n01440764\ngone.png 3\n", "imagenet"),
        ("x.png s 1\ny.png 0\ngone.png 3\n", {"s 1": 65}),
    ],
)
def test_labels_may_be_indices(content, class_map, tmp_path):
    for name in ("x.png", "y.png"):
        image(tmp_path / "data" / name)
    if isinstance(class_map, dict):
        class_map = write(tmp_path / "map", class_map)
    file = write(tmp_path / "labels", content)
    labelled = open_labelled(str(tmp_path / "data"), labels=file, class_map=class_map)
    assert labelled.folders is None
    items = read(labelled.dataset)
    assert [item.classes for item in items] == [(65,), (0,), (3,)]
    assert [item.data.reason for item in items[2:]] == ["missing_image"]


def test_the_label_file_of_imagenets_localisation_challenge(tmp_path):
    image(tmp_path / "data" / "ILSVRC2012_val_00048981.JPEG")
    content = "ImageId,PredictionString\nILSVRC2012_val_00048981,n03995372 85 1 499 272 1 2 3 4 \n"
    file = write(tmp_path / "LOC_val_solution.csv", content)
    labelled = open_labelled(str(tmp_path / "data"), labels=file, class_map="imagenet")
    assert [(item.classes, type(item.data)) for item in read(labelled.dataset)] == [((740,), bytes)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read labels"),
        ("\n \n", "labels .* is empty"),
        ("a.png\n", "line 1 is 'a.png'"),
        ("a.png cat\na.png dog\n", "line 2 labels a.png 'dog', after 'cat'"),
        ("x.png cat\n", "no image that .* names is in"),
        ("a.png n00000000\nx.png y\n", "1 more is not in class map imagenet: give a file"),
    ],
)
def test_unusable_label_files_are_named(content, message, tmp_path):
    image(tmp_path / "data" / "a.png")
    file = str(tmp_path / "labels") if content is None else write(tmp_path / "labels", content)
    class_map = "imagenet" if content and "n00000000" in content else None
    with pytest.raises(UserError, match=message):
        open_labelled(str(tmp_path / "data"), labels=file, class_map=class_map)


def test_labels_need_a_folder(tmp_path):
    with pytest.raises(UserError, match="--labels goes with a folder"):
        open_labelled(str(tmp_path / "0.tar"), labels="labels.txt")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(UserError, match="a table of labels goes with the folder of its images"):
            open_labelled(str(tmp_path / name))


# Parts


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("block", [1, 2, 64])
def test_parts_together_are_the_whole(parts, block, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "BLOCK", block)
    for i in range(7):
        image(tmp_path / "classes" / "abc"[i % 3] / f"{i}.png", i)
    folders = open_labelled(str(tmp_path / "classes")).dataset
    assert in_parts(folders, parts) == read(folders)
    assert Counter(item.classes for item in read(folders)) == {(0,): 3, (1,): 2, (2,): 2}
