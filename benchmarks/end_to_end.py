"""From shards to weights: this project's trainer beside open_clip's, the same command each.

``python -m train`` and ``open_clip_train.main`` read the same shards with one data worker each and
train towers of equal widths for equally many steps of equally many pairs, to a checkpoint; this
project at native sizes, side ~ U(64, 256), open_clip on random crops of 224×224 and 77 slots. They
run one after the other, round after round, on the same threads.

``pairs_per_s`` and ``data_wait``, the share of the time in which the trainer waited for data, are
from the second step on, by each trainer's own log; ``seconds`` is the whole command, its imports
and checkpoints included. ``ratio_open_clip`` compares ``pairs_per_s``.

open_clip's trainer needs webdataset up to 0.2.86, so give it an environment of its own:

    python -m venv peer && peer/bin/pip install "open_clip_torch[training]"
    python -m benchmarks.end_to_end --peer-python peer/bin/python --output out.json
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import report
from benchmarks.pairs import CONTEXT, PATCH, REAL_DATA, SQUARE, draw_batches, read_samples
from benchmarks.peers import VOCABULARY, WIDTHS, Widths
from benchmarks.step import course_arguments, course_of
from navit_clip.data.shards import expand_shards
from navit_clip.errors import UserError, one_line_errors

ROOT = Path(__file__).parents[1]
PEER_SCRIPT = Path(__file__).with_name("end_to_end_peer.py")
MIN_SIDE, MAX_SIDE = 64, 256
MAX_TOKENS = (MAX_SIDE // PATCH) ** 2
# `packing: constant` needs some room, see `navit_clip.data.packer.Packer`.
ROOM = 1.02
NEWEST_WEBDATASET = (0, 2, 86)  # that open_clip allows
_VERSIONS = (
    "import json, open_clip_train.main; from importlib.metadata import version; "
    "print(json.dumps({n: version(n) for n in ('open_clip_torch', 'webdataset', 'torch')}))"
)
_PEER_LINE = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+),")


@dataclass(frozen=True)
class Run:
    """What both trainers are told.

    Attributes:
        shards: Tar files.
        widths: Of the towers.
        pairs: Of a step.
        steps: How many.
        precision: ``fp32`` or ``bf16``.
        device: ``cpu`` or ``cuda``.
    """

    shards: Sequence[str]
    widths: Widths
    pairs: int
    steps: int
    precision: str
    device: str


def peer_versions(python: str) -> dict[str, str]:
    """Of the libraries of open_clip's trainer.

    Raises:
        UserError: If the interpreter does not have it, or a webdataset that it cannot use.
    """
    try:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise UserError(
            f"--peer-python {python} does not run open_clip's trainer "
            f"({said.strip().splitlines()[-1]}): python -m venv peer && peer/bin/pip install "
            '"open_clip_torch[training]", then --peer-python peer/bin/python'
        ) from error
    if tuple(int(n) for n in re.findall(r"\d+", found["webdataset"])[:3]) > NEWEST_WEBDATASET:
        raise UserError(
            f"open_clip's trainer cannot use webdataset {found['webdataset']}: in the environment "
            f"of {python}, pip install webdataset==0.2.86"
        )
    return found


def our_command(run: Run, budget: Mapping[str, int], directory: Path) -> list[str]:
    """``python -m train`` with its configuration, written into the directory."""
    widths = run.widths
    config = {
        "run_dir": str(directory / "run"),
        "steps": run.steps,
        "tokenizer": {"kind": "open_clip"},
        "model": {
            "embed_dim": widths.embed,
            "image": {
                "patch_size": PATCH,
                "encoder": _encoder(widths.image, widths.image_depth, widths.image_heads),
            },
            "text": {
                "vocab_size": VOCABULARY,
                "context_length": CONTEXT,
                "encoder": _encoder(widths.text, widths.text_depth, widths.text_heads),
            },
        },
        "data": {
            "train": list(run.shards),
            "resolution": {"min_side": MIN_SIDE, "max_side": MAX_SIDE, "max_tokens": MAX_TOKENS},
            "budget": dict(budget),
            "packing": "constant",
            "pad_to_budget": False,
            "workers": 1,
        },
        "log": {"every_steps": 1},
        "precision": run.precision,
        "device": run.device,
    }
    file = directory / "run.yaml"
    file.write_text(json.dumps(config))  # YAML is a superset of JSON
    return [sys.executable, "-m", "train", "--config", str(file)]


def _encoder(width: int, depth: int, heads: int) -> dict[str, int]:
    return {"width": width, "depth": depth, "heads": heads}


def peer_command(run: Run, python: str, directory: Path) -> list[str]:
    """open_clip's trainer with a model of the same widths."""
    widths = run.widths
    model = {
        "embed_dim": widths.embed,
        "vision_cfg": {
            "image_size": SQUARE,
            "layers": widths.image_depth,
            "width": widths.image,
            "patch_size": PATCH,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": widths.text,
            "heads": widths.text_heads,
            "layers": widths.text_depth,
        },
    }
    (directory / "models").mkdir()
    (directory / "models/equal-widths.json").write_text(json.dumps(model))
    flags = {
        "model": "equal-widths",
        "train-data": "::".join(run.shards),
        "dataset-type": "webdataset",
        "train-num-samples": run.pairs * run.steps,
        "batch-size": run.pairs,
        "epochs": 1,
        "warmup": 1,
        "workers": 1,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[run.precision],
        "device": run.device,
        "log-every-n-steps": 1,
        "logs": directory,
        "name": "run",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [python, str(PEER_SCRIPT), str(directory / "models"), *words]


def run_command(command: Sequence[str], directory: Path, weights: str) -> float:
    """Runs a trainer to its end on as many threads as this process has.

    Args:
        command: Of the trainer.
        directory: Gets what it prints.
        weights: File below the directory that it must have written.

    Returns:
        Seconds.

    Raises:
        UserError: If it fails; with the last line it printed.
    """
    output = directory / "output.txt"
    begin = time.perf_counter()
    try:
        with output.open("w") as file:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}") from error
    seconds = time.perf_counter() - begin
    if status != 0 or not (directory / weights).is_file():
        said = output.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
        raise UserError(f"{' '.join(command[:3])} … failed with status {status}: {last}")
    return seconds


