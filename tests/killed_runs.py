"""Runs under torchrun that are killed and started again, and what they must agree in.

Two ranks with two data workers each train a tiny model; a run killed by SIGKILL at random moments
(while ranks start, in steps, while a checkpoint, an evaluation or the export is under way; a rank,
one of its data workers, or torchrun alone, whose orphans are left to themselves) must end with the
weights and logged losses of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classify_cases import classify_flags, write_labelled
from launch import Launch, launch, run_to_end, torchrun
from masked_cases import masked_flags
from tiny_run import tiny_flags, write_tiny_data

RANKS, WORKERS = 2, 2
EVALUATED = 8  # steps between evaluations
_SEED = 0  # of victims and moments
_MOMENTS = (
    "step", "checkpoint", "worker", "checkpoint", "start", "torchrun", "evaluation", "export",
)  # fmt: skip


def write_run(root: Path, *, train: int, steps: int, task: str = "contrastive") -> list[str]:
    """Writes what a tiny run needs.

    Args:
        root: Where shards and tokenizer go.
        train: Samples in the shards; two ranks see 10 to 24 in a step.
        steps: Of the run.
        task: Kind of the task.

    Returns:
        Flags of ``python -m train``, to which that of the run directory is to be added.
    """
    options: dict[str, object] = {
        "data__workers": WORKERS,
        "data__drop__kind": "beta",
        "data__drop__rate": 0.3,
        "ema__decay": 0.9,
        "checkpoint__every_steps": 3,
        "checkpoint__keep": 2,
        "log__samples": True,
        "eval__workers": 0,
    }
    if task != "contrastive":
        write_labelled(root / "train", train, shards=16)
        write_labelled(root / "held_out", 24, shards=1)
        options |= {
            "data__augment": '{"min_area": 0.3, "flip": 0.5, "hue": 0.1}',
            # Without it an image has a single patch, and a masked one is skipped, not handed out.
            "data__resolution__upscale": True,
            "data__validation": root / "held_out",
            "eval__validation__every_steps": EVALUATED,
        }
        if task == "classify":
            options["data__augment"] = '{"min_area": 0.3, "mixup": 0.5, "cutmix": 1}'
        flags_of = {"classify": classify_flags, "masked_image": masked_flags}[task]
        return flags_of(root / "train", root / "unused", steps, **options)
    write_tiny_data(root, train=train, shard_size=train // 16)
    held_out = root / "shapes/retrieval"
    evaluator = {
        "kind": "retrieval",
        "every_steps": EVALUATED,
        "images": str(held_out / "images"),
        "captions": str(held_out / "captions.json"),
    }
    return tiny_flags(
        root,
        root / "unused",
        steps,
        eval__evaluators=json.dumps({"shapes": evaluator}),
        **options,
    )


def two_ranks(flags: Sequence[str], *options: str) -> list[str]:
    """The command of a run on two ranks of this machine."""
    return torchrun(flags, "--standalone", f"--nproc-per-node={RANKS}", *options)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def read_losses(run_dir: Path) -> list[tuple[float, ...]]:
    """What must not depend on how often a run was restarted, for each step."""
    names = ("step", "loss", "grad_norm", "lr", "logit_scale", "accuracy", "examples")
    lines = [line for line in read_metrics(run_dir) if "loss" in line]  # others are evaluations
    return [tuple(line[name] for name in names if name in line) for line in lines]


def last_step(run_dir: Path) -> int:
    """The last logged step."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def _half_written(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*.partial"))


