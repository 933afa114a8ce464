"""Variants of a training step, run in turn on the same pairs, each trial in a process of its own.

Memory is so counted for each, and no variant inherits what another left in an allocator; in turn,
so that a machine that slows down slows all of them. Everything that a data loader does is done
before the clock runs.
"""

from __future__ import annotations

import argparse
import math
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, multiprocessing

from benchmarks.command import default_device
from benchmarks.measure import flop_counter, in_processes, in_turn, resident_mb
from benchmarks.needs import need_proc, need_projects
from benchmarks.pairs import RealPair, draw_batches, read_samples
from benchmarks.peers import PROJECTS, Towers
from benchmarks.sizes import WIDTHS
from navit_clip.losses.contrastive import softmax_contrastive_loss

Part = Literal["step", "image", "text"]
_TIMEOUT_S = 7200


@dataclass(frozen=True)
class Variant:
    """One line of a comparison.

    Attributes:
        project: A name of `benchmarks.peers.PROJECTS`.
        part: ``step``: both towers, loss, backward pass and AdamW. ``image`` or ``text``: one
            tower forward and backward.
        drop: Mean token drop.
        precision: ``fp32``, or ``bf16`` by autocast with float32 weights.
        compiled: With what the project offers to compile compiled.
    """

    project: str
    part: Part = "step"
    drop: float = 0.0
    precision: str = "fp32"
    compiled: bool = False

    @property
    def name(self) -> str:
        """Unique among those of one precision."""
        drop = f"_drop{self.drop * 100:.0f}" if self.drop else ""
        part = "" if self.part == "step" else f"_{self.part}"
        return f"{self.project}{part}{drop}{'_compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Workload:
    """What all variants run on.

    Attributes:
        size: A name of `benchmarks.sizes.WIDTHS`.
        pairs: Pairs per step.
        shards: Tars of photos; none takes those beside the checkout.
        batches: Different batches.
        device: ``cpu`` or ``cuda``.
    """

    size: str
    pairs: int
    shards: Sequence[str] = ()
    batches: int = 2
    device: str = "cpu"


# The flags of `benchmarks.command` that describe a workload.
WORKLOAD_FLAGS = ("size", "pairs", "rounds", "precision", "shards")


def workload_of(args: argparse.Namespace) -> Workload:
    """What `WORKLOAD_FLAGS` describe."""
    return Workload(args.size, args.pairs, args.shards, device=default_device())


def compare(
    variants: Sequence[Variant], workload: Workload, rounds: int
) -> dict[Variant, dict[str, Any]]:
    """Runs all variants in turn, round after round.

    A trial is a new process, the only one at work and the only one with a model: beside others a
    variant that needs much memory is slower than alone (benchmarks/LOG.md). It takes one step on
    every batch to warm up, in which operations are counted, and then one on every batch, measured.

    Args:
        variants: Distinct ones.
        workload: What they run on.
        rounds: Measured rounds.

    Returns:
        By variant: ``seconds`` a step, the median of the rounds, and ``rounds``, those of each;
        ``pairs_per_s``, ``real_tokens_per_s`` (patches and caption tokens of the pairs as this
        project's loader makes them; of a tower alone its own), ``flops_per_pair`` (matrix products
        and attention, forward and backward; compiled code's cannot be counted and are NaN),
        ``peak_share``, the median of the rounds' fractions of what a large matrix product reached
        in them; ``peak_mb`` above what the process held before its first step.

    Raises:
        UserError: If there are no photos, a peer is missing, or a variant cannot run.
    """
    need_projects(variant.project for variant in variants)
    if workload.device == "cpu":
        need_proc()
    threads = torch.get_num_threads()
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        # Drawing holds more than a gigabyte of photos, so it has a process of its own, which has
        # ended when the first trial begins.
        files = {variant.drop: Path(name, f"{variant.drop}.pickle") for variant in variants}
        in_processes(spawned, _draw, [(workload, files)], "drawing the batches")

        def trial(variant: Variant) -> list[dict[str, float]]:
            values = (variant, workload, files[variant.drop], threads)
            return in_processes(spawned, run_trial, [values], variant.name, _TIMEOUT_S)[0]

        calls: dict[Any, Callable[[], Any]] = {
            **{v.precision: partial(matmul_peak, workload.device, v.precision) for v in variants},
            **{variant: partial(trial, variant) for variant in variants},
        }
        results = in_turn(calls, rounds, warm_up=False)
    return {v: _summary(results[v], results[v.precision]) for v in variants}


