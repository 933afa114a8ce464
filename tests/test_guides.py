"""The shell blocks of README and docs run as written, one after the other, on small data.

A folder holds what the pages assume: a table, COCO's JSON, ImageNet's class folders. Two commands
come before the real ones: `navit-clip` stops a training after two steps, asks for no more word
pieces than a small vocabulary has and for a twelfth of open_clip's prompts, `torchrun` does that in
one process, on small batches of few data workers, and trains a narrow model. Blocks about several
nodes are the subject of `test_launchers`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shard_factory import SIZES, encode, photo
from timm.data import ImageNetInfo

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[1]
_PIECES = 1200
_NARROW = " ".join(
    f"--task.model.{tower}.encoder.{field} {value}"
    for tower in ("image", "text")
    for field, value in {"width": 32, "depth": 1, "heads": 2}.items()
)
_FEW = "--data.budget '{tokens: {image: 8192, text: 2144}, max_examples: 200}' --data.workers 2"
_SHORT = "--steps 2 --optim.schedule.warmup_steps 1 --optim.schedule.cooldown_steps 1"
_COMMANDS = {
    "navit-clip": f"""
short=()
[ "$1" != train ] || short=({_SHORT})
words=("${{@/#32000/{_PIECES}}}")
exec {sys.executable} -m navit_clip "${{words[@]/#openai/simple}}" "${{short[@]}}"
""",
    # `torchrun --nproc-per-node 8 -m MODULE FLAGS…`
    "torchrun": f"""
exec {sys.executable} -m "${{@:4}}" {_SHORT} {_NARROW} {_FEW} --task.model.text.vocab_size {_PIECES}
""",
}


def blocks_of(page: str) -> list[str]:
    """The page's blocks of shell commands."""
    blocks: list[str] = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    return blocks


def write_photos(folder: Path, count: int) -> list[str]:
    """Writes photos as JPEG files; returns their names."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(encode(photo(i, *SIZES[i % len(SIZES)]), "JPEG"))
    return [f"{i}.jpg" for i in range(count)]


def write_coco(json_file: Path, images: Path, count: int) -> None:
    """Writes photos with five captions each, of enough words for the vocabulary."""
    names = write_photos(images, count)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefghijklmnoprstu"], 6)) for _ in range(1000)]
    captions = [
        {"image_id": i, "id": 5 * i + n, "caption": " ".join(rng.choice(words, 7))}
        for i in range(count)
        for n in range(5)
    ]
    entries = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    json_file.write_text(json.dumps({"images": entries, "annotations": captions}))


def write_classes(root: Path, names: list[str]) -> None:
    """Writes a folder with one photo for each class."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(encode(photo(i, 12, 16)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume."""
    root = tmp_path_factory.mktemp("world")
    write_coco(root / "train.json", root / "train2017", 300)
    captions = json.loads((root / "train.json").read_text())["annotations"]
    rows = [f"train2017/{one['image_id']}.jpg,{one['caption']}" for one in captions]
    (root / "photos.csv").write_text("\n".join(["path,caption", *rows]))
    (root / "coco").mkdir()
    write_coco(root / "coco/captions_val2017.json", root / "coco/val2017", 40)
    synsets = ImageNetInfo("imagenet-1k").label_names()
    write_classes(root / "imagenet/val", synsets)
    write_classes(root / "imagenetv2-matched-frequency-format-val", [str(i) for i in range(1000)])
    write_classes(root / "imagenet-r", synsets[::5])
    write_classes(root / "objectnet/images", ["air_freshener", "band", "mug"])
    (root / "objectnet.json").write_text(
        json.dumps({"air_freshener": [], "band": [419], "mug": [504, 968]})
    )
    (root / "bin").mkdir()
    for name, body in _COMMANDS.items():
        (root / "bin" / name).write_text(f"#!/bin/bash{body}")
        (root / "bin" / name).chmod(0o755)
    return root


def run(block: str, world: Path) -> None:
    """Runs one block in the folder, with the stand-ins before the real commands."""
    path = {"PATH": f"{world / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=world,
        env={**os.environ, **path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """The folder after README's blocks."""
    for block in blocks_of("README.md"):
        if not block.startswith("make "):  # the commands that make and run this
            run(block, world)
    return world


def test_the_readme(trained):
    assert (trained / "batch.png").exists()
    assert (trained / "runs/photos/model").is_dir()
    assert (trained / "runs/b16/eval/zeroshot.json").exists()
    assert (trained / "runs/b16/eval/retrieval.html").exists()


@pytest.mark.slow  # minutes; the README has the commands that most people take
def test_the_guide_of_evaluation(trained):
    for block in blocks_of("docs/evaluation.md"):
        run(block, trained)
    results = {path.stem for path in (trained / "runs/b16/eval").glob("*.json")}
    assert results == {"zeroshot", "retrieval", "zeroshot-v2", "zeroshot-r", "zeroshot-objectnet"}


@pytest.mark.slow  # the same commands as above with other recipes
def test_the_guide_of_fine_tuning(trained, monkeypatch):
    (trained / "photos").mkdir()
    for name in ("a", "b", "held-out"):
        (trained / "photos" / name).symlink_to(trained / "shards")
    monkeypatch.setenv("SHARDS", '["photos/a", "photos/b"]')
    run(blocks_of("docs/finetune.md")[-1], trained)
    assert (trained / "runs/finetune_small/retrieval.json").exists()
