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
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, multiprocessing

from benchmarks.command import default_device
from benchmarks.measure import flop_counter, in_processes, in_turn, peak_mb, synchronize
from benchmarks.needs import need_proc
from benchmarks.pairs import RealPair, draw_batches, read_samples
from benchmarks.peers import PROJECTS, Towers
from benchmarks.sizes import WIDTHS

# The flags of `benchmarks.command` that describe what all variants run on.
WORKLOAD_FLAGS = ("size", "pairs", "rounds", "precision", "shards")
BATCHES = 2  # different ones
Part = Literal["step", "image", "text"]


@dataclass(frozen=True)
class Variant:
    """One line of a comparison.

    Attributes:
        project: A name of `benchmarks.peers.PROJECTS`.
        part: ``step``: both towers, loss, backward pass and AdamW. ``image`` or ``text``: one
            tower forward and backward.
        drop: Mean token drop.
        precision: ``fp32``, or ``bf16`` by autocast with float32 weights; the workload's if not
            given.
        compiled: With what the project offers to compile compiled.
        source: A folder whose packages come before installed ones.
    """

    project: str
    part: Part = "step"
    drop: float = 0.0
    precision: str = ""
    compiled: bool = False
    source: str = ""

    @property
    def name(self) -> str:
        """Unique among those of one precision."""
        drop = f"_drop{self.drop * 100:.0f}" if self.drop else ""
        part = "" if self.part == "step" else f"_{self.part}"
        return f"{self.project}{part}{drop}{'_compiled' if self.compiled else ''}"


def compare(
    own: Variant, ratios: Mapping[str, tuple[Variant, Variant]], workload: argparse.Namespace
) -> dict[str, Any]:
    """Runs all variants in turn, round after round.

    A trial is a new process, the only one at work and the only one with a model: beside others a
    variant that needs much memory is slower than alone (benchmarks/LOG.md). It takes one step on
    every batch to warm up, in which operations are counted, and then one on every batch, measured.

    Args:
        own: This project's, which is run whatever `ratios` there are.
        ratios: Pairs of variants by the field that says how many times as fast the first is, the
            median of the rounds': what slows a round slows both.
        workload: The values of `WORKLOAD_FLAGS`.

    Returns:
        The ratios, and by variant: ``seconds`` a step, the median of the rounds, and ``rounds``,
        those of each; ``pairs_per_s``; ``real_tokens_per_s``, patches and caption tokens, of a
        tower alone its own; ``flops_per_pair``, matrix products and attention, forward and backward
        (a compiled variant's are those of the same one uncompiled, whose kernels can be counted);
        ``peak_share``, the median of the rounds' fractions of what a large matrix product reached
        in them; ``peak_mb`` above what the process held before its first step.

    Raises:
        UserError: If there are no photos, or a variant cannot run.
    """
    device = torch.device(default_device())
    if device.type == "cpu":
        need_proc()
    threads = torch.get_num_threads()
    spawned = multiprocessing.get_context("spawn")

    def settle(variant: Variant) -> Variant:
        return replace(variant, precision=variant.precision or workload.precision)

    pairs = {field: (settle(ours), settle(theirs)) for field, (ours, theirs) in ratios.items()}
    variants = dict.fromkeys((settle(own), *chain.from_iterable(pairs.values())))
    with tempfile.TemporaryDirectory() as name:
        # Drawing holds more than a gigabyte of photos, so it has a process of its own, which has
        # ended when the first trial begins.
        files = {variant.drop: Path(name, f"{variant.drop}.pickle") for variant in variants}
        in_processes(spawned, _draw, [(workload, files)], "drawing the batches")

        def trial(variant: Variant) -> list[dict[str, float]]:
            values = (variant, workload.size, device, files[variant.drop], threads)
            return in_processes(spawned, run_trial, [values], variant.name)[0]

        calls: dict[Any, Callable[[], Any]] = {
            **{v.precision: partial(matmul_peak, device.type, v.precision) for v in variants},
            **{variant: partial(trial, variant) for variant in variants},
        }
        trials = in_turn(calls, workload.rounds, warm_up=False)
    results = {v: _summary(trials[v], trials[v.precision]) for v in variants}
    found: dict[str, Any] = {}
    for field, (ours, theirs) in pairs.items():
        rounds = zip(results[ours]["rounds"], results[theirs]["rounds"], strict=True)
        found[field] = statistics.median(slow / fast for fast, slow in rounds)
    for variant, result in results.items():
        if variant.compiled:
            eager = results[replace(variant, compiled=False)]
            flops = eager["flops_per_pair"]
            reached = flops * result["pairs_per_s"] / eager["matmul_peak"]
            result |= {"flops_per_pair": flops, "peak_share": reached}
        other = "" if variant.precision == workload.precision else f"_{variant.precision}"
        found[variant.name + other] = result
    return found


