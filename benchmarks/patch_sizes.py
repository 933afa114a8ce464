r"""One model for patches of 8, 16 and 32 pixels beside models of one size, on generated shapes.

Four models are trained by the recipe ``flexivit_shapes`` for equally many steps: one whose samples
draw their size of patches, as FlexiViT, and one for each size. Then all are evaluated zero-shot on
squares of 192 pixels, the one of several sizes at each of them, and that of 16 pixels also at 8 and
32, with its kernel resized. Runs that were begun go on, finished ones are only evaluated.

``top1`` holds accuracy by model and by size of patches; ``gain`` how many points the model of
several sizes is above that of 16 pixels, ``behind`` how many it is below the model of that size
alone.

    navit-clip data shapes --output data/shapes --train 60000
    navit-clip data train_tokenizer --shards data/shapes/train --vocab-size 256 --model-type bpe \
      --captions json.captions json.names json.short --output data/shapes/tokenizer.model
    python -m benchmarks.patch_sizes --shapes data/shapes --runs runs/patch_sizes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.command import command
from navit_clip.commands import number
from navit_clip.errors import UserError

SIZES, SIDE, OWN = (8, 16, 32), 192, 16
SEVERAL = "several"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates."""
    top1: dict[str, dict[int, float]] = {}
    for model in (SEVERAL, *map(str, SIZES)):
        _train(args, model)
        sizes = SIZES if model in (SEVERAL, str(OWN)) else [int(model)]
        top1[model] = {size: _evaluate(args, model, size) for size in sizes}
    several, own = top1[SEVERAL], top1[str(OWN)]
    return {
        "top1": top1,
        "gain": {size: 100 * (several[size] - own[size]) for size in SIZES if size != OWN},
        "behind": {size: 100 * (top1[str(size)][size] - several[size]) for size in SIZES},
    }


def _train(args: argparse.Namespace, model: str) -> None:
    flags = {
        "run_dir": args.runs / model,
        "steps": args.steps,
        "tokenizer.path": args.shapes / "tokenizer.model",
        "data.train": args.shapes / "train",
        "seed": args.seed,
    }
    if model != SEVERAL:
        flags |= {"task.model.image.patch_size": model, "data.resolution.patch_sizes": "{}"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    _run("train", "--config", "flexivit_shapes", *words)


def _evaluate(args: argparse.Namespace, model: str, size: int) -> float:
    output = args.runs / model / f"zeroshot-{size}.json"
    _run(
        "eval",
        "zeroshot",
        *("--model", str(args.runs / model / "model"), "--patch-size", str(size)),
        *("--data", str(args.shapes / "zeroshot")),
        *("--templates", str(args.shapes / "templates.txt")),
        *("--square", str(SIDE), "--output", str(output)),
    )
    views = json.loads(output.read_text())["views"]
    (top1,) = (view["top1"] for view in views if view["label"] == f"{SIDE}²")
    return float(top1)


def _run(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", "navit_clip", *words], check=False).returncode:
        raise UserError(f"navit-clip {' '.join(words)} failed, see above")


main = command(
    __doc__,
    measure,
    shapes={"type": Path, "required": True, "help": "folder of shapes, with tokenizer.model"},
    runs={"type": Path, "required": True, "help": "folder of the runs"},
    steps={"type": number(1), "default": 1500, "help": "of each run"},
    seed={"type": number(0), "default": 0, "help": "of the weights and the data"},
)

if __name__ == "__main__":
    main()
