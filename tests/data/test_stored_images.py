"""Tables that hold the images themselves, and what img2dataset writes, read as they are."""

from __future__ import annotations

import json
import sys

import pytest
from loader_cases import content, take
from shard_factory import CAPTIONS, HTML, encode, photo, write_shard

from navit_clip.data.annotations.image_files import FilesConfig, open_images
from navit_clip.data.fingerprint import difference, fingerprints
from navit_clip.data.patterns import expand_shards
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.errors import UserError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 10
FILES = FilesConfig(
    image_column="image", caption_columns=("text",), samples_per_shard=4, shuffle_seed=None
)


def photos():
    return [encode(photo(i, 24 + i, 40 - i), "JPEG") for i in range(COUNT)]


def table_of(images, **columns):
    """A table as `datasets` writes it, with the names of the classes."""
    labels = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    about = {"info": {"features": {"label": labels, "image": {"_type": "Image"}}}}
    columns = {"image": images, "text": [CAPTIONS[i % 7] for i in range(COUNT)], **columns}
    table = arrow.table({"label": [i % 2 for i in range(COUNT)], **columns})
    return table.replace_schema_metadata({"huggingface": json.dumps(about)})


def as_datasets(images):
    return table_of([{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)])


def write(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=4)
        return path
    new = arrow.ipc.new_file if path.stem == "file" else arrow.ipc.new_stream
    with new(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=3)
    return path


def pieces_of(path, files=FILES):
    return expand_shards([str(path)], files=files)


@pytest.mark.parametrize("name", ["t.parquet", "stream.arrow", "file.arrow"])
def test_stored_images_are_samples_as_files_are(name, pipeline, tmp_path):
    images = photos()
    path = write(as_datasets(images), tmp_path / "stored" / name)
    lines = [("image", "text"), *((f"{i}.jpg", CAPTIONS[i % 7]) for i in range(COUNT))]
    (tmp_path / "t.csv").write_text("\n".join(map(",".join, lines)))
    for i, image in enumerate(images):
        (tmp_path / f"{i}.jpg").write_bytes(image)
    stored = pipeline([path.parent], files=FILES)
    files = pipeline([tmp_path / "t.csv"], files=FILES)
    assert [list(read_shard(piece)) for piece in stored.mixture.shards] == [
        list(read_shard(piece)) for piece in files.mixture.shards
    ]
    assert [piece.size for piece in stored.mixture.shards] == [4, 4, 2]
    expected = [content(batch) for batch in take(files, 6)]
    assert [content(batch) for batch in take(stored, 6)] == expected
    by_workers = [
        [content(batch) for batch in take(pipeline([source], files=FILES, workers=2), 4)]
        for source in (path.parent, tmp_path / "t.csv")
    ]
    assert by_workers[0] == by_workers[1]
    (batch, *_), state = take(stored, 1), stored.begin()
    state.advance(batch)
    assert [content(batch) for batch in take(stored, 5, state=state)] == expected[1:]

    before = json.loads(json.dumps(fingerprints(stored.mixture)))
    assert difference(before, fingerprints(stored.mixture)) is None
    write(as_datasets([*images[:-1], images[0]]), path)
    assert "has other rows" in difference(before, fingerprints(stored.mixture))
    mixture = stored.mixture
    path.unlink()  # a shard that cannot be read now is no other one
    assert difference(before, fingerprints(mixture)) is None


def test_what_a_table_may_hold_of_an_image(tmp_path):
    images = photos()
    (tmp_path / "beside.jpg").write_bytes(images[1])
    cells = [{"bytes": image, "path": None} for image in images]
    cells[1:4] = [{"bytes": None, "path": "beside.jpg"}, None, {"bytes": HTML, "path": "x"}]
    (piece, *_) = pieces_of(write(table_of(cells), tmp_path / "t.parquet"))
    one, beside, none, html = read_shard(piece)
    assert [one.members["jpg"], beside.members["jpg"]] == images[:2]
    assert (none.problem.reason, html.problem.reason) == ("no_path", "unreadable_image")
    # img2dataset's parquet output has bytes alone.
    config = FilesConfig(image_column="jpg", caption_columns=("caption",))
    table = arrow.table({"jpg": images, "caption": [["a", "b"]] * COUNT, "key": ["0"] * COUNT})
    write(table, tmp_path / "00000.parquet")
    found = [
        s for piece in pieces_of(tmp_path / "00000.parquet", config) for s in read_shard(piece)
    ]
    assert [sample.members["jpg"] for sample in found] == images
    assert json.loads(found[0].members["json"])["captions"] == ["a", "b"]
    assert [sample.id for sample in found[3:5]] == ["00000/000000003", "00001/000000004"]


def test_classes_of_datasets_have_the_names_in_the_file(tmp_path):
    path = write(as_datasets(photos()), tmp_path / "t.parquet")
    files = FilesConfig(image_column="image", caption_columns=(), label_column="label")
    (piece, *_) = pieces_of(path, files)
    assert piece.classnames == ["cat", "dog"]
    assert [sample.members["cls"] for sample in read_shard(piece)] == [b"0", b"1"] * 2
    assert "txt" not in next(read_shard(piece)).members


def test_a_table_damaged_in_the_middle_is_a_bad_shard(tmp_path):
    path = write(as_datasets(photos()), tmp_path / "t.parquet")
    pieces = pieces_of(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(ShardError, match=r"t\.parquet/00000: "):
        list(read_shard(pieces[0]))
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"cannot read .*t\.parquet"):
        pieces_of(path)


def test_what_is_wrong_with_a_table_is_one_line(tmp_path, monkeypatch):
    path = write(as_datasets(photos()), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"no column 'path' in .*: it has 'label', 'image', 'text'"):
        pieces_of(path, FilesConfig())
    with pytest.raises(UserError, match="holds the images themselves: read it where shards are"):
        open_images(path, FILES)
    empty = write(as_datasets(photos()).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty\.parquet has no row"):
        pieces_of(empty)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: .*navit-clip\[parquet\]"):
        pieces_of(path)


def test_folders_as_datasets_saves_them(tmp_path):
    path = write(as_datasets(photos()), tmp_path / "saved/train/data-00000-of-00001.arrow")
    write(as_datasets(photos()), path.with_name("cache-0123.arrow"))
    (path.parent / "state.json").write_text("{}")
    assert len(pieces_of(path.parent)) == 3
    with pytest.raises(UserError, match=r"no image below it, but data in .*/saved/train/: name"):
        pieces_of(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["webdataset", "files"])
def test_outputs_of_img2dataset_are_read_as_they_are(kind, tmp_path):
    images = photos()[:3]
    about = [json.dumps({"key": f"{i:09d}", "caption": CAPTIONS[i]}).encode() for i in range(3)]
    samples = {
        f"{i:09d}": {"jpg": image, "json": about[i], "txt": CAPTIONS[i].encode()}
        for i, image in enumerate(images)
    }
    urls = [f"https://host/{i}.jpg" for i in range(3)]
    write(arrow.table({"url": urls, "caption": CAPTIONS[:3]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 3, "successes": 3}')
    if kind == "webdataset":
        write_shard(tmp_path / "00000.tar", samples)
    else:
        for key, members in samples.items():
            for extension, data in members.items():
                (tmp_path / "00000").mkdir(exist_ok=True)
                (tmp_path / f"00000/{key}.{extension}").write_bytes(data)
    (shard,) = pieces_of(tmp_path)
    assert [sample.members for sample in read_shard(shard)] == list(samples.values())