def _draw(workload: argparse.Namespace, files: Mapping[float, Path]) -> None:
    """Writes the batches, a file for each mean token drop."""
    samples = read_samples(workload.shards)
    for drop, path in files.items():
        batches = list(draw_batches(samples, workload.pairs, BATCHES, drop))
        path.write_bytes(pickle.dumps(batches))


def matmul_peak(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best


def _summary(trials: Sequence[list[dict[str, float]]], peaks: Sequence[float]) -> dict[str, Any]:
    steps = [step for trial in trials for step in trial]
    mean = {name: statistics.mean(step[name] for step in steps) for name in steps[0]}
    pairs = steps[0]["pairs"]
    rounds = [statistics.mean(step["seconds"] for step in trial) for trial in trials]
    seconds = statistics.median(rounds)
    reached = [mean["flops"] / step / peak for step, peak in zip(rounds, peaks, strict=True)]
    return {
        "seconds": seconds,
        "pairs_per_s": pairs / seconds,
        "real_tokens_per_s": mean["real_tokens"] / seconds,
        "image_tokens_per_pair": mean["image_tokens"] / pairs,
        "text_tokens_per_pair": mean["text_tokens"] / pairs,
        "flops_per_pair": mean["flops"] / pairs,
        "peak_share": statistics.median(reached),
        "matmul_peak": statistics.median(peaks),
        "peak_mb": max(step["peak_mb"] for step in steps),
        "kb_per_token": max(step["peak_mb"] * 1024 / step["real_tokens"] for step in steps),
        "rounds": rounds,
    }


def run_trial(
    variant: Variant, size: str, device: torch.device, file: Path, threads: int
) -> list[dict[str, float]]:
    """The measured steps of one trial, one on every batch of the file, on so many threads."""
    if variant.source:
        sys.path.insert(0, variant.source)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    towers = PROJECTS[variant.project](WIDTHS[size]).to(device)
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
        synchronize()

    # Kept: freed pairs would be room within the highest memory before the first step, and the
    # step's own would seem smaller.
    with file.open("rb") as pickled:
        drawn: list[list[RealPair]] = pickle.load(pickled)
    batches = [towers.prepare(pairs, device) for pairs in drawn]
    held_mb = peak_mb(device.type)
    flops = []
    for batch in batches:
        # Nothing compiles under the counter.
        with nullcontext() if variant.compiled else flop_counter() as counter:
            step(batch)
        flops.append(counter.get_total_flops() if counter else math.nan)
    found = []
    for pairs, batch, operations in zip(drawn, batches, flops, strict=True):
        begin = time.perf_counter()
        step(batch)
        seconds = time.perf_counter() - begin
        image, text = (sum(real.pair.lengths[stream] for real in pairs) for stream in range(2))
        found.append(
            {
                "image_tokens": image,
                "text_tokens": text,
                "pairs": len(pairs),
                "seconds": seconds,
                "flops": operations,
                "real_tokens": {"image": image, "text": text}.get(variant.part, image + text),
                "peak_mb": peak_mb(device.type) - held_mb,
            }
        )
    return found


def _forward(variant: Variant, towers: Towers, batch: Any) -> Tensor:
    if variant.part == "step":
        image_ED, text_ED = towers(batch)
        return towers.loss(image_ED, text_ED, towers.scale.exp())
    embed = towers.embed_images if variant.part == "image" else towers.embed_texts
    return embed(batch).float().square().sum()
