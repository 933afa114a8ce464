"""Class folders as people have them: every file is an image of a class or counted by reason."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import ExifTags, Image, features
from shard_factory import photo
from source_cases import image, read

from navit_clip.data.annotations.folders import read_class_folders
from navit_clip.data.decode import EncodedImage
from navit_clip.data.shards import read_shard
from navit_clip.errors import UserError
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.tools.make_shards.__main__ import main

FORMATS = {"tif": "TIFF", "tiff": "TIFF", "jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF",
           "jp2": "JPEG2000", "ppm": "PPM", "qoi": "QOI"}  # fmt: skip
REST = {
    "hidden": [".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/ant/._0.png", "ant/._0.png",
               "ant/@eaDir/0.png", "bee/.thumbnails/0.jpg", "Thumbs.db", "thumbnails/0.png",
               "annotations/.cache/0.png"],
    "outside_classes": ["stray.png"],
    "deeper_folder": ["ant/more/0.png", "bee/even/more/0.tif"],
    "no_image_file": ["README.md", "ant/notes.txt", "ant/more/x.xml", "annotations/0.xml"],
}  # fmt: skip


def write_all(root: Path) -> None:
    for name in ("ant/0.png", "ant/1.TIF", "bee/0.avif"):
        image(root / name)
    for names in REST.values():
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
    (root / "cow").mkdir()


def test_everything_that_is_no_image_of_a_class_is_counted(tmp_path):
    write_all(tmp_path)
    found = read_class_folders(tmp_path)
    assert found.names == ["ant", "bee", "cow"]
    assert found.images == [("ant/0.png", 0), ("ant/1.TIF", 0), ("bee/0.avif", 1)]
    assert found.skipped == {reason: len(names) for reason, names in REST.items()}
    assert len(found.skips) == 5
    dataset = open_labelled(str(tmp_path)).dataset
    assert (len(read(dataset)), dataset.skipped) == (3, found.skipped)


def test_shards_of_class_folders_count_the_same(tmp_path, capsys):
    write_all(tmp_path / "in")
    main([*map(str, ("--classes", tmp_path / "in", "--output", tmp_path / "out", "--workers", 1))])
    printed = capsys.readouterr().out
    assert "3 samples" in printed
    assert "skipped 15 files that are no image of a class" in printed
    for reason, names in REST.items():
        assert f"  {reason:<18}{len(names):>8}\n" in printed
    assert (tmp_path / "out/classnames.txt").read_text() == "ant\nbee\ncow\n"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("train/ant/0.png", "folders of these: name the folder whose folders are the classes"),
        ("0.png", "no class folders: give --labels FILE"),
        (".hidden/0.png", "no image in class folders"),
        ("a\nb/0.png", "its name is no line of text"),
    ],
)
def test_other_folders_are_refused(name, problem, tmp_path):
    image(tmp_path / name)
    with pytest.raises(UserError, match=problem):
        read_class_folders(tmp_path)


def encoded(kind: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    photo(0, 20, 40).save(file, kind, **({"exif": exif} if kind in ("TIFF", "AVIF") else {}))
    return file.getvalue()


@pytest.mark.parametrize("extension", FORMATS)
def test_formats_that_pillow_decodes_are_decoded(extension, tmp_path):
    data = encoded(FORMATS[extension])
    (tmp_path / "in" / "ant").mkdir(parents=True)
    (tmp_path / f"in/ant/0.{extension}").write_bytes(data)
    image(tmp_path / "in/bee/0.png")
    assert read(open_labelled(str(tmp_path / "in")).dataset)[0].data == data
    opened = EncodedImage(data)
    assert (opened.height, opened.width) == opened.pixels(20, 40).shape[:2] == (20, 40)
    main([*map(str, ("--classes", tmp_path / "in", "--output", tmp_path / "out", "--workers", 1))])
    first = next(read_shard(str(tmp_path / "out/00000.tar")))
    assert first.members[opened.extension] == data


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_they_are_turned_upright_once(kind):
    opened = EncodedImage(encoded(kind, 6))
    assert (opened.height, opened.width) == (40, 20)
    upright = photo(0, 20, 40).rotate(-90, expand=True)
    difference = abs(opened.pixels(40, 20).astype(float) - upright).mean()
    assert difference < 12
