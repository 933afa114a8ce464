"""Which name belongs to which class: proved by what the files say, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_factory import sample, write_shard
from source_cases import image, read, write

from navit_clip.data.annotations.class_names import index_of, read_class_names
from navit_clip.data.annotations.labels import load_class_map
from navit_clip.errors import UserError
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.evaluation.zeroshot import ZeroShot, ZeroShotSpec, load_classnames


def test_a_number_written_by_pandas_is_a_class_index(tmp_path):
    for i in range(12):
        image(tmp_path / "flat" / f"{i}.png", i)
    labels = write(
        tmp_path / "l.csv", "file,label\n" + "".join(f"{i}.png,{i}.0\n" for i in range(12))
    )
    labelled = open_labelled(str(tmp_path / "flat"), labels=labels)
    assert labelled.folders is None
    for item in read(labelled.dataset):
        assert item.classes == (int(Path(item.name).stem),)
    shard = write_shard(tmp_path / "0.tar", {"a": {**sample(0), "cls": b"10.0\n"}})
    assert read(open_labelled(str(shard)).dataset)[0].classes == (10,)


@pytest.mark.parametrize(
    ("text", "index"),
    [("3", 3), ("3.0", 3), ("007", 7), ("3.", 3), ("-1", None), ("1.5", None), ("1e3", None),
     ("²", None), ("", None), ("nan", None), ("9" * 5000, None)],
)  # fmt: skip
def test_what_a_class_index_is(text, index):
    assert index_of(text) == index


def test_images_without_a_class_are_counted(tmp_path):
    for name in "abcd":
        image(tmp_path / "flat" / f"{name}.png")
    labels = write(tmp_path / "l.csv", "a.png,3.0\nb.png,\nc.png,-1\nd.png,nan\n")
    dataset = open_labelled(str(tmp_path / "flat"), labels=labels).dataset
    assert [item.classes for item in read(dataset)] == [(3,)]
    assert dataset.skipped == {"no_label": 1, "bad_label": 2}
    assert "b.png: its label is ''" in dataset.skips[0]
    for content in ("a.png,-1\nb.png,\n", "a.png,\nb.png,\n"):
        with pytest.raises(UserError, match=r"is no class index|no line has a label"):
            open_labelled(str(tmp_path / "flat"), labels=write(tmp_path / "l.csv", content))


def test_an_image_named_without_its_extension_must_be_one_file(tmp_path):
    image(tmp_path / "flat" / "a.png")
    image(tmp_path / "flat" / "a.jpg")
    labels = write(tmp_path / "l.csv", "a.png,cat\n./a.png,cat\na.jpg,dog\n")
    assert len(read(open_labelled(str(tmp_path / "flat"), labels=labels).dataset)) == 2
    with pytest.raises(UserError, match=r"'a', which is a\.jpg as well as a\.png"):
        open_labelled(str(tmp_path / "flat"), labels=write(tmp_path / "l.csv", "a,cat\n"))
    labels = write(tmp_path / "l.csv", "a.png,cat\n./a.png,dog\n")
    with pytest.raises(UserError, match=r"labels a\.png 'dog', after 'cat'"):
        open_labelled(str(tmp_path / "flat"), labels=labels)


@pytest.mark.parametrize(
    ("content", "folders", "problem"),
    [
        ("a\n\nc\n", None, "line 2 is blank"),
        ("\na\nb\n", ["x", "y"], "line 1 is blank"),
        ("a\nb\n\n \n", None, None),
        ("a\nb\n", ["x", "y"], None),
        # Numbers, capitals and signs have more than one order.
        ("a\nb\n", ["class_10", "class_2"], "'class_10' or 'class_2' is uncertain"),
        ("a\nb\n", ["Zebra", "ant"], "is uncertain"),
        ("a\nb\n", ["sea_lion", "seahorse"], "is uncertain"),
        ("Class 10\nclass-2\n", ["class_10", "class_2"], None),
        ("a\nb\n", ["n01440764", "n15075141"], None),
        # Names that are there, at another place.
        ("ant\nzebra\nsea lion\n", ["ant", "sea_lion", "zebra"], "line 2 is 'zebra', the place of"),
        # Names that carry their numbers.
        ("0: a\n1: b\n2: c\n", ["x", "y", "z"], None),
        ("1 a\n2 b\n3 c\n", ["x", "y", "z"], None),
        ("1 a\n2 b\n3 c\n", None, "its lines are numbered"),
        ("1 a\n0 b\n2 c\n", ["x", "y", "z"], "its lines are numbered"),
        # A name may hold what is elsewhere the end of a line.
        ("a\u2028b\nc\x0cd\n", ["x", "y"], None),
    ],
)
def test_names_pair_with_classes_where_their_order_is_certain(content, folders, problem, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(content, encoding="utf-8")
    if problem is None:
        assert read_class_names(str(path), folders) == content.strip().split("\n")
    else:
        with pytest.raises(UserError, match=problem):
            read_class_names(str(path), folders)


def test_the_names_of_imagenet_are_for_its_synsets_alone():
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    assert load_classnames("imagenet", sorted(synsets))[0] == "tench"
    names = sorted(f"animal {i:04}" for i in range(1000))
    with pytest.raises(UserError, match="not ImageNet's synsets in order"):
        load_classnames("imagenet", names)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("n01440764 tench\n\nn01443537 goldfish\n", "line 2 is blank"),
        ('["a", "", "b"]', "place 1 is empty"),
        ('{"a": 1, "a": 2}', "lists 'a' twice"),
        ("a 1\na 2\n", "lists 'a' twice"),
        ('{"0": ["a"], "1": ["a"]}', "lists 'a' twice"),
        ('{"a": {}}', "'a' is neither"),
    ],
)
def test_a_class_map_that_says_two_things_is_refused(content, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        load_class_map(write(tmp_path / "map", content))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("map.txt", ["{} {}"]),
        ("map.txt", ["{}, {}"]),
        ("map.txt", ["{}\t{}"]),
        ("map.csv", ["{},{}"]),
        ("map.csv", ['"{}",{}.0']),
        ("map.csv", ["folder,index", "{},{}"]),
        ("map.tsv", ["{}\t{}"]),
    ],
)
def test_class_maps_know_classes_that_end_in_numbers(name, lines, tmp_path):
    folders = ("Acura RL Sedan 2012", "Audi 100 Wagon 1994", "Boeing 747")
    text = "\n".join([*lines[:-1], *(lines[-1].format(f, i) for i, f in enumerate(folders))])
    class_map = load_class_map(write(tmp_path / name, text))
    assert [class_map.find(folder) for folder in folders] == [(0,), (1,), (2,)]


def test_a_table_of_classes_may_have_several_right_answers(tmp_path):
    class_map = load_class_map(write(tmp_path / "m.csv", 'chair,423;559\n"a, b",5,7\nmug,"5, 6"\n'))
    assert [class_map.find(f) for f in ("chair", "a, b", "mug")] == [(423, 559), (5, 7), (5, 6)]
    for row in ("chair,3\nmug,\n", "chair,3\nmug,x\n", "chair,3\n,4\n"):
        with pytest.raises(UserError, match="line 2 is"):
            load_class_map(write(tmp_path / "m.csv", row))


def test_shards_of_class_folders_bring_their_names(tmp_path):
    shard = write_shard(
        tmp_path / "0.tar", {str(i): {**sample(i), "cls": str(i).encode()} for i in range(2)}
    )
    write(tmp_path / "classnames.txt", "n01443537\nn02106662\n")
    evaluator = ZeroShot(ZeroShotSpec(str(shard), templates="plain"))
    evaluator.open()
    assert evaluator.names == ["n01443537", "n02106662"]
    evaluator = ZeroShot(ZeroShotSpec(str(shard), templates="plain", classnames="imagenet"))
    with pytest.raises(UserError, match=r"1000 class names, and classnames\.txt .* has 2"):
        evaluator.open()
    # The numbers are places in that list, not ImageNet's.
    items = read(open_labelled(str(shard), class_map="imagenet").dataset)
    assert [item.classes for item in items] == [(1,), (235,)]
    items = read(open_labelled(str(shard), class_map="index").dataset)
    assert [item.classes for item in items] == [(0,), (1,)]


def test_one_class_alone_is_refused(tmp_path):
    image(tmp_path / "one" / "cat" / "0.png")
    with pytest.raises(UserError, match="one class alone"):
        ZeroShot(ZeroShotSpec(str(tmp_path / "one"), templates="plain")).open()
    image(tmp_path / "flat" / "0.png")
    labels, names = write(tmp_path / "l.txt", "0.png 1\n"), write(tmp_path / "n.txt", "a\nb\n")
    spec = ZeroShotSpec(
        str(tmp_path / "flat"),
        labels=labels,
        classnames=names,
        templates="plain",
        only_present=True,
    )
    with pytest.raises(UserError, match="one class alone"):
        ZeroShot(spec).open()
