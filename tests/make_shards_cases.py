"""What tests of make_shards share: images, tables, and what a command wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from shard_factory import encode, photo

from navit_clip.data.shards import read_shard
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
