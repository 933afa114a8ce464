"""From shards to weights: this project's trainer beside open_clip's, the same command each.

``python -m train`` and ``open_clip_train.main`` read the same shards with one data worker each and
train towers of equal widths for equally many steps of equally many pairs, to a checkpoint; this
project at native sizes, side ~ U(64, 256), open_clip on random crops of 224×224 and 77 slots. They
run one after the other, round after round, on the same threads.

``pairs_per_s`` and ``data_wait``, the fraction of the time in which the trainer waited for data,
are from the second step on, by each trainer's own log; ``seconds`` is the whole command, its
imports and checkpoints included. ``ratio_open_clip`` compares ``pairs_per_s``.

open_clip's trainer needs webdataset up to 0.2.86, so give it an environment of its own:

    python -m venv peer && peer/bin/pip install "open_clip_torch[training]"
    python -m benchmarks.end_to_end --peer-python peer/bin/python --output out.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import at_least, command_line, default_device, run
from benchmarks.comparison import WORKLOAD_FLAGS
from benchmarks.measure import in_turn
from benchmarks.needs import need_peer
from benchmarks.pairs import (
    COCO,
    MAX_SIDE,
    MAX_TOKENS,
    MIN_SIDE,
    draw_batches,
    read_samples,
)
from benchmarks.sizes import CONTEXT, WIDTHS
from navit_clip.data.patterns import expand_shards
from navit_clip.errors import UserError

ROOT = Path(__file__).parents[1]
PEER_SCRIPT = Path(__file__).with_name("open_clip_peer.py")
# `packing: constant` needs some room, see `navit_clip.data.packer.Packer`.
ROOM = 1.02
_PEER_LINE = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+),")


def our_command(
    args: argparse.Namespace, shards: Sequence[str], budget: Mapping[str, Any], directory: Path
) -> list[str]:
    """``python -m train`` with its configuration, written into the directory.

    Args:
        args: The flags' values.
        shards: Tar files.
        budget: From `find_budget`.
        directory: Of the run.
    """
    config = {
        "run_dir": str(directory / "run"),
        "steps": args.steps,
        "tokenizer": {"kind": "open_clip"},
        "task": {"kind": "contrastive", "model": asdict(WIDTHS[args.size].config())},
        "data": {
            "train": list(shards),
            "resolution": {"min_side": MIN_SIDE, "max_side": MAX_SIDE, "max_tokens": MAX_TOKENS},
            "budget": dict(budget),
            "packing": "constant",
            "pad_to_budget": False,
            "workers": 1,
        },
        "log": {"every_steps": 1},
        "precision": args.precision,
        "device": default_device(),
    }
    file = directory / "run.yaml"
    file.write_text(json.dumps(config))  # YAML is a superset of JSON
    return [sys.executable, "-m", "train", "--config", str(file)]


def peer_command(args: argparse.Namespace, shards: Sequence[str], directory: Path) -> list[str]:
    """open_clip's trainer with a model of the same widths, likewise."""
    (directory / "models").mkdir()
    model = directory / "models/equal-widths.json"
    model.write_text(json.dumps(WIDTHS[args.size].open_clip_config()))
    flags = {
        "model": "equal-widths",
        "train-data": "::".join(shards),
        "dataset-type": "webdataset",
        "train-num-samples": args.pairs * args.steps,
        "batch-size": args.pairs,
        "epochs": 1,
        "warmup": 1,
        "workers": 1,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[args.precision],
        "device": default_device(),
        "log-every-n-steps": 1,
        "logs": directory,
        "name": "run",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [args.peer_python, str(PEER_SCRIPT), "train", str(directory / "models"), *words]


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
    seconds = time.perf_counter() - begin
    if status != 0 or not (directory / weights).is_file():
        said = output.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
        raise UserError(f"{' '.join(command[:3])} … failed with status {status}: {last}")
    return seconds


def read_ours(directory: Path) -> dict[str, float]:
    """Pairs per second, fraction of waiting and padding from the second step on."""
    text = (directory / "run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()][1:]
    seconds = [line["examples"] / line["examples_per_s"] for line in lines]
    waits = [line["data_wait"] * s for line, s in zip(lines, seconds, strict=True)]
    return {
        "pairs_per_s": sum(line["examples"] for line in lines) / sum(seconds),
        "data_wait": sum(waits) / sum(seconds),
        "padding": statistics.mean(line["padding"] for line in lines),
        "pairs": sum(line["examples"] for line in lines),
    }


def read_peer(directory: Path, pairs: int) -> dict[str, float]:
    """Pairs per second and fraction of waiting from the second step on.

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


def find_budget(shards: Sequence[str], pairs: int) -> dict[str, Any]:
    """Token budgets that hold so many pairs, from a few hundred of the shards'."""
    samples = read_samples(shards)
    count = min(len(samples), max(pairs, 512))
    (drawn,) = draw_batches(samples, count, 1)
    image = sum(real.pair.lengths[0] for real in drawn) / count
    text = sum(real.pair.lengths[1] for real in drawn) / count
    return {
        "tokens": {
            "image": max(MAX_TOKENS, round(ROOM * pairs * image)),
            "text": max(CONTEXT, round(ROOM * pairs * text)),
        },
        "max_examples": pairs,
    }


def train(
    command_of: Callable[[Path], list[str]],
    weights: str,
    read: Callable[[Path], dict[str, float]],
) -> dict[str, float]:
    """One training in a directory of its own, and what it logged.

    Args:
        command_of: Makes the command.
        weights: File below the directory that it writes.
        read: Reads its log.
    """
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        seconds = run_command(command_of(Path(name)), Path(name), weights)
        return {"seconds": seconds, **read(Path(name))}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both trainers, in turn."""
    peer_versions = need_peer(args.peer_python)
    budget = find_budget(args.shards, args.pairs)
    shards = expand_shards(args.shards or [COCO])
    shards = [str(Path(shard).resolve()) for shard in shards]
    trainers = {
        "navit_clip": partial(
            train,
            partial(our_command, args, shards, budget),
            "run/model/model.safetensors",
            read_ours,
        ),
        "open_clip": partial(
            train,
            partial(peer_command, args, shards),
            "run/checkpoints/epoch_1.pt",
            partial(read_peer, pairs=args.pairs),
        ),
    }
    results = {
        name: {field: statistics.median(found[field] for found in rounds) for field in rounds[0]}
        for name, rounds in in_turn(trainers, args.rounds, warm_up=False).items()
    }
    ours, peer = results["navit_clip"], results["open_clip"]
    return {
        "ratio_open_clip": ours["pairs_per_s"] / peer["pairs_per_s"],
        "ratio_whole_command": peer["seconds"] / ours["seconds"],
        "data_wait": ours["data_wait"],
        "padding": ours["padding"],
        "budget": budget,
        "open_clip_versions": peer_versions,
        **results,
    }


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, *WORKLOAD_FLAGS, "peer-python", rounds=2)
    parser.add_argument(
        "--steps", type=at_least(2), default=8, help="of each training; the first is not counted"
    )
    run(parser, measure)


if __name__ == "__main__":
    main()
