"""Tables and folders of image files, read as the shards that make_shards writes of them."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import islice

import pytest
from loader_cases import ONE_BY_ONE, content, naming_epochs, take
from shard_factory import CAPTIONS, HTML, encode, photo

from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.captions import find_captions
from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.data.fingerprint import difference, fingerprints
from navit_clip.data.mixture import Mixture
from navit_clip.data.patterns import expand_shards, shard_names
from navit_clip.data.shard_sizes import samples_per_epoch
from navit_clip.data.shards import read_shard
from navit_clip.data.state_json import data_from_json, data_to_json
from navit_clip.errors import UserError
from navit_clip.tools.make_shards.__main__ import main

COUNT = 17
FILES = FilesConfig(samples_per_shard=4)


def write_images(root, count=COUNT):
    """Images of changing size and kind in two folders; their names."""
    names = []
    for i in range(count):
        kind, extension = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        names.append(f"{'cat' if i % 2 else 'sea_lion'}/{i:02d}.{extension}")
        (root / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        (root / names[-1]).write_bytes(encode(photo(i, 24 + i % 5, 40 - i % 7), kind))
    return names


def write_source(kind, root):
    """A table, a JSON or a folder with what make_shards calls it."""
    names = write_images(root / "images")
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(len(names))]
    pairs = [*zip(names, texts, strict=True), (names[3], "a second one")]
    path = root / f"images/list.{kind}"
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        path.write_text("\n".join(map(delimiter.join, [("path", "caption"), *pairs])))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"path": n, "caption": t}) for n, t in pairs))
    elif kind == "json":
        path.write_text(json.dumps([{"image": n, "caption": t} for n, t in pairs]))
        return path, ["--coco", path, "--images", path.parent]
    elif kind == "folder":
        for name, text in pairs[:COUNT]:
            (path.parent / name).with_suffix(".txt").write_text(text)
            (path.parent / name).with_suffix(".json").write_text(json.dumps({"caption": text}))
        return path.parent, ["--folder", path.parent]
    else:
        return path.parent, ["--classes", path.parent]
    return path, ["--table", path]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "folder", "classes"])
def test_batches_are_those_of_the_shards_that_make_shards_writes(kind, pipeline, tmp_path):
    source, words = write_source(kind, tmp_path)
    out = ["--output", tmp_path / "out", "--samples-per-shard", 4, "--shuffle-seed", 0]
    assert main([*map(str, [*words, *out, "--workers", 1])], "make_shards") == 0
    tars = sorted((tmp_path / "out").glob("*.tar"))
    pieces, shards = pipeline([source], files=FILES), pipeline(tars)
    assert pieces.mixture.digest == shards.mixture.digest
    for piece, tar in zip(pieces.mixture.shards, tars, strict=True):
        assert list(read_shard(piece)) == list(read_shard(str(tar)))
    expected = [content(batch) for batch in take(shards, 10)]
    assert [content(batch) for batch in take(pieces, 10)] == expected
    assert samples_per_epoch(pieces.config) == COUNT

    # A run that began on one goes on with the other.
    state = pieces.begin()
    for batch in take(pieces, 3):
        state.advance(batch)
    state = data_from_json(json.loads(json.dumps(data_to_json(state))))
    assert [content(batch) for batch in take(shards, 7, state=state)] == expected[3:]
    assert difference(fingerprints(pieces.mixture), fingerprints(shards.mixture)) is None


def test_every_row_comes_once_per_epoch_whatever_readers_go_on(pipeline, tmp_path):
    source, _ = write_source("csv", tmp_path)
    data = naming_epochs(pipeline([source], files=FILES, **ONE_BY_ONE))
    states, seen = [], Counter()
    for readers in (2, 3, 1):
        states = [data.begin(states, rank, readers) for rank in range(readers)]
        for rank, state in enumerate(states):
            for batch in islice(data.batches_of(rank, state=state), 40 if readers == 1 else 3):
                seen.update(batch.ids)
                state.advance(batch)
    first = {name: count for name, count in seen.items() if name.startswith("0:")}
    assert set(first.values()) == {1}
    assert len(first) == COUNT


def test_a_sample_of_a_broken_file_is_counted_and_named(pipeline, tmp_path):
    names = write_images(tmp_path, 4)
    (tmp_path / names[1]).unlink()
    (tmp_path / names[2]).write_bytes(HTML)
    rows = [*((name, "a text") for name in names), ("", "of nothing"), (names[0], "")]
    (tmp_path / "t.csv").write_text("\n".join(map(",".join, [("path", "caption"), *rows])))
    files = FilesConfig(shuffle_seed=None)
    (piece,) = shards_of(tmp_path / "t.csv", files)
    found = [sample.problem and str(sample.problem) for sample in read_shard(piece)]
    assert found[0] is found[3] is None
    assert found[1] == f"missing_image: {names[1]}: No such file or directory"
    assert found[2].startswith(f"unreadable_image: {names[2]}: ")
    assert found[4].startswith("no_path")
    (batch,) = take(pipeline([tmp_path / "t.csv"], files=files, shuffle_buffer=5), 1)
    assert set(batch.counts.skipped) == {"missing_image", "unreadable_image", "no_path"}


def shards_of(path, files=FILES):
    return expand_shards([str(path)], files=files)


def test_what_lies_beside_an_image_is_part_of_its_sample(tmp_path):
    write_images(tmp_path, 2)
    for name, text in (
        ("sea_lion/00.txt", "of 0"),
        ("sea_lion/00.title.TXT", "title of 0"),
        ("sea_lion/00.npy", "no text"),
        ("sea_lion/000.txt", "of another"),
        (".hidden.txt", ""),
    ):
        (tmp_path / name).write_text(text)
    (piece,) = shards_of(tmp_path, FilesConfig(shuffle_seed=None))
    one, two = (sample.members for sample in read_shard(piece))
    assert list(one) == ["png"]  # cat/01.png
    assert find_captions(two, "txt") == ["of 0"]
    assert find_captions(two, "title.txt") == ["title of 0"]
    assert list(two) == ["jpg", "title.txt", "txt"]


def test_images_alone_have_neither_caption_nor_label(tmp_path):
    names = write_images(tmp_path / "deep/er", 3)
    (tmp_path / names[0].replace("/", "-")).write_bytes(encode(photo(0, 20, 20), "JPEG"))
    (piece,) = shards_of(tmp_path)
    assert [sorted(sample.members) for sample in read_shard(piece)] == [
        sorted((name.rpartition(".")[2], "json")) for name in json_names(piece)
    ]
    assert len(json_names(piece)) == 4
    (piece,) = shards_of(tmp_path / "deep/er", FilesConfig(shuffle_seed=None))
    assert piece.classnames == ["cat", "sea lion"]
    assert [sample.members["cls"] for sample in read_shard(piece)] == [b"0", b"1", b"1"]


def json_names(piece):
    return [json.loads(sample.members["json"])["file_name"] for sample in read_shard(piece)]


def test_rows_are_shuffled_once_unless_their_own_order_is_wanted(tmp_path):
    source, _ = write_source("csv", tmp_path)
    own = [
        n for piece in shards_of(source, FilesConfig(shuffle_seed=None)) for n in json_names(piece)
    ]
    shuffled = [name for piece in shards_of(source) for name in json_names(piece)]
    assert own == [line.split(",")[0] for line in source.read_text().splitlines()[1 : COUNT + 1]]
    assert sorted(shuffled) == sorted(own) != shuffled
    assert shard_names(shards_of(source)) == [f"{i:05d}" for i in range(5)]
    copy = pickle.loads(pickle.dumps(shards_of(source)[1]))
    assert json_names(copy) == shuffled[4:8]
    assert (copy, copy.first, copy.size) == (f"{source}/00001", 4, 4)


def test_datasets_of_a_mixture_read_tables_by_columns_of_their_own(tmp_path):
    source, _ = write_source("csv", tmp_path)
    source.write_text(source.read_text().replace("path,caption", "file,title", 1))
    columns = FilesConfig(image_column="file", caption_columns=("title",))
    mix = {"a": DatasetConfig(str(source), files=columns), "b": DatasetConfig(str(source.parent))}
    config = DataConfig(mix=mix, files=FILES)
    assert [len(dataset.shards) for dataset in Mixture.find(config).datasets] == [1, 5]
    captions = [find_captions(s.members, "all") for s in read_shard(Mixture.find(config).shards[0])]
    assert Counter(map(len, captions)) == {1: COUNT - 1, 2: 1}


def test_splits_of_one_file_are_datasets_of_their_own(tmp_path):
    names = write_images(tmp_path, 6)
    images = [
        {"filename": name, "split": ("train", "val")[i % 2], "sentences": [{"raw": "a"}]}
        for i, name in enumerate(names)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    mix = {
        split: DatasetConfig(str(tmp_path / "k.json"), files=FilesConfig(splits=(split,)))
        for split in ("train", "val")
    }
    mixture = Mixture.find(DataConfig(mix=mix))
    assert mixture.names == ("train/00000", "val/00000")
    assert [sorted(json_names(piece)) for piece in mixture.shards] == [names[::2], names[1::2]]
    with pytest.raises(UserError, match=r"has splits train, val: .* --split .*files\.splits"):
        shards_of(tmp_path / "k.json")


def test_other_rows_and_other_images_are_noticed(tmp_path):
    source, _ = write_source("csv", tmp_path)
    config = DataConfig(train=str(source), files=FILES)
    before = json.loads(json.dumps(fingerprints(Mixture.find(config))))
    assert difference(before, fingerprints(Mixture.find(config))) is None
    text = source.read_text()
    source.write_text(text.replace("yellow", "yell!", 1))
    assert "has other rows" in difference(before, fingerprints(Mixture.find(config)))
    source.write_text(text)
    (piece, *_) = shards_of(source)
    (source.parent / json_names(piece)[0]).write_bytes(encode(photo(99, 20, 20)))
    found = difference(before, fingerprints(Mixture.find(config)))
    assert found == "00000 has other first image"
    (source.parent / json_names(piece)[0]).unlink()
    assert difference(before, fingerprints(Mixture.find(config))) is None


@pytest.mark.parametrize(
    ("name", "text", "files", "message"),
    [
        ("t.csv", "file,caption\na.jpg,x\n", {}, "no column 'path' in .*: it has 'file', "
         ".* --image-column .* data.files.image_column"),
        ("t.csv", "path,caption\n", {}, "no row"),
        ("t.csv", "path,caption\ngone/a.jpg,x\n", {}, "none of .* exists, such as .*/gone/a.jpg: "
         "check data.files.images"),
        ("t.csv", "path,caption\na.jpg,x\n", {"images": "/nowhere"}, "no folder at /nowhere"),
        ("t.jsonl", '{"path": "a.jpg"}\n{"path": "b.jpg"}', {}, "no column 'caption' in .* 'path'"),
        ("t.jsonl", '{"path": "a.jpg", "caption": "x"}\n["a"]', {}, "line 2 is no JSON object"),
        ("t.jsonl", "{", {}, "line 1 is no JSON object"),
        ("t.json", "[]", {}, "no image in"),
        ("t.npy", "x", {}, "no .tar file in .*, and no image below it"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(name, text, files, message, tmp_path):
    (tmp_path / name).write_text(text)
    path = tmp_path if name == "t.npy" else tmp_path / name
    with pytest.raises(UserError, match=message):
        shards_of(path, FilesConfig(**files))