@dataclass
class Killer:
    """Kills a process of a launch at a moment of a kind.

    Attributes:
        run_dir: Of the run.
        rng: Draws victims and moments.
        steps: Of the run.
    """

    run_dir: Path
    rng: random.Random
    steps: int

    def strike(self, running: Launch, moment: str, rank: int, step: int) -> dict[str, Any]:
        """Waits for the moment and kills.

        Args:
            running: Whose process.
            moment: ``start``: while the ranks start. ``step``: at any time after step `step`.
            ``checkpoint``: while the next one after it is written. ``worker``: as ``step``, but a
            data worker. ``torchrun``: as ``step``, but torchrun. ``evaluation``: in the next one.
            ``export``: while the model is written, or soon after the last step.
            rank: Of which rank.
            step: Not before this step is logged.

        Returns:
            What was hit.
        """
        running.until(lambda: rank in running.ranks(), f"the start of rank {rank}")
        if moment == "start":
            time.sleep(self.rng.uniform(0, 4))
        elif moment == "export":
            running.until(lambda: last_step(self.run_dir) >= self.steps, "the last step")
            time.sleep(self.rng.uniform(0, 0.05))
        elif moment == "evaluation":
            running.until(lambda: last_step(self.run_dir) >= step, f"step {step}")
            running.until(lambda: last_step(self.run_dir) % EVALUATED == 0, "an evaluation")
            time.sleep(self.rng.uniform(0, 0.2))
        else:
            running.until(lambda: last_step(self.run_dir) >= step, f"step {step}")
            if moment == "checkpoint":
                running.until(lambda: _half_written(self.run_dir), "a checkpoint's begin")
                time.sleep(self.rng.uniform(0, 0.03))
            else:
                time.sleep(self.rng.uniform(0, 0.3))
        victims = running.workers(rank) if moment == "worker" else [running.ranks()[rank]]
        if moment == "torchrun":
            victims = [running.process.pid]
        os.kill(self.rng.choice(victims), signal.SIGKILL)
        return {
            "moment": moment,
            "rank": rank,
            "step": last_step(self.run_dir),
            # While ranks start, what is half-written is the leaving of the kill before.
            "half_written": [] if moment == "start" else _half_written(self.run_dir),
        }


def run_killed(flags: Sequence[str], run_dir: Path, kills: int, steps: int) -> list[dict[str, Any]]:
    """Runs to the end through so many kills, spread over the steps.

    Returns:
        What each kill hit.

    Raises:
        RuntimeError: If a run ends otherwise than it should.
    """
    rng = random.Random(_SEED)
    killer, hits = Killer(run_dir, rng, steps), []
    command, output = two_ranks([*flags, "--run_dir", str(run_dir)]), run_dir.with_suffix(".txt")
    moments = [_MOMENTS[i % len(_MOMENTS)] for i in range(kills)]
    rng.shuffle(moments)
    # Nothing is left to train after the last step.
    moments.sort(key=lambda moment: moment == "export")
    for kill, moment in enumerate(moments):
        # Not in the last steps: the run would end before it is hit.
        step = 1 + (steps - 10) * kill // kills
        with launch(command, output) as running:
            hits.append(killer.strike(running, moment, kill % RANKS, step))
            if running.wait() == 0:
                raise RuntimeError(f"the run ended well though killed: {hits[-1]}")
        print(f"kill {kill + 1}/{kills}: {hits[-1]}", flush=True)
    run_to_end(command, output)
    return hits


def agent(flags: Sequence[str], port: int, number: int) -> list[str]:
    """The command of one of two hosts, here two addresses of this machine."""
    # Sharing its store, an agent that is still there tells one that comes back nothing, and waits.
    environment = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    return environment + torchrun(
        flags,
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-id=survival",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        # A dead host is given up after two seconds, not fifteen.
        f"--rdzv-conf=is_host={1 - number},keep_alive_interval=1,keep_alive_max_attempt=2",
        f"--local-addr=127.0.0.{1 + number}",
    )


def run_agents(flags: Sequence[str], run_dir: Path, step: int) -> dict[str, Any]:
    """Trains on two agents, of which the second dies with all its processes and comes back.

    Args:
        flags: Of the run, but for its directory.
        run_dir: Of the run.
        step: When it dies.

    Returns:
        ``killed_at``, the last step logged before; ``resumed_from``, the step of the checkpoint.

    Raises:
        RuntimeError: If an agent fails; with the end of its output.
        TimeoutError: Likewise.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    flags = [*flags, "--run_dir", str(run_dir)]
    outputs = [run_dir.with_name(f"{run_dir.name}-agent-{number}.txt") for number in range(2)]
    commands = [agent(flags, port, number) for number in range(2)]
    with launch(commands[0], outputs[0]) as first:
        with launch(commands[1], outputs[1]) as second:
            first.until(lambda: last_step(run_dir) >= step, f"step {step}")
            second.ranks()
            second.kill_all()
            killed_at = last_step(run_dir)
        with launch(commands[1], outputs[1]) as second:
            for running in (first, second):
                if running.wait() != 0:
                    raise RuntimeError(f"an agent failed:\n{running.tail()}")
    said = outputs[0].read_text() + outputs[1].read_text()
    return {
        "killed_at": killed_at,
        "resumed_from": int(said.rpartition("continuing from step ")[2].split()[0]),
    }


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs exported the same model, byte for byte."""
    files = [run_dir / "model/model.safetensors" for run_dir in (one, other)]
    return files[0].read_bytes() == files[1].read_bytes()
