"""From shards to weights: this project's trainer beside open_clip's, the same command each.

``python -m train`` and ``open_clip_train.main`` read the same shards with as many workers (one,
beside a GPU one per core) and train towers of equal widths for equally many steps of equally many
pairs, to a checkpoint; this project at native sizes, side ~ U(64, 256), open_clip on random crops
of 224×224 and 77 slots. They run one after the other, round after round, on the same threads.

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
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command, default_device
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
from navit_clip.commands import number
from navit_clip.data.patterns import expand_shards
from navit_clip.errors import UserError

ROOT = Path(__file__).parents[1]
PEER_SCRIPT = Path(__file__).with_name("open_clip_peer.py")
# `packing: constant` needs some room, see `navit_clip.data.packer.Packer`.
ROOM = 1.02
_PEER_LINE = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+),")


def _workers() -> int:
    """Reader processes: all cores beside a GPU; beside a CPU that computes, one."""
    return (os.cpu_count() or 1) if default_device() == "cuda" else 1


def train_ours(
    args: argparse.Namespace, shards: Sequence[str], budget: dict[str, Any]
) -> dict[str, float]:
    """One run of ``python -m train``, and what it logged from the second step on."""
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        directory = Path(name)
        config = {
            "run_dir": str(directory / "run"),
            "steps": args.steps,
            "tokenizer": {"kind": "open_clip"},
            "task": {"kind": "contrastive", "model": asdict(WIDTHS[args.size].config())},
            "data": {
                "train": list(shards),
                "resolution": {
                    "min_side": MIN_SIDE,
                    "max_side": MAX_SIDE,
                    "max_tokens": MAX_TOKENS,
                },
                "budget": budget,
                "packing": "constant",
                "pad_to_budget": False,
                "workers": _workers(),
            },
            "log": {"every_steps": 1},
            "precision": args.precision,
            "device": default_device(),
        }
        file = directory / "run.yaml"
        file.write_text(json.dumps(config))  # YAML is a superset of JSON
        seconds = run_trainer(
            [sys.executable, "-m", "train", "--config", str(file)],
            directory / "run/model/model.safetensors",
        )
        text = (directory / "run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()][1:]
    pairs = sum(line["examples"] for line in lines)
    times = [line["examples"] / line["examples_per_s"] for line in lines]
    waits = [line["data_wait"] * time for line, time in zip(lines, times, strict=True)]
    return {
        "seconds": seconds,
        "pairs_per_s": pairs / sum(times),
        "data_wait": sum(waits) / sum(times),
        "padding": statistics.mean(line["padding"] for line in lines),
        "pairs": pairs,
    }


def train_peer(args: argparse.Namespace, shards: Sequence[str]) -> dict[str, float]:
    """One run of open_clip's trainer on a model of the same widths, likewise."""
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        directory = Path(name)
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
            "workers": _workers(),
            "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[args.precision],
            "device": default_device(),
            "log-every-n-steps": 1,
            "logs": directory,
            "name": "run",
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        seconds = run_trainer(
            [args.peer_python, str(PEER_SCRIPT), "train", str(directory / "models"), *words],
            directory / "run/checkpoints/epoch_1.pt",
        )
        log = (directory / "run/out.log").read_text()
    return {"seconds": seconds, **read_peer(log, args.pairs)}


def read_peer(log: str, pairs: int) -> dict[str, float]:
    """Pairs per second and fraction of waiting from the second step on, of so many pairs each."""
    found = _PEER_LINE.findall(log)[1:]  # one line a step
    seconds = sum(float(batch) for _, batch in found)
    return {
        "pairs_per_s": pairs * len(found) / seconds,
        "data_wait": sum(float(wait) for wait, _ in found) / seconds,
        "pairs": pairs * len(found),
    }


def run_trainer(trainer: Sequence[str], weights: Path) -> float:
    """Seconds of a trainer, run to its end on as many threads as this process has.

    Raises:
        UserError: If it fails or has not written its weights; with the last line it printed.
    """
    begin = time.perf_counter()
    done = subprocess.run(
        trainer,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    seconds = time.perf_counter() - begin
    if done.returncode != 0 or not weights.is_file():
        last = (done.stdout.strip() or "nothing").splitlines()[-1]
        status = f"status {done.returncode}"
        raise UserError(f"{' '.join(trainer[:3])} … failed with {status}: {last}")
    return seconds


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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both trainers, in turn."""
    peer_versions = need_peer(args.peer_python)
    budget = find_budget(args.shards, args.pairs)
    shards = [str(Path(shard).resolve()) for shard in expand_shards(args.shards or [COCO])]
    trainers = {
        "navit_clip": partial(train_ours, args, shards, budget),
        "open_clip": partial(train_peer, args, shards),
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


main = command(
    __doc__,
    measure,
    *WORKLOAD_FLAGS,
    "peer-python",
    rounds={"default": 2},
    steps={
        "type": number(2),
        "default": 8,
        "help": "of each training; the first is not counted",
    },
)


if __name__ == "__main__":
    main()