def _draw(workload: Workload, files: Mapping[float, Path]) -> None:
    """Writes the batches, a file for each mean token drop."""
    samples = read_samples(workload.shards)
    for drop, path in files.items():
        batches = list(draw_batches(samples, workload.pairs, workload.batches, drop))
        with path.open("wb") as file:
            pickle.dump(batches, file)


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """How many times as fast, the median of the rounds: what slows a round slows both."""
    rounds = zip(ours["rounds"], theirs["rounds"], strict=True)
    return statistics.median(peer / own for own, peer in rounds)


def matmul_peak(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best


def _summary(trials: Sequence[list[dict[str, float]]], peaks: Sequence[float]) -> dict[str, Any]:
    facts = [fact for trial in trials for fact in trial]
    tokens = statistics.mean(fact["real_tokens"] for fact in facts)
    flops = statistics.mean(fact["flops"] for fact in facts)
    pairs = facts[0]["pairs"]
    rounds = [statistics.mean(fact["seconds"] for fact in trial) for trial in trials]
    seconds = statistics.median(rounds)
    reached = [flops / step / peak for step, peak in zip(rounds, peaks, strict=True)]
    return {
        "seconds": seconds,
        "pairs_per_s": pairs / seconds,
        "real_tokens_per_s": tokens / seconds,
        "image_tokens_per_pair": statistics.mean(f["image_tokens"] for f in facts) / pairs,
        "text_tokens_per_pair": statistics.mean(f["text_tokens"] for f in facts) / pairs,
        "flops_per_pair": flops / pairs,
        "peak_share": statistics.median(reached),
        "matmul_peak": statistics.median(peaks),
        "peak_mb": max(fact["peak_mb"] for fact in facts),
        "kb_per_token": max(fact["peak_mb"] * 1024 / fact["real_tokens"] for fact in facts),
        "rounds": rounds,
    }


def run_trial(
    variant: Variant, workload: Workload, file: Path, threads: int
) -> list[dict[str, float]]:
    """The measured steps of one trial, one on every batch.

    Args:
        variant: Which.
        workload: On what.
        file: Its batches, from `_draw`.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(workload.device)
    towers = PROJECTS[variant.project](WIDTHS[workload.size]).to(device)
    if variant.compiled:
        towers.compile_blocks()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-4, fused=True)

    def step(batch: Any) -> None:
        half = variant.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = _forward(variant, towers, batch)
        loss.backward()
        if variant.part == "step":
            optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def warm_up(batch: Any) -> float:
        """A step's operations; of a compiled variant NaN, nothing compiles under the counter."""
        if variant.compiled:
            step(batch)
            return math.nan
        with flop_counter() as counter:
            step(batch)
        return counter.get_total_flops()

    # Kept: freed pairs would be room within the highest memory before the first step, and the
    # step's own would seem smaller.
    with file.open("rb") as pickled:
        drawn: list[list[RealPair]] = pickle.load(pickled)
    batches = [towers.prepare(pairs, device) for pairs in drawn]
    held_mb = _memory_mb(device)
    flops = [warm_up(batch) for batch in batches]
    found = []
    for number, pairs in enumerate(drawn):
        begin = time.perf_counter()
        step(batches[number])
        seconds = time.perf_counter() - begin
        sizes = {
            "image_tokens": sum(real.pair.lengths[0] for real in pairs),
            "text_tokens": sum(real.pair.lengths[1] for real in pairs),
        }
        found.append(
            {
                **sizes,
                "pairs": len(pairs),
                "seconds": seconds,
                "flops": flops[number],
                "real_tokens": sizes.get(f"{variant.part}_tokens", sum(sizes.values())),
                "peak_mb": _memory_mb(device) - held_mb,
            }
        )
    return found


def _forward(variant: Variant, towers: Towers, batch: Any) -> Tensor:
    if variant.part == "step":
        image_ED, text_ED = towers(batch)
        ours = variant.project == "navit_clip"
        loss = softmax_contrastive_loss if ours else open_clip.ClipLoss()
        return loss(image_ED, text_ED, towers.scale.exp())
    embed = towers.embed_images if variant.part == "image" else towers.embed_texts
    return embed(batch).float().square().sum()


def _memory_mb(device: torch.device) -> float:
    """The highest so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mb("VmHWM")
