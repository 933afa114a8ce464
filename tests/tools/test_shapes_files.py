"""Files of the generated data set: the same for any number of processes, and never half of them."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from navit_clip.tools.shapes import __main__ as command
from navit_clip.tools.shapes import scene as scenes

SMALL = ["--train", "23", "--shard-size", "10", "--zeroshot-per-class", "1", "--retrieval", "12"]


def main(arguments: list[str]) -> int:
    """``navit-clip data shapes`` in this process; returns its exit code."""
    try:
        return command.main(arguments, "shapes")
    except SystemExit as stop:
        return int(stop.code or 0)


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("shapes") / "out"
    assert main(["--output", str(output), *SMALL, "--workers", "1"]) == 0
    return output


def test_training_shards(written):
    shards = sorted((written / "train").iterdir())
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    seen, extensions = [], set()
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for key, names in itertools.groupby(members, key=lambda name: name.split(".")[0]):
            fields = {name.split(".")[1]: members[name] for name in names}
            extension = next(e for e in fields if e in ("jpg", "png"))
            assert set(fields) == {extension, "txt", "json"}
            image, meta = Image.open(io.BytesIO(fields[extension])), json.loads(fields["json"])
            assert image.size == (meta["width"], meta["height"])
            assert image.format == {"jpg": "JPEG", "png": "PNG"}[extension]
            assert fields["txt"].decode() == meta["captions"][0]
            seen.append(key)
            extensions.add(extension)
    assert len(set(seen)) == len(seen) == 23
    assert extensions == {"jpg", "png"}


def test_hard_pictures_are_others_with_the_same_names(written, tmp_path):
    output = tmp_path / "hard"
    assert main(["--output", str(output), *SMALL, "--workers", "1", "--hard"]) == 0
    easy, hard = files_below(written), files_below(output)
    assert {name.split(".")[0] for name in hard} == {name.split(".")[0] for name in easy}
    assert not set(hard.values()) & {easy[name] for name in easy if "templates" not in name}
    assert main(["--output", str(output), *SMALL]) == 2


def test_zeroshot_folders(written):
    folders = {
        folder.name: len(list(folder.iterdir())) for folder in (written / "zeroshot").iterdir()
    }
    assert folders == {f"{colour}_{shape}": 1 for colour, shape in scenes.CLASSES}


def test_retrieval_files(written):
    coco = json.loads((written / "retrieval" / "captions.json").read_text())
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == len(coco["annotations"]) == 12
    assert {a["image_id"] for a in coco["annotations"]} == set(images)
    for image in images.values():
        with Image.open(written / "retrieval" / "images" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])


def test_files_do_not_depend_on_the_number_of_processes(written, tmp_path):
    output = tmp_path / "two"
    assert main(["--output", str(output), *SMALL, "--workers", "2"]) == 0
    assert files_below(output) == files_below(written)


def test_second_run_changes_nothing(written, capsys):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert main(["--output", str(written), *SMALL]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_other_arguments_are_refused(written, capsys):
    assert main(["--output", str(written), *SMALL, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "--output" in error
    assert error.count("\n") == 1


def test_interrupted_output_is_regenerated(written, tmp_path):
    output = tmp_path / "out"
    (output / "train").mkdir(parents=True)
    (output / "train" / "00009.tar").write_bytes(b"left over")
    (output / "shapes.partial.json").write_text("{}")
    assert main(["--output", str(output), *SMALL, "--workers", "1"]) == 0
    assert files_below(output) == files_below(written)


def test_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.tar").write_bytes(b"mine")
    assert main(["--output", str(tmp_path), *SMALL]) == 2
    assert "other files" in capsys.readouterr().err
    assert files_below(tmp_path) == {"train/mine.tar": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train", "-1"], "--train"),
        (["--shard-size", "0"], "--shard-size"),
        (["--zeroshot-per-class", "-1"], "--zeroshot-per-class"),
        (["--retrieval", "-5"], "--retrieval"),
        (["--seed", "-1"], "--seed"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_bad_values_give_one_line(arguments, named, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    for output in (path, path / "below"):
        assert main(["--output", str(output), *SMALL]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1
    assert path.read_text() == "mine"


def test_empty_splits(tmp_path):
    counts = ["--train", "0", "--zeroshot-per-class", "0", "--retrieval", "0"]
    assert main(["--output", str(tmp_path / "out"), *counts]) == 0
    coco = json.loads((tmp_path / "out" / "retrieval" / "captions.json").read_text())
    assert coco == {"images": [], "annotations": []}


def test_command_line_starts_without_torch():
    code = "import sys, navit_clip.tools.shapes.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
