"""Making shards: what goes in from every kind of source, continuing after a kill, verification."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_factory import HTML, encode, photo, png_of_size

from navit_clip.data.shards import read_shard
from navit_clip.evaluation.captioned import open_captioned
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.tools.make_shards.__main__ import main

KINDS = (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"))


def make_images(folder: Path, count: int, prefix: str = "") -> list[str]:
    """Writes images of changing size and kind; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        kind, extension = KINDS[i % 3]
        names.append(f"{prefix}{i:03d}{extension}")
        (folder / names[-1]).write_bytes(encode(photo(i, 20 + i % 5, 30 - i % 7), kind))
    return names


def coco(root: Path, names: list[str], captions: int = 2) -> Path:
    """A JSON of captions in COCO's format."""
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "caption": f" caption {c} of {name}\n"}
            for c in range(captions)
            for i, name in enumerate(names)
        ],
    }
    path = root / "captions.json"
    path.write_text(json.dumps(content))
    return path


def table(path: Path, lines: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    return path


def run(*words: object) -> int:
    return main([*map(str, words), "--workers", "1"], "make_shards")


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return next(line for line in lines if line.startswith("make_shards: error: "))


def samples(output: Path) -> list[dict[str, bytes]]:
    return [s.members for path in sorted(output.glob("*.tar")) for s in read_shard(str(path))]


def fields(output: Path) -> list[dict[str, object]]:
    return [json.loads(members["json"]) for members in samples(output)]


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def records(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()][1:]


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


# The same bytes, whoever writes them


def test_bytes_depend_on_input_and_seed_alone(tmp_path):
    names = make_images(tmp_path / "images", 20)
    captions = coco(tmp_path, names)

    def make(name: str, *options: object) -> dict[str, bytes]:
        main([*map(str, ("--coco", captions, "--images", tmp_path / "images", "--output",
                         tmp_path / name, "--samples-per-shard", 6, *options))])  # fmt: skip
        return content(tmp_path / name)

    alone = make("alone", "--workers", 1)
    assert make("together", "--workers", 2) == alone
    assert "00003.tar" in alone
    shuffled = make("shuffled", "--workers", 1, "--shuffle-seed", 3)
    assert make("again", "--workers", 1, "--shuffle-seed", 3) == shuffled
    order = [f["file_name"] for f in fields(tmp_path / "shuffled")]
    assert sorted(order) == names
    assert order != names


def test_parts_of_several_machines_merge_to_the_bytes_of_one_run(tmp_path, capsys, monkeypatch):
    names = make_images(tmp_path / "in/ant", 9) + make_images(tmp_path / "in/sea_lion", 5)
    common = ("--classes", tmp_path / "in", "--samples-per-shard", 2, "--shuffle-seed", 0)
    run(*common, "--output", tmp_path / "one")
    parts = [tmp_path / f"part{k}" for k in (3, 1, 2)]
    for part in parts:
        run(*common, "--part", f"{part.name[-1]}/3", "--output", part)
        assert run("--verify", part) == 0
    assert [len([*part.glob("*.tar")]) for part in parts] == [2, 3, 2]
    assert len(names) == 14
    merge = ("--merge", *parts, "--output")
    run(*merge, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "one")
    assert "merged and verified 14 samples in 7 shards" in capsys.readouterr().out

    # Killed in between, and on another disk, where no links can be made.
    again = tmp_path / "again"
    run(*merge, again)
    (again / "00004.tar").unlink()
    (again / ".x.partial").touch()
    monkeypatch.setattr(os, "link", lambda *_: os.stat("/nowhere"))
    run(*merge, again)
    assert content(again) == content(tmp_path / "one")


def test_parts_that_are_not_all_of_one_run_are_refused(tmp_path, capsys):
    make_images(tmp_path / "in/ant", 8)
    folders = {name: tmp_path / name for name in ("a", "b", "other", "half", "whole", "again")}
    common = ("--classes", tmp_path / "in", "--samples-per-shard", 2)
    run(*common, "--output", folders["whole"])
    for name, *words in (
        ("a", "--part", "1/2"),
        ("b", "--part", "2/2"),
        ("again", "--part", "2/2"),
        ("half", "--part", "1/3"),
        ("other", "--part", "2/2", "--shuffle-seed", 1),
    ):
        run(*common, *words, "--output", folders[name])

    def problem(*names: str) -> str:
        return refused(
            capsys, "--merge", *(tmp_path / n for n in names), "--output", tmp_path / "m"
        )

    assert "part 2/2 is missing" in problem("a")
    assert "again are both part 2/2: give one" in problem("a", "b", "again")
    assert "other was made otherwise than" in (line := problem("a", "other"))
    assert "(shuffle_seed was None, now 1)" in line
    assert "(parts was 2, now 3)" in problem("a", "half")
    assert "whole is no part: it was made without --part" in problem("a", "whole")
    assert "no manifest.jsonl" in problem("a", "in")
    manifest = folders["b"] / "manifest.jsonl"
    text = manifest.read_text()
    manifest.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert "b: 1 shards are not made yet, repeat its command" in problem("a", "b")
    manifest.write_text(text)
    shard = folders["b"] / "00003.tar"
    shard.write_bytes(shard.read_bytes().replace(b"ant", b"bee"))
    assert "00003.tar: content differs from its SHA-256: delete it" in problem("a", "b")
    assert "expected such as 3/16" in refused(capsys, *common, "--part", "4/3", "--output", "x")
    assert "part was 1/2, now 2/2" in refused(
        capsys, *common, "--part", "2/2", "--output", folders["a"]
    )


def test_killed_at_any_time_goes_on_to_the_same_bytes(tmp_path):
    images = tmp_path / "images"
    names = make_images(images, 12)
    captions = coco(tmp_path, names)
    stuck = images / names[5]
    kept = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)  # whoever reads it waits for ever
    out = tmp_path / "out"
    words = ["--coco", str(captions), "--images", str(images), "--samples-per-shard", "2"]
    command = [sys.executable, "-m", "navit_clip.tools.make_shards", *words, "--workers", "2"]
    process = subprocess.Popen([*command, "--output", str(out)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (out / "manifest.jsonl").exists() or len(records(out)) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the other shards were not written"
            time.sleep(0.05)
        workers = descendants(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(workers) >= 3  # the server that forks, and two workers
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)

    assert (out / "00002.tar.partial").exists()
    untouched = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(untouched) == 5
    with (out / "manifest.jsonl").open("a") as file:
        file.write('{"shard": "00002.tar", "samp')  # killed while it wrote a line
    stuck.unlink()
    stuck.write_bytes(kept)
    run(*words, "--output", out)
    run(*words, "--output", tmp_path / "undisturbed")
    assert content(out) == content(tmp_path / "undisturbed")
    now = {name: (out / name).stat().st_mtime_ns for name in untouched}
    assert now == untouched


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and those that these started."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("needs Linux's /proc")
    own = [int(word) for word in found.read_text().split()]
    return own + [grandchild for child in own for grandchild in descendants(child)]


def test_a_shard_that_was_deleted_or_cut_is_made_again(tmp_path):
    captions = coco(tmp_path, make_images(tmp_path / "images", 6))
    words = ("--coco", captions, "--images", tmp_path / "images", "--output", tmp_path / "out",
             "--samples-per-shard", 2)  # fmt: skip
    run(*words)
    whole = content(tmp_path / "out")
    (tmp_path / "out" / "00000.tar").unlink()
    (tmp_path / "out" / "00002.tar").write_bytes(whole["00002.tar"][:700])
    run(*words)
    assert content(tmp_path / "out") == whole


def test_other_source_or_settings_are_refused(tmp_path, capsys):
    images = tmp_path / "images"
    names = make_images(images, 4)
    common = ("--images", images, "--output", tmp_path / "out")
    run("--coco", coco(tmp_path, names), *common)
    before = content(tmp_path / "out")
    line = refused(capsys, "--coco", coco(tmp_path, names), *common, "--samples-per-shard", 2)
    assert "samples_per_shard was 1000, now 2" in line
    line = refused(capsys, "--coco", coco(tmp_path, names), *common, "--shuffle-seed", 2)
    assert "shuffle_seed was None, now 2" in line
    line = refused(capsys, "--coco", coco(tmp_path, names, captions=1), *common)
    assert "rows_sha256 was" in line
    assert content(tmp_path / "out") == before


def test_folder_with_other_files_is_refused(tmp_path, capsys):
    captions = coco(tmp_path, make_images(tmp_path / "images", 1))
    line = refused(capsys, "--coco", captions, "--images", tmp_path / "images", "--output",
                   tmp_path)  # fmt: skip
    assert "holds other files" in line


# Verification


def test_verify_names_every_damaged_shard(tmp_path, capsys):
    captions = coco(tmp_path, make_images(tmp_path / "images", 10))
    out = tmp_path / "out"
    run("--coco", captions, "--images", tmp_path / "images", "--output", out,
        "--samples-per-shard", 2)  # fmt: skip
    assert run("--verify", out) == 0
    assert "verified 10 samples in 5 shards" in capsys.readouterr().out

    flipped = bytearray((out / "00001.tar").read_bytes())
    flipped[700] ^= 1
    (out / "00001.tar").write_bytes(flipped)
    (out / "00002.tar").unlink()
    with (out / "00003.tar").open("ab") as file:
        file.write(b"\0")
    (out / "00009.tar").write_bytes(b"")
    assert run("--verify", out) == 1
    found = [line for line in capsys.readouterr().err.splitlines() if "damaged: " in line]
    assert [line.partition("damaged: ")[2].split("/")[-1].split(":")[0] for line in found] == [
        "00001.tar", "00002.tar", "00003.tar", "00009.tar"
    ]  # fmt: skip
    assert "content differs" in found[0]


def test_verify_notices_an_unfinished_folder(tmp_path, capsys):
    captions = coco(tmp_path, make_images(tmp_path / "images", 4))
    out = tmp_path / "out"
    run("--coco", captions, "--images", tmp_path / "images", "--output", out,
        "--samples-per-shard", 2)  # fmt: skip
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[:-1]))
    assert run("--verify", out) == 1
    err = capsys.readouterr().err
    assert "1 shards are not made yet" in err
    assert "00001.tar: not in manifest.jsonl" in err
    assert "no manifest.jsonl" in refused(capsys, "--verify", tmp_path)


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
