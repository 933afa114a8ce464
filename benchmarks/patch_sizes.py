"""One model for patches of 8, 16 and 32 pixels beside models of one size, on generated shapes.

Squares of 192 pixels show sixteen small marks of one shape in one texture, 16 classes, in any
colour: a large one is recognised by parts that look alike at any scale. Four models are trained on
them by the recipe ``flexivit_shapes`` for equally many steps: one whose samples draw their size of
patches, as FlexiViT, and one for each size. Then all are evaluated zero-shot, the one of several
sizes at each of them, and that of 16 pixels also at 8 and 32, with its kernel resized. Runs that
were begun go on, finished ones are only evaluated.

``top1`` holds accuracy by model and by size of patches; ``gain`` how many points the model of
several sizes is above that of 16 pixels, ``behind`` how many it is below the model of that size
alone.

    python -m benchmarks.patch_sizes --runs runs/patch_sizes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import command
from navit_clip.commands import number
from navit_clip.data.shards import add_member
from navit_clip.errors import UserError
from navit_clip.tools.shapes.render import encode, render
from navit_clip.tools.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
    Attributes,
    PlacedObject,
    Scene,
)

SIZES, SIDE, OWN = (8, 16, 32), 192, 16
SEVERAL = "several"
ACROSS, MARK = 4, (28.0, 40.0)  # marks in a row and in a column, pixels of a mark's side
CLASSES = tuple(product(TEXTURES, SHAPES))
IMAGES, SHARD, TEST = 12_000, 1000, 40  # for training, in a shard, of each class for the test
TOKENIZER, TEMPLATES = "tokenizer.model", "templates.txt"


def draw(index: int, seed: int) -> tuple[str, bytes, str]:
    """Name of the class, file and its extension, a function of (seed, index)."""
    rng = np.random.default_rng([seed, index])
    texture, shape = CLASSES[index % len(CLASSES)]
    background, colour = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(list(COLOURS)))
    attributes, cell = Attributes("small", texture, colour, shape), SIDE / ACROSS
    marks = []
    for row, column in product(range(ACROSS), repeat=2):
        side = rng.uniform(*MARK)
        x, y = rng.uniform(side / 2, cell - side / 2, 2)
        marks.append(PlacedObject(attributes, column * cell + x, row * cell + y, side))
    scene = Scene(SIDE, SIDE, background, tuple(marks))
    return f"{texture} {shape}", *encode(render(scene, rng), rng)


def write(folder: Path) -> None:
    """Training shards and a test set in class folders, if they are not there yet."""
    if (folder / TEMPLATES).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, IMAGES, SHARD):
        with tarfile.open(folder / f"{first // SHARD:03d}.tar", "w") as tar:
            for index in range(first, first + SHARD):
                name, image, extension = draw(index, seed=0)
                add_member(tar, f"{index}.{extension}", image)
                add_member(tar, f"{index}.txt", f"a {name}".encode())
    for index in range(TEST * len(CLASSES)):
        name, image, extension = draw(index, seed=1)
        path = folder / "test" / name.replace(" ", "_") / f"{index}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    (folder / TEMPLATES).write_text("a {}\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates."""
    data = args.runs / "data"
    write(data)
    if not (data / TOKENIZER).exists():
        options = ("--captions", "txt", "--vocab-size", 48, "--model-type", "bpe")
        _run("data", "train_tokenizer", "--shards", data, *options, "--output", data / TOKENIZER)
    top1: dict[str, dict[int, float]] = {}
    for model in ("32", "16", SEVERAL, "8"):  # the quickest first
        flags = ["--run_dir", args.runs / model, "--steps", args.steps, "--seed", args.seed]
        flags += ["--tokenizer.path", data / TOKENIZER, "--data.train", data]
        if model != SEVERAL:
            flags += ["--task.model.image.patch_size", model, "--data.resolution.patch_sizes", "{}"]
        _run("train", "--config", "flexivit_shapes", *flags)
        sizes = SIZES if model in (SEVERAL, str(OWN)) else [int(model)]
        top1[model] = {size: _evaluate(args.runs / model, data, size) for size in sizes}
        print(f"{model}: {top1[model]}", file=sys.stderr, flush=True)
    several, own = top1[SEVERAL], top1[str(OWN)]
    return {
        "steps": args.steps,
        "images": TEST * len(CLASSES),
        "top1": top1,
        "gain": {size: 100 * (several[size] - own[size]) for size in SIZES if size != OWN},
        "behind": {size: 100 * (top1[str(size)][size] - several[size]) for size in SIZES},
    }


def _evaluate(run_dir: Path, data: Path, size: int) -> float:
    """Accuracy on squares cut into patches of this size."""
    output = run_dir / f"zeroshot-{size}.json"
    flags = ["--model", run_dir / "model", "--patch-size", size, "--square", SIDE]
    flags += ["--data", data / "test", "--templates", data / TEMPLATES, "--output", output]
    _run("eval", "zeroshot", *flags)
    views = json.loads(output.read_text())["views"]
    (top1,) = (view["top1"] for view in views if view["label"] == f"{SIDE}²")
    return float(top1)


def _run(*words: object) -> None:
    """A command of navit-clip."""
    command_line = [sys.executable, "-m", "navit_clip", *map(str, words)]
    if subprocess.run(command_line, check=False).returncode:
        raise UserError(f"navit-clip {words[0]} failed, see above")


main = command(
    __doc__,
    measure,
    runs={"type": Path, "required": True, "help": "folder of the data and the runs"},
    steps={"type": number(1), "default": 5000, "help": "of each run"},
    seed={"type": number(0), "default": 0, "help": "of the weights and the data"},
)

if __name__ == "__main__":
    main()