def read_ours(directory: Path) -> dict[str, float]:
    """Pairs per second, share of waiting and padding from the second step on."""
    text = (directory / "run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()][1:]
    seconds = [line["pairs"] / line["images_per_s"] for line in lines]
    waits = [line["data_wait"] * s for line, s in zip(lines, seconds, strict=True)]
    return {
        "pairs_per_s": sum(line["pairs"] for line in lines) / sum(seconds),
        "data_wait": sum(waits) / sum(seconds),
        "padding": statistics.mean(line["padding"] for line in lines),
        "pairs": sum(line["pairs"] for line in lines),
    }


def read_peer(directory: Path, pairs: int) -> dict[str, float]:
    """Pairs per second and share of waiting from the second step on.

    Args:
        directory: Where it ran.
        pairs: Of each step.
    """
    found = _PEER_LINE.findall((directory / "run/out.log").read_text())[1:]  # one line a step
    seconds = sum(float(batch) for _, batch in found)
    return {
        "pairs_per_s": pairs * len(found) / seconds,
        "data_wait": sum(float(wait) for wait, _ in found) / seconds,
        "pairs": pairs * len(found),
    }


def find_budget(shards: Sequence[str], pairs: int) -> dict[str, int]:
    """Token budgets that hold so many pairs, from a few hundred of the shards'."""
    samples = read_samples(shards)
    count = min(len(samples), max(pairs, 512))
    (drawn,) = draw_batches(samples, count, 1, min_side=MIN_SIDE, max_side=MAX_SIDE)
    image = sum(real.pair.image_length for real in drawn) / count
    text = sum(real.pair.text_length for real in drawn) / count
    return {
        "image_tokens": max(MAX_TOKENS, round(ROOM * pairs * image)),
        "text_tokens": max(CONTEXT, round(ROOM * pairs * text)),
        "max_pairs": pairs,
    }


def train_once(run: Run, budget: Mapping[str, int], peer_python: str) -> dict[str, dict[str, Any]]:
    """Both trainers, one after the other."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        ours, peer = (Path(name) / way for way in ("navit_clip", "open_clip"))
        for directory in (ours, peer):
            directory.mkdir()
        command = our_command(run, budget, ours)
        seconds = run_command(command, ours, "run/model/model.safetensors")
        found["navit_clip"] = {"seconds": seconds, **read_ours(ours)}
        command = peer_command(run, peer_python, peer)
        seconds = run_command(command, peer, "run/checkpoints/epoch_1.pt")
        found["open_clip"] = {"seconds": seconds, **read_peer(peer, run.pairs)}
    return found


def main() -> None:
    """The command line."""
    parser = course_arguments(__doc__)
    parser.set_defaults(rounds=2)
    parser.add_argument("--steps", type=int, default=8, help="steps of each training, at least 2")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has open_clip's trainer"
    )
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one is not counted")
    course, precision = course_of(args)
    with one_line_errors("benchmarks.end_to_end"):
        peer_has = peer_versions(args.peer_python)
        budget = find_budget(args.shards, args.pairs)
        run = Run(
            [
                str(Path(s).resolve())
                for s in expand_shards(args.shards or [str(REAL_DATA / "coco-train")])
            ],
            WIDTHS[args.size],
            args.pairs,
            args.steps,
            precision,
            course.device,
        )
        rounds = [train_once(run, budget, args.peer_python) for _ in range(args.rounds)]
    results = {
        way: {field: statistics.median(r[way][field] for r in rounds) for field in rounds[0][way]}
        for way in rounds[0]
    }
    ours, peer = results["navit_clip"], results["open_clip"]
    report(
        {
            "ratio_open_clip": ours["pairs_per_s"] / peer["pairs_per_s"],
            "ratio_whole_command": peer["seconds"] / ours["seconds"],
            "data_wait": ours["data_wait"],
            "padding": ours["padding"],
            "size": args.size,
            "precision": run.precision,
            "pairs": args.pairs,
            "steps": args.steps,
            "rounds": args.rounds,
            "budget": budget,
            "open_clip_versions": peer_has,
            **results,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
